"""What is said to be float32 asks every device for float32, forward and backward."""

import re

import jax
import jax.numpy as jnp
import pytest

from vmamba_jax import VSSM, model_config
from vmamba_jax.detection.roi_align import roi_align

_FLOAT32 = re.compile(
    r"stablehlo\.(?:dot_general|convolution).*: \(tensor<\S*f32>, tensor<\S*f32>\)"
)


def _products(function, *arguments, platform: str) -> list[str]:
    """The products of two float32 arrays in a program that is lowered for a platform."""
    traced = jax.jit(function).trace(*arguments)
    return _FLOAT32.findall(traced.lower(lowering_platforms=(platform,)).as_text())


def _gradient(model: VSSM):
    images = jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def loss(params):
        return jnp.square(jnp.asarray(model.apply({"params": params}, images))).mean()

    return jax.grad(loss), params


def _model(precision: str | None = "highest", **changes) -> VSSM:
    small = {"depths": (1, 1), "dims": (32, 64), "num_classes": 5, "drop_path_rate": 0.0}
    config = model_config("vmamba_tiny_s1l8").replace(**small, **changes)
    return VSSM(config, dtype=jnp.bfloat16, precision=precision)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"downsample_version": "v1", "patchembed_version": "v1", "ssm_d_state": 4},
        {"forward_type": "m0_noz", "ssm_init": "v2", "ssm_d_state": 4, "ssm_dt_rank": 4},
    ],
    ids=["convolutions", "merging", "mamba2"],
)
def test_no_float32_product_of_a_bfloat16_model_is_rounded(platform: str, changes: dict):
    products = _products(*_gradient(_model(**changes)), platform=platform)
    assert len(products) >= 8
    assert all(product.count("HIGHEST") == 2 for product in products), products


def test_the_device_s_own_way_is_one_choice():
    products = _products(*_gradient(_model(precision=None)), platform="cuda")
    assert any("DEFAULT" in product for product in products)
    # Of the scan and its gradient none is.
    assert any("HIGHEST" in product for product in products)


def test_interpolated_features_are_not_rounded():
    maps = [jnp.zeros((1, 16, 16, 4)), jnp.zeros((1, 8, 8, 4))]

    def align(boxes):
        return roi_align(maps, boxes, strides=(4, 8), output_size=7)

    products = _products(align, jnp.zeros((1, 3, 4)), platform="cuda")
    assert products
    assert all(product.count("HIGHEST") == 2 for product in products)
