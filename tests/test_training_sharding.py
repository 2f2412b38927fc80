"""Every mesh, and several processes, train the same model as one device does."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from tiny import CONFIG, RANDOM, train_steps

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.config import VMambaConfig
from vmamba_jax.training.sharding import (
    MeshConfig,
    check_batch_size,
    make_mesh,
    state_sharding,
)

_STEPS = 10
_BATCH_NORM = RANDOM.replace(norm_layer="bn")


@cache
def one_device(config: VMambaConfig = RANDOM) -> list[float]:
    """The losses of one device, some further than is compared at once."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return train_steps(mesh, _STEPS + 2, config=config)[1]


@pytest.mark.parametrize(
    ("data", "fsdp", "config"),
    [
        (4, 2, _BATCH_NORM),
        pytest.param(8, 1, RANDOM, marks=pytest.mark.exhaustive),
        pytest.param(1, 8, RANDOM, marks=pytest.mark.exhaustive),
    ],
)
def test_every_mesh_has_the_losses_of_one_device(
    data: int, fsdp: int, config: VMambaConfig
) -> None:
    state, losses = train_steps(make_mesh(MeshConfig(data, fsdp)), _STEPS, config=config)
    np.testing.assert_allclose(losses, one_device(config)[:_STEPS], rtol=1e-5)
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
    # What is random, or normalised over a batch, is another one in a batch that comes in parts.
    whole = train_steps(mesh, 3, config=CONFIG, mixing=False)[1]
    parts = train_steps(mesh, 3, config=CONFIG, mixing=False, accumulation_steps=2)[1]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint of two processes of two devices each, and what they printed."""
    folder = tmp_path_factory.mktemp("pair")
    address = processes.free_address()
    environment = processes.environment(2, JAX_ENABLE_COMPILATION_CACHE="false")
    outputs = processes.finish(
        [
            processes.start(
                *("pair", address, str(index), str(_STEPS), str(folder)), environment=environment
            )
            for index in range(2)
        ]
    )
    return folder, outputs


def test_two_processes_have_the_losses_of_one_device(pair: tuple[Path, list[str]]) -> None:
    for output in pair[1]:
        losses = [float(word) for word in output.splitlines()[-1].split()]
        np.testing.assert_allclose(losses, one_device()[:_STEPS], rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 2)])
def test_what_two_processes_saved_goes_on_on_other_devices(
    data: int, fsdp: int, pair: tuple[Path, list[str]]
) -> None:
    mesh = make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    with Checkpoints(pair[0], read_only=True) as checkpoints:
        _, losses = train_steps(mesh, 2, restore=checkpoints)
    np.testing.assert_allclose(losses, one_device()[_STEPS:], rtol=1e-5)


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
