"""Every mesh, and several processes, train the same model as one device does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import train_steps

from vmamba_jax.training.sharding import (
    MeshConfig,
    check_batch_size,
    make_mesh,
    state_sharding,
)

_STEPS = 10


@pytest.fixture(scope="module")
def one_device() -> list[float]:
    return train_steps(make_mesh(MeshConfig(), jax.devices()[:1]), _STEPS)[1]


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [
        (4, 2),
        pytest.param(8, 1, marks=pytest.mark.exhaustive),
        pytest.param(1, 8, marks=pytest.mark.exhaustive),
    ],
)
def test_every_mesh_has_the_losses_of_one_device(
    data: int, fsdp: int, one_device: list[float]
) -> None:
    state, losses = train_steps(make_mesh(MeshConfig(data, fsdp)), _STEPS)
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)
    split = [
        leaf
        for tree in (state.variables, state.ema, state.opt_state)
        for leaf in jax.tree.leaves(tree)
        if not leaf.sharding.is_fully_replicated
    ]
    # Parameters, average and both moments of the large leaves; each device holds its share.
    assert (len(split) >= 4) == (fsdp > 1)
    for leaf in split:
        assert leaf.addressable_shards[0].data.size * fsdp == leaf.size


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whole = train_steps(mesh, 3, mixing=False)[1]
    parts = train_steps(mesh, 3, mixing=False, accumulation_steps=2)[1]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_two_processes_have_the_losses_of_one_device(
    one_device: list[float], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tiny", "pair", f"127.0.0.1:{port}", str(index), str(_STEPS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    for output, _ in outputs:
        losses = [float(word) for word in output.splitlines()[-1].split()]
        np.testing.assert_allclose(losses, one_device, rtol=1e-5)


def test_a_mesh_must_use_every_device() -> None:
    with pytest.raises(ValueError, match="product is 8"):
        make_mesh(MeshConfig(3, 2))
    assert make_mesh(MeshConfig(-1, 2)).shape == {"data": 4, "fsdp": 2}


def test_a_batch_must_divide_by_devices_and_accumulation_steps() -> None:
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ValueError, match="use a multiple of 16, such as 32 or 48"):
        check_batch_size(40, mesh, accumulation_steps=2)


def test_small_and_indivisible_leaves_stay_whole() -> None:
    mesh = make_mesh(MeshConfig(1, 8))
    shapes = {
        "large": jax.ShapeDtypeStruct((512, 64), np.float32),
        "odd": jax.ShapeDtypeStruct((77, 77), np.float32),
        "small": jax.ShapeDtypeStruct((64,), np.float32),
    }
    shardings = state_sharding(shapes, mesh)
    assert shardings["large"].spec == jax.sharding.PartitionSpec("fsdp")
    assert shardings["odd"].is_fully_replicated
    assert shardings["small"].is_fully_replicated
