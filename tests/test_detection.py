"""Mask R-CNN against numbers that mmdetection computed in float32 on a CPU."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe import images, normal, state_dict

from vmamba_jax.convert import from_torch, infer_config, to_torch
from vmamba_jax.detection import InferenceConfig, MaskRCNN, MaskRCNNConfig
from vmamba_jax.detection.anchors import anchors_at, base_anchors
from vmamba_jax.detection.detect import instances_of
from vmamba_jax.detection.paste import paste_mask
from vmamba_jax.detection.preprocess import Prepared, normalise, pad
from vmamba_jax.detection.roi_align import roi_align, roi_level
from vmamba_jax.registry import model_config

DATA = Path(__file__).parent / "data" / "golden_downstream"


class Golden:
    """One golden file: the arrays, and the config, weights and input they were computed from."""

    def __init__(self, name):
        self.arrays = dict(np.load(DATA / f"{name}.npz"))
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.state_dict = state_dict(self.meta["shapes"], self.meta["seed"])
        self.config = infer_config(self.state_dict)
        self.variables = from_torch(self.state_dict, self.config)
        shape = self.meta["input_shape_nchw"]
        picture = images(shape, self.meta["seed"])[0].transpose(1, 2, 0)
        self.sizes = jnp.asarray([shape[2:]], jnp.int32)
        self.images = jnp.asarray(pad(picture, 32)[None])

    def __getitem__(self, key):
        return self.arrays[key]


@pytest.fixture(scope="module")
def small():
    return Golden("maskrcnn_small")


@pytest.fixture(scope="module")
def outputs(small):
    """Everything before the detections, of one compiled program."""
    return all_outputs(small)


def all_outputs(golden):
    model = MaskRCNN(golden.config)
    regions = jnp.asarray(golden["proposals"])[None]

    @jax.jit
    def run(variables, images, sizes):
        maps = model.apply(variables, images, method=lambda m, x: m.backbone(x))
        apply = partial(model.apply, variables)
        levels = apply(images, method="pyramid")
        return {
            "maps": maps,
            "levels": levels,
            "rpn": apply(levels, method="rpn_outputs"),
            "box": apply(levels, regions, method="box_outputs"),
            "mask": apply(levels, regions, method="mask_logits"),
            "proposals": apply(levels, sizes, method="proposals"),
        }

    return run(golden.variables, golden.images, golden.sizes)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def assert_like_summary(golden, name, actual):
    """A map (1, H, W, C) against the golden file's shape, means and root mean square of it."""
    assert actual.transpose(0, 3, 1, 2).shape == tuple(golden[f"{name}_shape"])
    assert_close(actual.mean(axis=(1, 2)), golden[f"{name}_mean_hw"])
    np.testing.assert_allclose(jnp.sqrt((actual**2).mean()), golden[f"{name}_rms"], rtol=1e-4)


def to_nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_maps_and_pyramid(small, outputs):
    for i, x in enumerate(outputs["maps"]):
        assert_like_summary(small, f"backbone{i}", x)
    for i, x in enumerate(outputs["levels"]):
        assert_like_summary(small, f"fpn{i}", x)
        if i:
            assert_close(to_nchw(x), small[f"fpn{i}"])
    assert_close(to_nchw(outputs["levels"][0])[:, :, ::2, ::2], small["fpn0_every2"])


def test_region_proposal_outputs(small, outputs):
    for i, (logits, deltas) in enumerate(zip(*outputs["rpn"], strict=True)):
        assert_close(to_nchw(logits), small[f"rpn_cls{i}"])
        assert_close(to_nchw(deltas), small[f"rpn_bbox{i}"])


