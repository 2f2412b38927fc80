"""Segmentation checkpoints: recognised, read to the last key, converted there and back."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
import recipe
import torch_writer

from vmamba_jax import UPerNet, create_model, create_segmenter, register_model
from vmamba_jax.convert import CheckpointError, load_model, load_torch_file, read_weights
from vmamba_jax.segmentation.config import UPerNetConfig

DATA = Path(__file__).parent / "data"
CLASSIFIER = DATA / "fixtures" / "cls_released_v2.pth"
OTHER_HEAD = DATA / "fixtures" / "mmseg_raw_with_message_hub.pth"
with np.load(DATA / "golden_downstream" / "upernet_small.npz") as arrays:
    META = json.loads(str(arrays["meta"]))
WEIGHTS = recipe.state_dict(META["shapes"], META["seed"])
CLASSES = [f"thing {i}" for i in range(7)]
NAME = "backbone_of_upernet_small"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """What mmengine's runner saves."""
    path = tmp_path_factory.mktemp("segmenter") / "iter_160000.pth"
    meta = {"epoch": 1, "dataset_meta": {"classes": tuple(CLASSES), "palette": [[1, 2, 3]] * 7}}
    torch_writer.save(path, {"meta": meta, "state_dict": WEIGHTS, "message_hub": {"log": [0.5]}})
    config = read_weights(path).config
    assert isinstance(config, UPerNetConfig)
    register_model(NAME, config.backbone)
    return path


def test_every_key_is_used_or_listed_with_a_reason(file):
    read = read_weights(file)
    assert read.class_names == CLASSES
    assert read.state_dict.keys() == WEIGHTS.keys()
    unused = {change.source: change.why for change in read.changes if change.action == "left out"}
    assert unused == {"meta": "training state", "message_hub": "training state"}
    used = [change.target for change in read.changes if change.target]
    assert sorted(used) == sorted(WEIGHTS)


def test_a_folder_gives_the_file_back_bit_for_bit(file, run, tmp_path):
    counts = {k: np.asarray(i) for i, k in enumerate(WEIGHTS) if "num_batches" in k}
    half = {
        k: array.astype(np.float16) if "conv_seg" in k else array for k, array in WEIGHTS.items()
    }
    torch_writer.save(tmp_path / "a.pth", {"state_dict": half | counts})
    code, out, _ = run("convert", tmp_path / "a.pth", tmp_path / "model")
    assert code == 0
    assert "UPerNet on depths (1, 1, 2, 1), dims (16, 32, 64, 128)" in out
    assert isinstance(load_model(tmp_path / "model").config, UPerNetConfig)
    assert run("convert", tmp_path / "model", tmp_path / "b.safetensors")[0] == 0
    back = read_weights(tmp_path / "b.safetensors").state_dict
    assert back.keys() == WEIGHTS.keys()
    for key, array in (half | counts).items():
        np.testing.assert_array_equal(back[key], array, strict=True, err_msg=key)


def test_wrappers_and_prefixes_around_a_segmenter_are_seen_through(tmp_path):
    wrapped = {f"module.model.{key}": array for key, array in WEIGHTS.items()}
    loss = {"module.loss.weight": np.ones(3, np.float32)}
    torch_writer.save(tmp_path / "a.pth", {"state_dict": wrapped | loss})
    read = read_weights(tmp_path / "a.pth")
    assert read.state_dict.keys() == WEIGHTS.keys()
    assert read.provenance["prefix"] == "module.model.backbone."
    assert [c.source for c in read.changes if c.action == "left out"] == ["module.loss.weight"]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        ({"decode_head.bottleneck.bn.weight": None}, "missing decode_head.bottleneck.bn.weight"),
        ({"backbone.outnorm2.weight": None}, r"missing backbone.outnorm2.weight"),
        (
            {"decode_head.fpn_convs.3.conv.weight": np.zeros((32, 32, 3, 3), np.float32)},
            "unexpected decode_head.fpn_convs.3.conv.weight",
        ),
        (
            {"auxiliary_head.convs.0.conv.weight": np.zeros((16, 32, 3, 3), np.float32)},
            r"convs.0.conv.weight has shape \(16, 32, 3, 3\), expected \(16, 64, 3, 3\)",
        ),
        (
            {"decode_head.psp_modules.4.1.conv.weight": np.zeros((32, 128, 1, 1), np.float32)},
            "its 5 pooled maps are not the four",
        ),
        ({"decode_head.conv_seg.weight": np.zeros((7, 32), np.float32)}, r"has shape \(7, 32\)"),
    ],
    ids=lambda value: str(next(iter(value)))[:40] if isinstance(value, dict) else None,
)
def test_a_file_that_is_not_quite_one_is_named_with_its_fault(tmp_path, edit, fault):
    weights = {k: a for k, a in (WEIGHTS | edit).items() if a is not None}
    torch_writer.save(tmp_path / "a.pth", {"state_dict": weights})
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_weights(tmp_path / "a.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'}: ")
    assert "\n" not in str(caught.value)


