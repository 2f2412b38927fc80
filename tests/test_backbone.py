"""VMamba as a backbone: its maps, its weights out of every kind of file, freezing."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax import VSSM, VMambaConfig, VSSMBackbone, create_backbone, register_model
from vmamba_jax.convert import CheckpointError, read_weights, save_model
from vmamba_jax.convert.torch_file import load_torch_file
from vmamba_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_scale,
    learning_rate_scales,
)

FIXTURES = Path(__file__).parent / "data" / "fixtures"
CLASSIFIER, SEGMENTER = "cls_released_v2.pth", "mmseg_raw_with_message_hub.pth"
CONFIG = VMambaConfig(
    depths=(1, 2), dims=(8, 16), ssm_d_state=1, forward_type="v05_noz", downsample_version="v3",
    patchembed_version="v2", mlp_ratio=2.0, posembed=True, imgsize=32,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _architecture_of_the_fixtures():
    register_model("backbone_of_the_fixtures", read_weights(FIXTURES / CLASSIFIER).config)


def leaves(variables):
    return {"/".join(map(str, p)): x for p, x in jax.tree.leaves_with_path(variables)}


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_the_maps_are_the_stages_of_the_model_each_normalised(scan_blocks):
    backbone = VSSMBackbone(CONFIG, out_indices=(1, 0), scan_blocks=scan_blocks)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 27, 3)), jnp.float32)
    params = jax.jit(backbone.init)(jax.random.key(0), images)["params"]
    scale = jnp.linspace(1, 2, 16, dtype=jnp.float32)
    params = {**params, "outnorm1": {**params["outnorm1"], "scale": scale}}
    maps = jax.jit(backbone.apply)({"params": params}, images)

    model = VSSM(CONFIG.replace(posembed=False))
    trunk = {"params": {k: v for k, v in params.items() if "outnorm" not in k}}
    stages = jax.jit(lambda v, x: model.apply(v, x, out_indices=(1, 0)))(trunk, images)
    for x, y, info in zip(stages, maps, backbone.feature_info, strict=True):
        assert y.shape == (1, -(-20 // info.stride), -(-27 // info.stride), info.channels)
        expected = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        if info.channels == 16:
            expected = expected * scale[None, None, None]
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_stages_after_the_last_map_are_not_built():
    backbone, variables = create_backbone("vmamba_digits", out_indices=(0,))
    assert set(variables["params"]) == {"patch_embed", "layers_0_blocks_0", "outnorm0"}
    assert backbone.feature_info == ((32, 4),)


def test_a_classifier_s_file_fills_all_but_the_maps_norms_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        _, variables = create_backbone("backbone_of_the_fixtures", pretrained=FIXTURES / CLASSIFIER)
    assert "it has no outnorm0, outnorm1; they start anew" in caplog.text
    file = load_torch_file(FIXTURES / CLASSIFIER)["model"]
    params = variables["params"]
    np.testing.assert_array_equal(
        params["layers_1_blocks_0"]["op"]["out_proj"]["kernel"],
        file["layers.1.blocks.0.op.out_proj.weight"].T,
    )
    np.testing.assert_array_equal(params["outnorm1"]["scale"], np.ones(32, np.float32))
    np.testing.assert_array_equal(params["outnorm1"]["bias"], np.zeros(32, np.float32))
    assert not {"head", "classifier_norm"} & set(params)


def test_a_segmenter_s_file_fills_the_maps_norms_too(caplog):
    _, variables = create_backbone("backbone_of_the_fixtures", pretrained=FIXTURES / SEGMENTER)
    assert not caplog.records
    file = load_torch_file(FIXTURES / SEGMENTER)["state_dict"]
    for i in (0, 1):
        norm = variables["params"][f"outnorm{i}"]
        np.testing.assert_array_equal(norm["scale"], file[f"backbone.outnorm{i}.weight"])
        np.testing.assert_array_equal(norm["bias"], file[f"backbone.outnorm{i}.bias"])
        assert np.abs(norm["bias"]).max() > 0


def test_a_converted_folder_fills_a_backbone_of_fewer_stages(tmp_path):
    weights = read_weights(FIXTURES / CLASSIFIER)
    save_model(tmp_path / "model", weights.variables(), weights.config)
    backbone, variables = create_backbone(
        "backbone_of_the_fixtures", pretrained=tmp_path / "model", out_indices=(0,)
    )
    expected = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.structure(variables) == jax.tree.structure(expected)


def test_a_file_of_another_architecture_is_named():
    with pytest.raises(CheckpointError, match="another architecture than vmamba_tiny_s1l8"):
        create_backbone("vmamba_tiny_s1l8", pretrained=FIXTURES / SEGMENTER)


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="out_indices must name stages between 0 and 1"):
        create_backbone("vmamba_digits", out_indices=(2,))


def test_learning_rates_fall_towards_the_image_and_end_at_the_frozen_stages():
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(VSSMBackbone(CONFIG, (0, 1)).init, jax.random.key(0), images)["params"]
    params = {"backbone": params, "decoder": {"kernel": jnp.zeros(3)}}
    config = OptimizerConfig(layer_decay=0.5, frozen_stages=1)
    scales = learning_rate_scales(params, config, CONFIG.depths)
    backbone = scales["backbone"]
    frozen = {name for name, tree in backbone.items() if set(jax.tree.leaves(tree)) == {0.0}}
    assert frozen == {"patch_embed", "layers_0_blocks_0", "layers_0_downsample"}
    assert backbone["layers_1_blocks_0"]["norm"]["scale"] == 0.25
    assert backbone["layers_1_blocks_1"]["norm"]["scale"] == 0.5
    assert backbone["outnorm0"]["scale"] == scales["decoder"]["kernel"] == 1.0
    still = OptimizerConfig(layer_decay=0.5)
    assert learning_rate_scale(("patch_embed", "conv", "kernel"), still, CONFIG.depths) == 0.0625
