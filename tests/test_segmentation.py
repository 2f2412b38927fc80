"""UPerNet against numbers computed by mmsegmentation in float32 on a CPU."""

import json
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from recipe import images, state_dict

from vmamba_jax.convert import from_torch, infer_config, to_torch
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from vmamba_jax.segmentation import create_segmenter, inference
from vmamba_jax.segmentation.config import Inference, UPerNetConfig
from vmamba_jax.segmentation.loss import pixel_cross_entropy, segmentation_loss
from vmamba_jax.segmentation.upernet import SegmenterLogits, UPerNet, adaptive_average, resize

GOLDENS = Path(__file__).parent / "data" / "golden_downstream"


class Golden:
    """One golden file: the arrays, and the network, weights and input they were computed from."""

    def __init__(self, name):
        self.arrays = dict(np.load(GOLDENS / f"{name}.npz"))
        self.meta = json.loads(str(self.arrays.pop("meta")))
        shapes = self.meta["shapes"].items()
        config = infer_config({k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes})
        assert isinstance(config, UPerNetConfig)
        self.config = config
        nchw = images(self.meta["input_shape_nchw"], self.meta["seed"])
        self.images = jnp.asarray(nchw.transpose(0, 2, 3, 1))

    def __getitem__(self, key):
        return self.arrays[key]

    @cached_property
    def state_dict(self):
        return state_dict(self.meta["shapes"], self.meta["seed"])

    @cache  # noqa: B019
    def run(self):
        """The logits, and every module's output by its name."""
        model = UPerNet(self.config)

        @jax.jit
        def apply(variables, images):
            return model.apply(variables, images, capture_intermediates=True)

        variables = from_torch(self.state_dict, self.config)
        logits, state = apply(variables, self.images)
        return logits, state["intermediates"]


SMALL, FULL = "upernet_small", "upernet_vmamba_tiny_s1l8"


@cache
def golden(name):
    return Golden(name)


def summaries(seen):
    """Module outputs under the golden file's names."""
    decode = seen["decode_head"]
    modules = {f"backbone{i}": seen["backbone"][f"outnorm{i}"] for i in range(4)}
    modules |= {f"lateral{i}": decode[f"lateral_convs_{i}"] for i in range(3)}
    modules |= {f"ppm{i}": decode[f"psp_modules_{i}"] for i in range(4)}
    modules |= {f"fpn{i}": decode[f"fpn_convs_{i}"] for i in range(3)}
    modules |= {
        "ppm_conv_cat": decode["bottleneck"],
        "fpn_bottleneck": decode["fpn_bottleneck"],
        "aux_convs": seen["auxiliary_head"]["convs_0"],
    }
    return {name: np.asarray(module["__call__"][0]) for name, module in modules.items()}


def assert_summary(golden, name, x):
    assert x.transpose(0, 3, 1, 2).shape == tuple(golden[f"{name}_shape"]), name
    mean = x.mean(axis=(1, 2))
    np.testing.assert_allclose(mean, golden[f"{name}_mean_hw"], atol=1e-4, rtol=0, err_msg=name)
    rms = np.sqrt((x.astype(np.float64) ** 2).mean())
    assert abs(rms - golden[f"{name}_rms"]) < 1e-4, name