def test_heads_on_given_regions(small, outputs):
    logits, deltas = outputs["box"]
    assert_close(logits[0], small["bbox_cls_score"])
    assert_close(deltas[0], small["bbox_bbox_pred"])
    masks = to_nchw(outputs["mask"][0])
    assert masks.shape == tuple(small["mask_logits_all_shape"])
    assert_close(masks[small["mask_rows"]], small["mask_logits"])
    assert_close(masks.mean(axis=(2, 3)), small["mask_logits_all_mean_hw"])
    rms = np.sqrt((masks**2).mean())
    np.testing.assert_allclose(rms, small["mask_logits_all_rms"], rtol=1e-4)


def test_features_of_given_regions(small, outputs):
    regions = jnp.asarray(small["proposals"])[None]
    maps, strides = outputs["levels"][:-1], small.config.strides[:-1]
    assert roi_level(regions[0], 4).tolist() == small["proposal_level"].tolist()
    for size, name, channels in ((7, "bbox_roi_feats_first4", 4), (14, "mask_roi_feats_first", 1)):
        features = roi_align(maps, regions, strides=strides, output_size=size)[0]
        assert_close(to_nchw(features)[:, :channels], small[name])


def test_anchors(small):
    config = small.config
    for stride, expected in zip(config.strides, small["base_anchors"], strict=True):
        base = base_anchors(stride, config.anchor_scale, config.anchor_ratios)
        assert_close(base, expected)
        # The second anchor of the third position in the second row of a map of width 5.
        (anchor,) = anchors_at(jnp.asarray([(5 + 2) * 3 + 1], jnp.int32), 5, stride, base)
        assert_close(anchor, expected[1] + np.array([2, 1, 2, 1], np.float32) * stride)


def matches(expected, actual, side):
    """For each expected (box, score, label) the actual one like it, or -1.

    Neighbours whose scores differ by rounding change places, so rows are compared as sets.
    """
    found = []
    for box, score, label in zip(*expected, strict=True):
        like = np.abs(actual[0] - box).max(axis=1) <= 1e-4 * side
        like &= (np.abs(actual[1] - score) <= 1e-4) & (actual[2] == label)
        found.append(int(np.flatnonzero(like)[0]) if like.any() else -1)
    return np.array(found)


def assert_mostly_matched(found, share):
    assert (found >= 0).mean() >= share
    assert len(set(found[found >= 0])) >= share * len(found)


def test_proposals(small, outputs):
    boxes, scores, filled = (np.asarray(array[0]) for array in outputs["proposals"])
    assert filled.all()
    assert np.all(np.diff(scores) <= 0)
    expected = small["rpn_proposals"], small["rpn_scores"]
    label = np.zeros(len(boxes))
    found = matches((*expected, label), (boxes, scores, label), 160)
    assert_mostly_matched(found, 0.99)


# The released thresholds at the original picture's size, and others at the network's.
@pytest.mark.parametrize("name", ["det", "det2"])
def test_detections_and_masks(small, outputs, name):
    inference, size = InferenceConfig(), (120, 150)
    original = (60, 75)
    if name == "det2":
        stated = small.meta["det2_rcnn_test_cfg"]
        inference = InferenceConfig(
            score_threshold=stated["score_thr"],
            iou_threshold=stated["nms"]["iou_threshold"],
            max_detections=stated["max_per_img"],
        )
        original = size
    model = MaskRCNN(small.config, inference)
    find = jax.jit(partial(model.apply, method="detections"))
    detections = find(small.variables, outputs["levels"], small.sizes)
    instances = instances_of(detections, 0, Prepared(np.asarray(small.images[0]), size, original))
    boxes = np.stack([instance.box for instance in instances])
    scores = np.array([instance.score for instance in instances])
    labels = np.array([instance.label for instance in instances])
    assert len(instances) == inference.max_detections
    assert np.all(np.diff(scores) <= 0)

    expected = tuple(small[f"{name}_{part}"] for part in ("bboxes", "scores", "labels"))
    found = matches(expected, (boxes, scores, labels), max(original))
    assert_mostly_matched(found, 0.98)
    masks = {i: instances[j].mask(original) for i, j in enumerate(found) if j >= 0}
    areas = small[f"{name}_mask_area"]
    assert max(abs(int(mask.sum()) - int(areas[i])) for i, mask in masks.items()) <= 3
    if name == "det":
        packed = small["det_masks_packed_first20"]
        first = np.unpackbits(packed, count=20 * np.prod(original)).reshape(20, *original)
        assert max((mask != first[i]).sum() for i, mask in masks.items() if i < 20) <= 3


