"""The training recipe: state, step, sharding, loop."""
