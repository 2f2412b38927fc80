"""Weights from every layout and naming arrive at the same numbers, or at one clear error."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
import torch_writer

from vmamba_jax import VSSM, VMambaConfig, list_models, model_config
from vmamba_jax.convert import (
    CheckpointError,
    from_torch,
    load_model,
    read_weights,
    save_model,
    to_torch,
)
from vmamba_jax.convert.adapt import replace_head, resize_position_embedding
from vmamba_jax.convert.export import save_safetensors
from vmamba_jax.convert.layout import find_weights
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.convert.naming import standard_names
from vmamba_jax.convert.releases import RELEASES

DATA = Path(__file__).parent / "data"
FIXTURES = DATA / "fixtures"


def golden(name: str) -> tuple[dict, dict]:
    with np.load(DATA / "golden_small" / f"{name}.npz") as arrays:
        return json.loads(str(arrays["meta"])), {key: arrays[key] for key in arrays.files}


IMAGES = jnp.asarray(recipe.images((2, 3, 40, 48), 7).transpose(0, 2, 3, 1))


@functools.cache  # most files here hold one architecture: compiled once
def forward(config):
    return jax.jit(VSSM(config).apply)


def logits(weights) -> np.ndarray:
    return np.asarray(forward(weights.config)(weights.variables(), IMAGES))


@pytest.mark.parametrize(
    ("name", "layout", "chosen"),
    [
        ("bare_state_dict", "state dict", "state dict"),
        ("cls_conv4d_linears", "released", "model"),
        ("cls_released_v0_legacy_names", "released", "model"),
        ("cls_released_v2", "released", "model"),
        ("cls_single_file_names", "released", "model"),
        ("cls_training_with_ema_and_yacs_config", "training", "model_ema"),
        ("hostile_os_system", "training", "model"),
        ("legacy_tar_format", "released", "model"),
    ],
)
def test_every_layout_gives_the_golden_logits(name, layout, chosen):
    weights = read_weights(FIXTURES / f"{name}.pth")
    _, expected = golden("v0" if "v0" in name else "v05_noz_ln2d")
    np.testing.assert_allclose(logits(weights), expected["logits"], rtol=0, atol=2e-5)
    assert weights.provenance["layout"] == layout
    assert weights.provenance["weights"] == chosen
    assert len(weights.provenance["sha256"]) == 64


def test_bfloat16_weights_give_the_logits_of_rounded_weights():
    weights = read_weights(FIXTURES / "cls_bfloat16.pth")
    meta, expected = golden("v05_noz_ln2d")
    rounded = {
        key: recipe.weight(key, shape, 7).astype("bfloat16").astype(np.float32)
        for key, shape in meta["shapes"].items()
    }
    for key, array in weights.state_dict.items():
        np.testing.assert_array_equal(array.astype(np.float32), rounded[key])
    # Eight bits of mantissa in every weight.
    np.testing.assert_allclose(logits(weights), expected["logits"], rtol=0, atol=2e-2)


def test_a_segmenter_gives_its_backbone():
    weights = read_weights(FIXTURES / "mmseg_raw_with_message_hub.pth")
    _, expected = golden("v05_noz_ln2d")
    features = functools.partial(VSSM(weights.config).apply, out_indices=(0, 1), method="features")
    maps = jax.jit(features)(weights.variables(), IMAGES)
    for i, stage in enumerate(maps):
        mean = np.asarray(stage).mean(axis=(1, 2))
        np.testing.assert_allclose(mean, expected[f"stage{i}_mean_hw"], rtol=0, atol=2e-5)
    assert weights.config.num_classes == 0
    left_out = {change.source for change in weights.changes if change.action == "left out"}
    assert {"decode_head.conv_seg.weight", "backbone.outnorm0.weight", "message_hub"} <= left_out


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("bad_missing_key", r"missing layers\.0\.blocks\.0\.op\.Ds"),
        ("bad_shape", r"A_logs has shape \(5, 1\), expected \(256, 1\)"),
        ("bad_unexpected_key", r"unexpected layers\.0\.blocks\.0\.op\.surprise"),
        ("bad_not_a_checkpoint", "not a PyTorch checkpoint"),
        ("bad_truncated", "cut short"),
        ("hostile_eval_inside_model", "no VMamba state dict"),
        ("tensor_views_of_one_storage", "no VMamba state dict"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_fault(name, fault):
    path = FIXTURES / f"{name}.pth"
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_plain_weights_can_be_chosen_where_there_are_averaged_ones():
    path = FIXTURES / "cls_training_with_ema_and_yacs_config.pth"
    plain, averaged = read_weights(path, "model"), read_weights(path, "ema")
    assert plain.provenance["weights"] == "model"
    key = "classifier.head.weight"
    assert np.any(plain.state_dict[key] != averaged.state_dict[key])
    with pytest.raises(CheckpointError, match=r"no averaged \(EMA\) weights"):
        read_weights(FIXTURES / "cls_released_v2.pth", "ema")


def test_the_training_configuration_tells_what_the_weights_cannot(tmp_path):
    meta, _ = golden("bidi")
    config = {"MODEL": {"VSSM": {"SSM_FORWARDTYPE": meta["config"]["forward_type"]}}}
    state_dict = recipe.state_dict(meta["shapes"], meta["seed"])
    torch_writer.save(tmp_path / "a.pth", {"model": state_dict, "config": config})
    weights = read_weights(tmp_path / "a.pth")
    assert weights.config.forward_type == meta["config"]["forward_type"]
    _, expected = golden("bidi")
    np.testing.assert_allclose(logits(weights), expected["logits"], rtol=0, atol=2e-5)


def test_two_tensors_for_one_weight_are_refused():
    with pytest.raises(CheckpointError, match=r"classifier\.head\.bias"):
        standard_names({"head.bias": np.zeros(3), "classifier.head.bias": np.zeros(3)})


def as_first_release(key, array):
    for today, then in (
        (r"^patch_embed\.0", "patch_embed.proj"),
        (r"^patch_embed\.2", "patch_embed.norm"),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"(blocks\.\d+)\.op\.", r"\1.self_attention."),
        (r"^classifier\.", ""),
    ):
        key = re.sub(today, then, key)
    return key, array


def as_one_file(key, array):
    key = key.replace("downsample.norm", "downsample.1").replace(
        "downsample.reduction", "downsample.2"
    )
    if key.endswith(("x_proj_weight", "dt_projs_weight")):
        return key.replace("_weight", ".weight"), array.reshape(-1, array.shape[-1])
    return key, array


def as_convolutions(key, array):
    linear = r"(in_proj|out_proj|fc1|fc2|reduction)\.weight$"
    return key, array[:, :, None, None] if re.search(linear, key) else array


def as_backbone_of_a_wrapped_segmenter(key, array):
    return f"module.backbone.{key}", array


NAMINGS = (as_first_release, as_one_file, as_convolutions, as_backbone_of_a_wrapped_segmenter)


@pytest.mark.parametrize("name", RELEASES)
def test_the_round_trip_is_exact_for_every_released_model_and_naming(name):
    config = model_config(name)
    # Distinct numbers everywhere: windows into one buffer.
    buffer = np.random.default_rng(0).standard_normal(8_000_000, np.float32)
    state_dict = {}
    for i, weight in enumerate(weight_table(config)):
        size = int(np.prod(weight.shape))
        state_dict[weight.key] = buffer[i : i + size].reshape(weight.shape)
    for naming in NAMINGS:
        renamed = dict(naming(key, array) for key, array in state_dict.items())
        found = find_weights({"state_dict": renamed})
        standard, _ = standard_names(found.tensors)
        back = to_torch(from_torch(standard, config), config)
        assert back.keys() == state_dict.keys()
        for key, array in back.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, state_dict[key])


@pytest.mark.parametrize("name", ["cls_released_v2", "cls_bfloat16"])
def test_a_saved_model_gives_the_file_s_own_bits_back(name, tmp_path):
    read = read_weights(FIXTURES / f"{name}.pth")
    names = [f"digit {i}" for i in range(10)]
    save_model(tmp_path / "model", read.variables(), read.config, read.provenance, names)
    saved = load_model(tmp_path / "model")
    assert saved.config == read.config
    assert saved.provenance == read.provenance
    assert saved.class_names == names
    jax.tree.map(np.testing.assert_array_equal, saved.variables, read.variables())
    again = read_weights(tmp_path / "model")
    save_safetensors(tmp_path / "a.safetensors", again.state_dict)
    final = read_weights(tmp_path / "a.safetensors")
    for key, array in final.state_dict.items():
        np.testing.assert_array_equal(array, read.state_dict[key], strict=True)


def test_a_saved_model_is_never_overwritten_and_damage_is_named(tmp_path):
    read = read_weights(FIXTURES / "cls_released_v2.pth")
    path = tmp_path / "model"
    save_model(path, read.variables(), read.config)
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(path, read.variables(), read.config)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a saved model"):
        load_model(FIXTURES)
    next((path / "model").glob("meta*")).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(path)


def test_a_new_head_replaces_only_the_head():
    read = read_weights(FIXTURES / "cls_released_v2.pth")
    swapped = read_weights(FIXTURES / "cls_released_v2.pth", num_classes=3)
    assert swapped.config == read.config.replace(num_classes=3)
    assert swapped.state_dict["classifier.head.weight"].shape == (3, 32)
    assert swapped.state_dict["classifier.head.weight"].std() == pytest.approx(0.02, rel=0.3)
    for key, array in read.state_dict.items():
        if "head" not in key:
            np.testing.assert_array_equal(swapped.state_dict[key], array)
    why = [change.why for change in swapped.changes if change.action == "initialised"]
    assert why == ["a new head of 3 classes in place of 10"] * 2
    removed, _ = replace_head(read.state_dict, 0)
    assert not any("head" in key for key in removed)


def test_a_position_embedding_resizes_as_pytorch_does():
    with np.load(DATA / "bicubic.npz") as arrays:  # written by torch 2.13's interpolate
        for i in range(len(arrays.files) // 2):
            expected = arrays[f"out{i}"]
            resized, _ = resize_position_embedding(
                {"pos_embed": arrays[f"in{i}"]}, *expected.shape[2:]
            )
            np.testing.assert_allclose(resized["pos_embed"], expected, rtol=0, atol=5e-6)


def test_a_checkpoint_with_position_embedding_takes_another_image_size(tmp_path):
    config = VMambaConfig(
        depths=(1,), dims=(8,), num_classes=2, ssm_d_state=1, posembed=True, imgsize=32
    )
    shapes = {weight.key: weight.shape for weight in weight_table(config)}
    torch_writer.save(tmp_path / "a.pth", recipe.state_dict(shapes, 7))
    for size, patches in ((48, "12x12"), ((48, 64), "12x16")):
        weights = read_weights(tmp_path / "a.pth", image_size=size)
        assert weights.config.imgsize == size
        images = jnp.zeros((1, *weights.config.input_size, 3))
        out = jax.eval_shape(VSSM(weights.config).apply, weights.variables(), images)
        assert out.shape == (1, 2)
        why = [c.why for c in weights.changes if c.action == "resized"]
        assert why == [f"8x8 to {patches} patches"]
    # One that is not square is read as such.
    torch_writer.save(tmp_path / "b.pth", weights.state_dict)
    assert read_weights(tmp_path / "b.pth").config.imgsize == (48, 64)
    with pytest.raises(ValueError, match="one side or a height and a width"):
        config.replace(imgsize=(32, 32, 48))


def test_every_release_is_a_registered_model():
    assert set(RELEASES) <= set(list_models())


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_rgb_weights_fit_other_channels(channels):
    read = read_weights(FIXTURES / "cls_released_v2.pth")
    fitted = read_weights(FIXTURES / "cls_released_v2.pth", in_chans=channels)
    assert fitted.config.in_chans == channels
    key = "patch_embed.0.weight"
    rgb, kernel = read.state_dict[key], fitted.state_dict[key]
    assert kernel.shape == (rgb.shape[0], channels, *rgb.shape[2:])
    expected = {
        1: rgb.sum(axis=1, keepdims=True),
        2: rgb[:, [0, 1]] * 3 / 2,
        4: rgb[:, [0, 1, 2, 0]] * 3 / 4,
        6: rgb[:, [0, 1, 2, 0, 1, 2]] / 2,
    }[channels]
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)
    (change,) = (change for change in fitted.changes if change.action == "adapted")
    assert f"for {channels} channel" in change.why
    for name in fitted.state_dict.keys() - {key}:
        np.testing.assert_array_equal(fitted.state_dict[name], read.state_dict[name])


def test_weights_for_other_channels_than_rgb_fit_no_further(tmp_path):
    read = read_weights(FIXTURES / "cls_released_v2.pth", in_chans=4)
    save_model(tmp_path / "four", read.variables(), read.config)
    with pytest.raises(CheckpointError, match="images of 4 channels: only weights for RGB"):
        read_weights(tmp_path / "four", in_chans=2)