def test_masks_are_pasted_at_the_pixels_centres(small):
    cells = 1 / (1 + np.exp(-normal("paste_masks", (3, 1, 28, 28), small.meta["seed"])[:, 0]))
    for mask, box, expected in zip(cells, small["paste_boxes"], small["pasted"], strict=True):
        pasted = paste_mask(mask.astype(np.float32), box, *expected.shape)
        np.testing.assert_allclose(pasted, expected, atol=1e-5, rtol=0)


def test_pictures_are_normalised_and_padded(small):
    rgb = small["raw_bgr_uint8_chw"][::-1].transpose(1, 2, 0)
    assert_close(pad(normalise(rgb), 32), small["preprocessed"][0].transpose(1, 2, 0))


def test_weights_go_back_bit_for_bit(small):
    back = to_torch(small.variables, small.config)
    assert set(back) == set(small.state_dict)
    for key, array in small.state_dict.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.exhaustive
def test_the_released_architecture():
    golden = Golden("maskrcnn_vmamba_tiny_s1l8")
    assert set(to_torch(golden.variables, golden.config)) == set(golden.meta["shapes"])
    backbone = model_config("vmamba_tiny_s1l8").replace(num_classes=0, drop_path_rate=0.0)
    assert golden.config == MaskRCNNConfig(backbone)
    outputs = all_outputs(golden)
    for i, x in enumerate(outputs["maps"]):
        assert_like_summary(golden, f"backbone{i}", x)
    for i, x in enumerate(outputs["levels"]):
        assert_like_summary(golden, f"fpn{i}", x)
    for i, (logits, deltas) in enumerate(zip(*outputs["rpn"], strict=True)):
        assert_like_summary(golden, f"rpn_cls{i}", logits)
        assert_like_summary(golden, f"rpn_bbox{i}", deltas)
    logits, deltas = outputs["box"]
    heads = {"bbox_cls_score": logits[0], "bbox_bbox_pred": deltas[0]}
    heads["mask_logits"] = to_nchw(outputs["mask"][0])
    for name, output in heads.items():
        actual = np.asarray(output)
        assert actual.shape == tuple(golden[f"{name}_shape"])
        sample = actual.ravel()[golden[f"{name}_sample_index"]]
        assert_close(sample, golden[f"{name}_sample"])
        np.testing.assert_allclose(np.sqrt((actual**2).mean()), golden[f"{name}_rms"], rtol=1e-4)


@pytest.mark.parity
def test_another_picture_by_plain_pytorch(small):
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    import torch_mask_rcnn  # noqa: PLC0415

    height, width = 90, 220
    picture = pad(images((1, 3, height, width), 1)[0].transpose(1, 2, 0), 32)[None]
    sizes = jnp.asarray([[height, width]], jnp.int32)
    model = MaskRCNN(small.config)
    found = jax.jit(model.apply)(small.variables, jnp.asarray(picture), sizes)
    state = {key: torch.from_numpy(array) for key, array in small.state_dict.items()}
    with torch.inference_mode():
        image = torch.from_numpy(to_nchw(picture))
        expected = [x.numpy() for x in torch_mask_rcnn.detect(state, image, (height, width))]
    boxes, scores, labels, masks = (np.asarray(x[0])[np.asarray(found.found[0])] for x in found[:4])
    like = matches(expected[:3], (boxes, scores, labels), width)
    assert_mostly_matched(like, 0.98)
    assert_close(masks[like[like >= 0]], expected[3][like >= 0])
