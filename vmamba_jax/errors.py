"""The error that every reader and writer of checkpoints raises."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read, used or written; the message says why and what to do."""
