"""Strict settings for every test: dtype and rank promotion, warnings, shapes, eight CPU devices."""

import os
import sys
import tempfile
from importlib.metadata import version

# Before jax is imported: mesh tests need several devices, and eight fit any mesh shape.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if "VMAMBA_JAX_AS_USERS" not in os.environ:  # some tests run again with it, see .ci/check
    # Tests compile far longer than they run; unoptimised machine code halves that.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # XLA aborts at unknown flags
        # The older code generator compiles in two thirds of the time.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
# Workers and the processes that tests start compile the same few programs: once is enough. But with
# jaxlib 0.12.0 a training step read back from the cache on a CPU ends the process.
if version("jaxlib").startswith("0.12."):
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated function of the package checks the shapes and dtypes it is given and returns.
install_import_hook("vmamba_jax", "beartype.beartype")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the `vmamba-jax` command in this process: its status, output and errors."""
    from vmamba_jax import cli  # noqa: PLC0415 - few tests need it

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vmamba-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return run
