"""Detection checkpoints and pictures: recognised, converted there and back, run by the command."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import recipe
import torch_writer
from PIL import Image

from vmamba_jax import (
    MaskRCNN,
    create_backbone,
    create_detector,
    model_config,
    register_model,
)
from vmamba_jax.convert import CheckpointError, load_model, read_weights
from vmamba_jax.detection import InferenceConfig, MaskRCNNConfig

DATA = Path(__file__).parent / "data"
CLASSIFIER = DATA / "fixtures" / "cls_released_v2.pth"
with np.load(DATA / "golden_downstream" / "maskrcnn_small.npz") as arrays:
    META = json.loads(str(arrays["meta"]))
WEIGHTS = recipe.state_dict(META["shapes"], META["seed"])
CLASSES = [f"thing {i}" for i in range(5)]
NAME = "backbone_of_maskrcnn_small"
HEADS: dict[str, Any] = {
    "fpn_channels": 32,
    "rpn_channels": 24,
    "box_channels": 48,
    "mask_channels": 20,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """What mmengine's runner saves."""
    path = tmp_path_factory.mktemp("detector") / "epoch_12.pth"
    meta = {"epoch": 12, "dataset_meta": {"classes": tuple(CLASSES)}}
    torch_writer.save(path, {"meta": meta, "state_dict": WEIGHTS, "message_hub": {"log": [0.5]}})
    config = read_weights(path).config
    assert isinstance(config, MaskRCNNConfig)
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
    half = {k: a.astype(np.float16) if "fc_" in k else a for k, a in WEIGHTS.items()}
    torch_writer.save(tmp_path / "a.pth", {"state_dict": half})
    code, out, _ = run("convert", tmp_path / "a.pth", tmp_path / "model")
    assert code == 0
    assert "MaskRCNN on depths (1, 1, 2, 1), dims (16, 32, 64, 128)" in out
    config = load_model(tmp_path / "model").config
    assert isinstance(config, MaskRCNNConfig)
    assert config == read_weights(file).config
    assert run("convert", tmp_path / "model", tmp_path / "b.safetensors")[0] == 0
    back = read_weights(tmp_path / "b.safetensors").state_dict
    assert back.keys() == half.keys()
    for key, array in half.items():
        np.testing.assert_array_equal(back[key], array, strict=True, err_msg=key)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        ({"neck.fpn_convs.1.conv.bias": None}, "missing neck.fpn_convs.1.conv.bias"),
        ({"backbone.outnorm2.weight": None}, "missing backbone.outnorm2.weight"),
        ({"rpn_head.rpn_conv.weight": None}, "rpn_head.rpn_conv.weight is missing"),
        (
            {"roi_head.bbox_head.fc_cls.weight": np.zeros((5, 48), np.float32)},
            r"fc_cls.weight has shape \(5, 48\), expected \(6, 48\)",
        ),
        (
            {"rpn_head.rpn_cls.weight": np.zeros((9, 24, 1, 1), np.float32)},
            "it has 9 anchors at each position; only the three of ratios 0.5, 1.0, 2.0",
        ),
        (
            {"roi_head.mask_head.conv_logits.weight": np.zeros((0, 20, 1, 1), np.float32)},
            r"conv_logits.weight has shape \(0, 20, 1, 1\)",
        ),
        (
            {
                f"roi_head.mask_head.convs.{i}.conv.weight": np.zeros((1, 1), np.float32)
                for i in range(40)
            },
            "40 convolutions in its mask head",
        ),
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


def test_a_detector_is_made_of_its_own_file(file, caplog):
    _, variables = create_detector(NAME, pretrained=file, num_classes=5, **HEADS)
    kernel = variables["params"]["mask_head"]["upsample"]["kernel"]
    expected = WEIGHTS["roi_head.mask_head.upsample.weight"].transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(kernel, expected)
    _, variables = create_detector(NAME, pretrained=file, num_classes=3, **HEADS)
    assert "roi_head.bbox_head.fc_reg.bias, " in caplog.text
    heads = variables["params"]
    assert heads["bbox_head"]["fc_cls"]["kernel"].shape == (48, 4)
    assert heads["bbox_head"]["fc_reg"]["kernel"].shape == (48, 12)
    assert heads["mask_head"]["conv_logits"]["kernel"].shape == (1, 1, 20, 3)
    with pytest.raises(CheckpointError, match="its heads are not those asked for"):
        create_detector(NAME, pretrained=file, num_classes=5)


