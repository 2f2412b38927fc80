"""The segment command as a user meets it: labels, pictures, one clear line for each mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch_writer
from PIL import Image

from vmamba_jax import UPerNet
from vmamba_jax.convert import read_weights
from vmamba_jax.segmentation import Inference
from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.segmentation.inference import segment
from vmamba_jax.segmentation.picture import ade20k_classes, palette, shares

DATA = Path(__file__).parent / "data"
CLASSIFIER = DATA / "fixtures" / "cls_released_v2.pth"
CLASSES = [f"thing [{i}]" for i in range(7)]
SMALL = ("--scale", 96, 64)  # a size that other tests compile too


@pytest.fixture(scope="module")
def weights():
    with np.load(DATA / "golden_downstream" / "upernet_small.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
    return recipe.state_dict(meta["shapes"], meta["seed"])


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("segmenter") / "iter_160000.pth"
    torch_writer.save(path, {"meta": {"dataset_meta": {"classes": CLASSES}}, "state_dict": weights})
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        blocks = rng.integers(0, 256, (5, 8, 3), np.uint8).repeat(8, 0).repeat(9, 1)
        Image.fromarray(blocks).save(folder / name)
    return folder


def test_pixels_take_the_classes_of_the_model(run, checkpoint, photos, tmp_path):
    (photos / "b.jpg").write_bytes(b"no image")
    labels, pictures = tmp_path / "labels", tmp_path / "pictures"
    code, out, err = run(
        *("segment", photos, "--checkpoint", checkpoint, *SMALL, "--top", 2),
        *("--save", pictures, "--save-labels", labels),
    )
    assert code == 1
    assert err.count("unreadable: ") == 1
    assert "b.jpg" in err
    assert [p.name for p in labels.iterdir()] == ["a.labels.png"]
    assert [p.name for p in pictures.iterdir()] == ["a.png"]

    read = read_weights(checkpoint)
    assert isinstance(read.config, UPerNetConfig)
    image = Image.open(photos / "a.png").convert("RGB")
    model = UPerNet(read.config)
    expected = segment(model, read.variables(), image, Inference(scale=(96, 64)))
    assert expected.shape == (40, 72)
    with Image.open(labels / "a.labels.png") as file:
        assert file.mode == "L"
        np.testing.assert_array_equal(np.asarray(file), expected)
    (label, share), *_ = shares(expected)
    assert f"thing [{label}]" in out
    assert f"{share:.1%}" in out

    with Image.open(pictures / "a.png") as file:
        drawn = np.asarray(file)
    assert drawn.shape[1] > 72  # the legend
    colour = palette(7)[label]
    tinted = 0.45 * np.asarray(image, np.float32) + 0.55 * palette(7)[expected]
    np.testing.assert_allclose(drawn[:40, :72], tinted, atol=0.51)
    assert (drawn[:, 72:] == colour).all(axis=-1).sum() > 200


def test_a_file_of_another_task_is_one_line(run, photos, weights, tmp_path):
    backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
    heads = {
        "neck.lateral_convs.0.conv.weight": np.zeros((256, 16, 1, 1), np.float32),
        "rpn_head.rpn_conv.weight": np.zeros((256, 256, 3, 3), np.float32),
        "roi_head.bbox_head.fc_cls.weight": np.zeros((81, 1024), np.float32),
    }
    torch_writer.save(tmp_path / "detector.pth", {"state_dict": backbone | heads})
    for file in (CLASSIFIER, tmp_path / "detector.pth"):
        code, out, err = run("segment", photos, "--checkpoint", file)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("missing.jpg",), "unreadable: missing.jpg"),
        ((".",), "no images"),
        (("a.png", "b.png", "--save", "c.png"), "2 images don't fit one picture"),
        (("a.png", "--stride", 0, 3), "must be positive"),
        (("a.png", "--top", 0), "--top must be positive"),
        (("a.png", "--mode", "slide", "--stride", 513, 9), "stride can't exceed the crop size"),
        (("a.png", "--crop-size", 0, 8), "must be positive"),
        (("a.png", "--save", "c.txt"), "--save c.txt: no picture format has that ending"),
        (("a.png", "--save-labels", "c.jpg"), "label maps are written as .png"),
        (("a.png", "--save", "."), "a.png is one of the images"),
        (("a.png", "--save", "c.png", "--save-labels", "./c.png"), "name one file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_line(run, checkpoint, tmp_path, monkeypatch, arguments, fault):
    monkeypatch.chdir(tmp_path)
    if arguments != (".",):
        Image.new("RGB", (48, 32)).save("a.png")
    code, _, err = run("segment", *arguments, *SMALL, "--checkpoint", checkpoint)
    assert code == 1
    assert fault in err
    assert err.strip().count("\n") == 0


def test_the_packaged_classes_are_those_of_ade20k():
    names = ade20k_classes()
    assert len(names) == len(set(names)) == 150
    assert (names[0], names[12], names[149]) == ("wall", "person", "flag")
    colours = palette(150)
    assert colours[[0, 2, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [92, 0, 255]]
    # Roads and signboards look alike: 149 colours for 150 classes.
    assert len(np.unique(colours, axis=0)) == 149