def test_what_only_a_classifier_has_is_left_out_with_a_reason(tmp_path):
    more = {
        "backbone.pos_embed": np.zeros((1, 16, 8, 8), np.float32),
        "backbone.classifier.norm.weight": np.zeros(128, np.float32),
    }
    torch_writer.save(tmp_path / "a.pth", WEIGHTS | more)
    read = read_weights(tmp_path / "a.pth")
    left_out = {change.source: change.why for change in read.changes if change.action == "left out"}
    assert left_out == {
        "backbone.pos_embed": "a backbone applies no position embedding",
        "backbone.classifier.norm.weight": "a backbone has no classifier",
    }


def test_a_segmenter_without_an_auxiliary_head_is_one(tmp_path):
    weights = {k: a for k, a in WEIGHTS.items() if not k.startswith("auxiliary_head.")}
    torch_writer.save(tmp_path / "a.pth", weights)
    config = read_weights(tmp_path / "a.pth").config
    assert isinstance(config, UPerNetConfig)
    assert config.auxiliary_channels == 0


def test_a_segmenter_is_made_of_its_own_file(file):
    model, variables = create_segmenter(
        NAME, pretrained=file, num_classes=7, channels=32, auxiliary_channels=16
    )
    assert isinstance(model, UPerNet)
    kernel = variables["params"]["decode_head"]["conv_seg"]["kernel"]
    expected = WEIGHTS["decode_head.conv_seg.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


def test_last_layers_for_other_classes_start_anew_and_that_is_said(file, caplog):
    _, variables = create_segmenter(
        NAME, pretrained=file, num_classes=3, channels=32, auxiliary_channels=16
    )
    assert "auxiliary_head.conv_seg.bias start anew" in caplog.text
    assert read_weights(file, num_classes=3).class_names is None
    for head, features in (("decode_head", 32), ("auxiliary_head", 16)):
        kernel = variables["params"][head]["conv_seg"]["kernel"]
        assert kernel.shape == (1, 1, features, 3)
        assert 0.005 < np.std(kernel) < 0.02


def test_a_classifier_s_file_fills_a_segmenter_s_backbone(caplog):
    register_model("segmenter_of_a_classifier", read_weights(CLASSIFIER).config)  # pyright: ignore[reportArgumentType]
    with caplog.at_level(logging.WARNING):
        model, variables = create_segmenter(
            "segmenter_of_a_classifier", pretrained=CLASSIFIER, num_classes=2, channels=8
        )
    assert "it has no heads of a segmenter (UPerNet); they start anew" in caplog.text
    assert "it has no outnorm0, outnorm1; they start anew" in caplog.text
    file = load_torch_file(CLASSIFIER)["model"]
    op = variables["params"]["backbone"]["layers_1_blocks_0"]["op"]
    np.testing.assert_array_equal(
        op["out_proj"]["kernel"], file["layers.1.blocks.0.op.out_proj.weight"].T
    )
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    assert jax.eval_shape(model.apply, variables, images).decode.shape == (1, 8, 8, 2)


def test_a_classifier_is_made_of_a_segmenter_s_backbone(file):
    _, variables = create_model(NAME, pretrained=file, num_classes=0)
    stem = variables["params"]["patch_embed"]["conv1"]["bias"]
    np.testing.assert_array_equal(stem, WEIGHTS["backbone.patch_embed.0.bias"])


def test_other_heads_and_architectures_are_named(file):
    with pytest.raises(CheckpointError, match="its heads are not those asked for"):
        create_segmenter(NAME, pretrained=file, num_classes=7)
    with pytest.raises(CheckpointError, match="another architecture than vmamba_tiny_s1l8"):
        create_segmenter(
            "vmamba_tiny_s1l8", pretrained=file, num_classes=7, channels=32, auxiliary_channels=16
        )
    with pytest.raises(ValueError, match="unknown config field 'chanels'"):
        create_segmenter(NAME, chanels=3)


def test_a_segmenter_is_no_classifier_and_no_port(file, run, tmp_path):
    code, _, err = run("predict", tmp_path / "a.png", "--checkpoint", file)
    assert code == 1
    assert "vmamba-jax segment" in err
    code, _, err = run("convert", file, tmp_path / "port", "--to", "huggingface")
    assert code == 1
    assert "has only classifiers" in err
    assert err.count("\n") == 1
