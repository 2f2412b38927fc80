"""The models against numbers computed by the PyTorch VMamba in float32 on a CPU."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe import cotangent, images, probe, state_dict

from vmamba_jax import VSSM, VMambaConfig
from vmamba_jax.convert import from_torch, to_torch
from vmamba_jax.ops import IMPLEMENTATIONS

DATA = Path(__file__).parent / "data"
SMALL = sorted(p.stem for p in (DATA / "golden_small").glob("*.npz"))
# The TPU kernel runs on its own hardware; its twin in interpret mode is in test_pallas_tpu.py.
PORTABLE = [name for name in IMPLEMENTATIONS if not name.startswith("pallas")]
RELEASED = sorted(p.stem for p in (DATA / "golden_released").glob("*.npz"))


class Golden:
    """One golden file: the arrays, and the config, weights and input they were computed from."""

    def __init__(self, folder, name):
        self.arrays = dict(np.load(DATA / folder / f"{name}.npz"))
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.config = VMambaConfig(**self.meta["config"])
        self.seed = self.meta["seed"]
        self.state_dict = state_dict(self.meta["shapes"], self.seed)
        nchw = images(self.meta["input_shape_nchw"], self.seed)
        self.images = jnp.asarray(nchw.transpose(0, 2, 3, 1))

    def __getitem__(self, key):
        return self.arrays[key]


# One of each kind of operator: scan and its routes, gate, normalisation. The gradients of the
# others, and what else is long, are under the marker.
FAMILIES = {
    *("batchnorm", "bidi", "cascade2d", "default", "mamba2", "oncnorm", "ondwconv3"),
    *("onsoftmax", "rot90", "v05_noz_ln2d"),
    *("unidi", "v0", "v0seq", "v05_z"),
}


def combinations(names, with_all, with_default):
    """(name, implementation), the long remainder marked."""
    return [
        pytest.param(
            name,
            implementation,
            marks=()
            if name in with_all or (implementation == "sequential" and name in with_default)
            else pytest.mark.exhaustive,
        )
        for name in names
        for implementation in PORTABLE
    ]


def assert_stages_equal(golden, state):
    for i, depth in enumerate(golden.config.depths):
        last = state["intermediates"][f"layers_{i}_blocks_{depth - 1}"]["__call__"][0]
        assert last.shape == tuple(golden[f"stage{i}_shape"])
        np.testing.assert_allclose(
            last.mean(axis=(1, 2)), golden[f"stage{i}_mean_hw"], atol=1e-4, rtol=0
        )
        rms = jnp.sqrt((last**2).mean())
        np.testing.assert_allclose(rms, golden[f"stage{i}_rms"], rtol=1e-4)


def run_blocks(model, variables, images):
    """Logits, and what every block returns."""
    return model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: "blocks" in (module.name or ""),
    )


OTHERS = sorted(set(SMALL) - FAMILIES)


@pytest.mark.parametrize(("name", "implementation"), combinations(OTHERS, (), OTHERS))
def test_a_variant_has_pytorchs_logits(name, implementation):
    golden = Golden("golden_small", name)
    variables = from_torch(golden.state_dict, golden.config)
    model = VSSM(golden.config, scan_implementation=implementation)
    logits, state = jax.jit(partial(run_blocks, model))(variables, golden.images)
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=0)
    assert_stages_equal(golden, state)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *combinations(sorted(FAMILIES), {"v05_noz_ln2d"}, FAMILIES),
        *(pytest.param(name, "sequential", marks=pytest.mark.exhaustive) for name in OTHERS),
    ],
)
def test_small_model_equals_pytorch(name, implementation):
    golden = Golden("golden_small", name)
    variables = from_torch(golden.state_dict, golden.config)
    model = VSSM(golden.config, scan_implementation=implementation)

    probe_of_loss = cotangent(golden["logits"].shape, golden.seed)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, images):
        logits, state = run_blocks(model, {**variables, "params": params}, images)
        return (logits * probe_of_loss).sum(), (logits, state)

    (value, (logits, state)), (grads, grad_images) = loss(variables["params"], golden.images)

    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=0)
    assert abs(value - golden["loss"]) < 2e-5 * np.abs(probe_of_loss).sum()
    assert_stages_equal(golden, state)

    named = to_torch({"params": grads}, golden.config)
    assert set(named) == set(golden["grad_keys"])
    for key, norm, dot in zip(
        golden["grad_keys"], golden["grad_norm"], golden["grad_dot"], strict=True
    ):
        vector = probe(key, named[key].shape, golden.seed)
        np.testing.assert_allclose(np.linalg.norm(named[key]), norm, rtol=1e-4, err_msg=key)
        actual = np.vdot(named[key].astype(np.float64), vector)
        assert abs(actual - dot) < 1e-4 * norm * np.linalg.norm(vector), key
    if golden["grad_input"].ndim:
        expected = golden["grad_input"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(
            grad_images, expected, rtol=0, atol=1e-4 * np.abs(expected).max()
        )
    else:  # the larger file keeps only the norm
        np.testing.assert_allclose(jnp.linalg.norm(grad_images), golden["grad_input"], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"), combinations(RELEASED, (), {"vmamba_tiny_s1l8"})
)
def test_released_architecture_equals_pytorch(name, implementation):
    golden = Golden("golden_released", name)
    variables = from_torch(golden.state_dict, golden.config)
    model = VSSM(golden.config, scan_implementation=implementation)
    logits = jax.jit(model.apply)(variables, golden.images)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "vmamba_tiny_s1l8" else pytest.mark.exhaustive)
        for name in RELEASED
    ],
)
def test_bfloat16_stays_close_to_pytorch_in_float32(name):
    golden = Golden("golden_released", name)
    variables = from_torch(golden.state_dict, golden.config)
    model = VSSM(golden.config, dtype=jnp.bfloat16, scan_blocks=True)  # compiles sooner
    error = np.asarray(jax.jit(model.apply)(variables, golden.images)) - golden["logits"]
    assert np.sqrt((error**2).mean()) < 2e-2 * golden["logits"].std()
