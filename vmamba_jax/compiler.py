"""What XLA's compiler is asked for when it builds these models."""

import jax

RUNS_ONCE = {"xla_backend_optimization_level": 0}
"""Options for what runs once, as initial values do: unoptimised code is ready sooner."""


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """Options for `jax.jit` that suit a model or its training step.

    On a CPU, XLA orders operations so that many can run at once. A VMamba is one long chain, each
    link of which already uses every core; the order that frees memory soonest takes less of it, and
    less time, since fewer fresh pages are touched. And XLA drops the barriers by which
    `jax.checkpoint` computes again what it does not keep, finds the results that are there, and
    keeps them: it is told to leave the barriers. Both together let a training step do with half the
    memory. A forward pass alone, which keeps little alive, hardly changes.

    Args:
        platform: "cpu", "gpu" or "tpu", as devices name it; that of JAX's first device by default.

    Returns:
        For ``jax.jit(function, compiler_options=...)``; empty where the compiler's own choices are
        the best known.
    """
    if (platform or jax.devices()[0].platform) == "cpu":
        return {
            "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
            "xla_disable_hlo_passes": "cse_barrier_expander",  # its name for what drops them
        }
    return {}