def test_a_backbone_is_made_of_a_detector_s(file):
    _, variables = create_backbone(NAME, pretrained=file)
    scale = variables["params"]["outnorm3"]["scale"]
    np.testing.assert_array_equal(scale, WEIGHTS["backbone.outnorm3.weight"])


def test_a_new_detector_takes_pictures_of_any_size():
    config = MaskRCNNConfig(model_config("vmamba_digits"), num_classes=2)
    model = MaskRCNN(config)
    variables = jax.eval_shape(lambda: create_detector("vmamba_digits", num_classes=2)[1])
    images = jax.ShapeDtypeStruct((2, 40, 56, 3), np.float32)
    sizes = jax.ShapeDtypeStruct((2, 2), np.int32)
    found = jax.eval_shape(model.apply, variables, images, sizes)
    assert found.boxes.shape == (2, 100, 4)
    assert found.masks.shape == (2, 100, 28, 28)


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match=r"score_threshold must be between 0 and 1, got 2\.0"):
        InferenceConfig(score_threshold=2.0)
    with pytest.raises(ValueError, match="max_detections must be positive, got 0"):
        InferenceConfig(max_detections=0)
    with pytest.raises(ValueError, match="must be positive: num_classes=0"):
        create_detector("vmamba_digits", num_classes=0)


def test_pictures_in_objects_out(file, run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 75, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    options = ("--checkpoint", file, "--long-side", "150", "--short-side", "120")
    code, out, err = run(
        "detect", tmp_path, *options, "--json", "--min-score", "0.2", "--save", tmp_path / "drawn"
    )
    assert code == 1
    assert "unreadable" in err
    good, bad = json.loads(out)
    assert bad["error"]
    assert good["size"] == [60, 75]
    assert good["instances"]
    for instance in good["instances"]:
        assert instance["name"] == f"thing {instance['label']}"
        assert 0.2 <= instance["score"] <= 1
        x1, y1, x2, y2 = instance["box"]
        assert 0 <= x1 <= x2 <= 75.01
        assert 0 <= y1 <= y2 <= 60.01
        assert sum(instance["segmentation"]["counts"]) == 60 * 75
    (drawn,) = (tmp_path / "drawn").iterdir()
    with Image.open(drawn) as picture:
        assert picture.size == (75, 60)
        assert np.any(np.asarray(picture) != pixels)
    # The data set whose truth is each picture's likeliest detection: all of it is found first.
    write_coco(tmp_path, good)
    code, out, _ = run("coco-eval", tmp_path, *options, "--split", "s", "--record", tmp_path / "r")
    assert code == 0
    assert [float(x) for x in out.split("box")[1].split()[1:8:2]][:1] == [100.0]


def write_coco(folder, result):
    (folder / "s").mkdir()
    (folder / "a.png").rename(folder / "s" / "a.png")
    best = max(result["instances"], key=lambda instance: instance["score"])
    x1, y1, x2, y2 = best["box"]
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": best["label"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": best["segmentation"],
    }
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 75}],
        "annotations": [annotation],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_s.json").write_text(json.dumps(truth))


def test_what_detect_can_t_do_is_said_in_one_line(file, run, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    for arguments, fault in (
        ((picture, "--checkpoint", CLASSIFIER), "run it with `vmamba-jax predict`"),
        ((picture, "--checkpoint", file, "--min-score", "2"), "must be between 0 and 1"),
        ((picture, "--checkpoint", file, "--long-side", "0"), "must be positive"),
        ((tmp_path / "none", "--checkpoint", tmp_path / "x.pth"), "x.pth"),
        ((picture, picture, "--checkpoint", file, "--save", "a.png"), "give --save a folder"),
        ((picture, "--checkpoint", file, "--save", "a.xyz"), "no picture format has that ending"),
        ((picture, "--checkpoint", file, "--save", picture), "is one of the images"),
    ):
        code, _, err = run("detect", *arguments)
        assert code == 1
        assert fault in err
        assert err.count("\n") == 1
    code, _, err = run("predict", picture, "--checkpoint", file)
    assert code == 1
    assert "run it with `vmamba-jax detect`" in err
    code, _, err = run("coco-eval", tmp_path, "--checkpoint", file)
    assert code == 1
    assert "instances_val2017.json: can't be read: No such file" in err
