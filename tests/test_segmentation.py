"""UPerNet against numbers computed by mmsegmentation in float32 on a CPU."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe import images, state_dict

from vmamba_jax.convert import from_torch, infer_config, to_torch
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.segmentation.loss import pixel_cross_entropy, segmentation_loss
from vmamba_jax.segmentation.upernet import SegmenterLogits, UPerNet, resize

GOLDENS = Path(__file__).parent / "data" / "golden_downstream"


class Golden:
    """One golden file: the arrays, and the network, weights and input they were computed from."""

    def __init__(self, name):
        self.arrays = dict(np.load(GOLDENS / f"{name}.npz"))
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.state_dict = state_dict(self.meta["shapes"], self.meta["seed"])
        config = infer_config(self.state_dict)
        assert isinstance(config, UPerNetConfig)
        self.config = config
        nchw = images(self.meta["input_shape_nchw"], self.meta["seed"])
        self.images = jnp.asarray(nchw.transpose(0, 2, 3, 1))

    def __getitem__(self, key):
        return self.arrays[key]

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


@pytest.mark.parametrize("name", [SMALL, FULL])
def test_names_and_shapes_are_mmsegmentations_and_back_is_bit_exact(name):
    file = golden(name)
    expected = {k: tuple(v) for k, v in file.meta["shapes"].items() if "num_batches" not in k}
    assert {weight.key: weight.shape for weight in weight_table(file.config)} == expected
    back = to_torch(from_torch(file.state_dict, file.config), file.config)
    assert back.keys() == file.state_dict.keys()
    for key, array in back.items():
        if "num_batches" not in key:
            np.testing.assert_array_equal(array, file.state_dict[key], strict=True)


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