@pytest.mark.parametrize("name", [SMALL, pytest.param(FULL, marks=pytest.mark.exhaustive)])
def test_every_map_and_both_heads_equal_mmsegmentation(name):
    file = golden(name)
    logits, seen = file.run()
    for key, x in summaries(seen).items():
        assert_summary(file, key, x)
    for key, x in (("decode_logits", logits.decode), ("aux_logits", logits.auxiliary)):
        nchw = np.asarray(x).transpose(0, 3, 1, 2)
        if key in file.arrays:
            np.testing.assert_allclose(nchw, file[key], atol=1e-4, rtol=0)
        else:  # the larger file keeps a sample
            assert_summary(file, key, np.asarray(x))
            sample = nchw.ravel()[file[f"{key}_sample_index"]]
            np.testing.assert_allclose(sample, file[f"{key}_sample"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [SMALL, pytest.param(FULL, marks=pytest.mark.exhaustive)])
def test_names_and_shapes_are_mmsegmentations_and_back_is_bit_exact(name):
    file = golden(name)
    expected = {k: tuple(v) for k, v in file.meta["shapes"].items() if "num_batches" not in k}
    assert {weight.key: weight.shape for weight in weight_table(file.config)} == expected
    back = to_torch(from_torch(file.state_dict, file.config), file.config)
    assert back.keys() == file.state_dict.keys()
    for key, array in back.items():
        if "num_batches" not in key:
            np.testing.assert_array_equal(array, file.state_dict[key], strict=True)


@pytest.mark.parity
def test_another_picture_by_plain_pytorch():
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    import torch_upernet  # noqa: PLC0415

    file = golden(SMALL)
    nchw = images((1, 3, 70, 103), 1)
    logits = jax.jit(UPerNet(file.config).apply)(
        from_torch(file.state_dict, file.config), jnp.asarray(nchw.transpose(0, 2, 3, 1))
    )
    state = {key: torch.from_numpy(array) for key, array in file.state_dict.items()}
    with torch.inference_mode():
        expected = torch_upernet.segment(state, torch.from_numpy(nchw)).numpy()
    actual = np.asarray(resize(logits.decode, (70, 103))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [SMALL, FULL])
def test_the_architecture_is_inferred_from_names_and_shapes(name):
    file = golden(name)
    decode, auxiliary = (file.meta["config"][f"{head}_head"] for head in ("decode", "auxiliary"))
    assert file.config == UPerNetConfig(
        backbone=file.config.backbone,
        num_classes=decode["num_classes"],
        channels=decode["channels"],
        auxiliary_channels=auxiliary["channels"],
        pool_scales=decode["pool_scales"],
        dropout=decode["dropout_ratio"],
    )
    backbone = file.meta["config"]["backbone"]
    for field in ("ssm_d_state", "ssm_ratio", "mlp_ratio", "downsample_version", "forward_type"):
        assert getattr(file.config.backbone, field) == backbone[field], field
    assert list(file.config.depths) == backbone["depths"]
    assert file.config.backbone.stage_dims[0] == backbone["dims"]


def test_the_losses_are_mmsegmentations():
    file = golden(SMALL)
    logits, _ = file.run()
    labels = jnp.asarray(file["labels"], jnp.int32)[None]
    assert (labels == 255).any()
    decode = pixel_cross_entropy(logits.decode, labels)
    np.testing.assert_allclose(decode, file["decode_loss_ce"], atol=1e-4, rtol=0)
    auxiliary = 0.4 * pixel_cross_entropy(logits.auxiliary, labels)
    np.testing.assert_allclose(auxiliary, file["aux_loss_ce"], atol=1e-4, rtol=0)
    for head, name in ((logits.decode, "decode"), (logits.auxiliary, "aux")):
        right = jnp.argmax(resize(head, (64, 96)), axis=-1) == labels
        accuracy = 100 * right.sum() / (labels != 255).sum()
        np.testing.assert_allclose(accuracy, file[f"{name}_acc_seg"][0], atol=0.05)
    total = segmentation_loss(logits, labels)
    np.testing.assert_allclose(total, decode + auxiliary, rtol=1e-6)
    np.testing.assert_allclose(
        segmentation_loss(SegmenterLogits(logits.decode, None), labels), decode, rtol=1e-6
    )


def test_logits_resized_to_the_image_are_mmsegmentations():
    file = golden(SMALL)
    logits, _ = file.run()
    resized = np.asarray(resize(logits.decode, (64, 96))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(resized, file["decode_logits_resized"], atol=1e-4, rtol=0)


def test_preprocessing_is_mmsegmentations():
    file = golden(SMALL)
    rgb = np.ascontiguousarray(file["raw_bgr_uint8_chw"][::-1].transpose(1, 2, 0))
    pixels = normalize(Image.fromarray(rgb), IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), file["preprocessed"][0], atol=1e-5)


def weights_of(file):
    model = UPerNet(file.config)
    return model, jax.tree.map(jnp.asarray, from_torch(file.state_dict, file.config))


def test_a_whole_image_is_classified_as_by_mmsegmentation():
    file = golden(SMALL)
    logits, _ = file.run()
    labels = inference.argmax_resized(logits.decode[0], ((64, 96), (50, 75)))
    assert (labels != file["whole_pred_ori"]).mean() < 1e-3
    rows, columns = inference.resizing(16, [64, 50]), inference.resizing(24, [96, 75])
    means = np.einsum("rh,hwc,vw->c", rows, logits.decode[0], columns) / (50 * 75)
    np.testing.assert_allclose(means, file["whole_logits_ori_mean_hw"], atol=1e-4, rtol=0)


def test_a_sliding_window_averages_as_mmsegmentation_does():
    file = golden(SMALL)
    pixels, seen = np.asarray(file.images[0]), []
    crop, stride = (tuple(file.meta["slide"][key]) for key in ("crop_size", "stride"))
    window = partial(inference.window_logits, *weights_of(file))
    logits = inference.slide(window, pixels, 7, crop, stride, lambda *now: seen.append(now))
    nchw = logits.transpose(2, 0, 1)[None]
    expected = file["slide_logits_every4"]
    np.testing.assert_allclose(nchw[:, :, ::4, ::4], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(nchw.mean((2, 3)), file["slide_logits_mean_hw"], atol=1e-4, rtol=0)
    how = Inference("slide", crop_size=crop, stride=stride)
    labels = inference.segment_pixels(*weights_of(file), pixels, (64, 96), how)
    assert (labels != file["slide_pred"]).mean() < 1e-3
    assert seen == [(i, 6) for i in range(1, 7)]


def test_windows_cover_an_image_and_end_with_it():
    ones = np.ones((40, 70, 3), np.float32)
    shown = []

    def window_logits(pixels):
        shown.append(pixels.shape)
        return np.broadcast_to(np.float32(len(shown)), (*pixels.shape[1:3], 1))

    logits = inference.slide(window_logits, ones, 1, (48, 32), (24, 20))
    # Below the window's height there is one row of windows; columns start at 0, 20 and 70 - 32.
    assert shown == [(1, 40, 32, 3)] * 3
    assert logits[0, :, 0].tolist() == [1] * 20 + [1.5] * 12 + [2] * 6 + [2.5] * 14 + [3] * 18


def test_classes_are_found_a_band_at_a_time_as_from_all_logits():
    logits = np.random.default_rng(0).normal(size=(9, 13, 4)).astype(np.float32)
    sizes = ((71, 50), (97, 40))
    whole = jnp.asarray(logits)[None]
    for size in sizes:
        whole = resize(whole, size)
    labels = inference.argmax_resized(logits, sizes)
    assert labels.shape == sizes[-1]
    assert (labels == np.argmax(whole[0], axis=-1)).mean() > 0.999


@pytest.mark.parametrize(("height", "width", "side"), [(2, 3, 6), (7, 6, 3), (5, 4, 1)])
def test_pooling_bins_overlap_where_they_do_not_divide_the_map(height, width, side):
    x = np.random.default_rng(1).normal(size=(1, height, width, 2)).astype(np.float32)
    pooled = adaptive_average(jnp.asarray(x), side)
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            expected = x[0, rows, columns].mean(axis=(0, 1))
            np.testing.assert_allclose(pooled[0, i, j], expected, atol=1e-6)


def test_the_loss_divides_by_all_pixels_and_ignores_some():
    logits = jnp.zeros((1, 2, 2, 4), jnp.float32)
    labels = jnp.asarray([[[0, 1, 255, 255]] * 4], jnp.int32)
    np.testing.assert_allclose(pixel_cross_entropy(logits, labels), np.log(4) / 2, rtol=1e-6)
    nothing = jnp.full((1, 4, 4), 255, jnp.int32)
    value, slope = jax.value_and_grad(pixel_cross_entropy)(logits, nothing)
    assert value == 0
    assert not slope.any()


def test_the_gradient_of_the_loss_is_its_slope_and_training_learns_statistics():
    model, variables = create_segmenter(
        *("vmamba_digits",), num_classes=3, channels=8, auxiliary_channels=4, pool_scales=(2, 3),
        depths=(1, 1), drop_path_rate=0.0,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.normal(size=(2, 24, 24, 3)), jnp.float32)
    labels = jnp.asarray(rng.choice([0, 1, 2, 255], size=(2, 24, 24)), jnp.int32)
    params, statistics = variables["params"], variables["batch_stats"]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        logits, state = model.apply(
            {"params": params, "batch_stats": statistics}, images, train=True,
            rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"],
        )  # fmt: skip
        return segmentation_loss(logits, labels), state["batch_stats"]

    (_, state), slope = loss(params)
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(slope)]
    assert all(np.isfinite(squares))
    # Along the gradient itself the loss changes most, and its slope there is the gradient's norm.
    norm = float(np.sqrt(sum(squares)))
    step = 1e-3 / norm
    ahead, behind = (
        loss(jax.tree.map(lambda p, s, by=by: p + jnp.float32(by) * s, params, slope))[0][0]
        for by in (step, -step)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-3, norm, rtol=1e-2)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state, statistics)
    assert all(jax.tree.leaves(moved))


def test_images_that_do_not_fit_are_refused():
    model = UPerNet(golden(SMALL).config)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    )
    for shape, dtype, fault in (
        ((1, 32, 32, 3), jnp.uint8, "normalised floats"),
        ((1, 3, 32, 32), jnp.float32, "channels last"),
    ):
        with pytest.raises(ValueError, match=fault):
            jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct(shape, dtype))
    with pytest.raises(ValueError, match="must be positive"):
        Inference(stride=(0, 1))
    with pytest.raises(ValueError, match="windows of 48 x 32 every 48 x 33 pixels leave gaps"):
        Inference("slide", crop_size=(48, 32), stride=(48, 33))


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("num_classes", 0, "num_classes must be positive"),
        ("channels", 0, "channels must be positive"),
        ("auxiliary_channels", -1, "auxiliary_channels"),
        ("pool_scales", (), "pool_scales"),
        ("dropout", 1.0, "dropout must lie"),
        ("depth", 1, "unknown config field 'depth'"),
    ],
)
def test_impossible_segmenters_are_refused(field, value, fault):
    with pytest.raises(ValueError, match=fault):
        golden(SMALL).config.replace(**{field: value})
