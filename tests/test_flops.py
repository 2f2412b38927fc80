"""Parameters and operations against the published figures."""

import functools

import jax
import jax.numpy as jnp
import pytest

from vmamba_jax import VSSM, VMambaConfig, list_models, model_config
from vmamba_jax.analysis.flops import summarize

# VMamba's README: parameters and operations (fvcore) at 224 x 224.
PUBLISHED = {
    "vanilla_vmamba_tiny": (23e6, 5.6),
    "vanilla_vmamba_small": (44e6, 11.2),
    "vanilla_vmamba_base": (76e6, 18.0),
    "vmamba_tiny_s2l5": (31e6, 4.9),
    "vmamba_small_s2l15": (50e6, 8.7),
    "vmamba_base_s2l15": (89e6, 15.4),
    "vmamba_tiny_s1l8": (30e6, 4.9),
    "vmamba_small_s1l20": (49e6, 8.6),
    "vmamba_base_s1l20": (87e6, 15.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_agree_with_the_published_ones(name):
    parts = summarize(model_config(name))
    params, gflops = PUBLISHED[name]
    assert round(sum(part.flops for part in parts) / 1e9, 1) == gflops
    assert round(sum(part.params for part in parts) / 1e6) == params / 1e6


VARIANTS = [
    {"norm_layer": "bn", "gmlp": True},
    {"forward_type": "m0_noz", "ssm_init": "v2", "ssm_d_state": 8},
    {"downsample_version": "none", "dims": (16, 16)},
    {"downsample_version": "v2", "posembed": True, "imgsize": 32, "patch_norm": False},
    {"ssm_ratio": 0.0},
    {"mlp_ratio": 0.0, "forward_type": "v05_onnone", "ssm_conv": -1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameters_are_those_of_the_model(variant):
    defaults = {"depths": (2, 1), "dims": (16, 32), "num_classes": 4, "imgsize": 32}
    config = VMambaConfig(**defaults | variant)
    variables = jax.eval_shape(VSSM(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    expected = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(part.params for part in summarize(config, 32)) == expected


def test_shapes_are_those_of_the_features():
    config = model_config("vmamba_digits")
    parts = summarize(config, 40)
    model, images = VSSM(config), jnp.zeros((1, 40, 40, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    features = functools.partial(model.apply, out_indices=(0, 1), method="features")
    maps = jax.eval_shape(features, variables, images)
    shapes = [part.output_shape for part in parts if part.name.startswith("stage")]
    assert shapes == [stage.shape[1:] for stage in maps]


def test_operations_grow_with_the_image_s_area():
    config = model_config("vanilla_vmamba_tiny")
    small, large = (sum(p.flops for p in summarize(config, size)[:-1]) for size in (224, 448))
    assert large == 4 * small


def test_an_image_too_small_is_refused():
    with pytest.raises(ValueError, match="too small"):
        summarize(model_config("vanilla_vmamba_tiny"), 3)


def test_every_registered_model_can_be_summarised():
    for name in list_models():
        assert all(part.params > 0 for part in summarize(model_config(name)))
