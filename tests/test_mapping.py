"""PyTorch names and shapes, both ways, and the architecture inferred from them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from recipe import state_dict

from vmamba_jax import VMambaConfig, list_models, model_config
from vmamba_jax.convert import from_torch, infer_config, to_torch
from vmamba_jax.convert.mapping import weight_table

DATA = Path(__file__).parent / "data"
FILES = sorted([*DATA.glob("golden_small/*.npz"), *DATA.glob("golden_released/*.npz")])


def golden(path):
    meta = json.loads(str(np.load(path)["meta"]))
    return meta, VMambaConfig(**meta["config"])


@pytest.fixture(scope="module")
def small():
    meta, config = golden(next(p for p in FILES if p.stem == "v05_noz_ln2d"))
    return state_dict(meta["shapes"], seed=0), config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_name_shape_and_count_is_pytorchs(path):
    meta, config = golden(path)
    table = weight_table(config)
    expected = {k: tuple(v) for k, v in meta["shapes"].items() if "num_batches" not in k}
    assert {weight.key: weight.shape for weight in table} == expected
    assert meta["params"] == sum(
        int(np.prod(weight.shape)) for weight in table if weight.path[0] == "params"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_there_and_back_is_bit_exact(path):
    meta, config = golden(path)
    tensors = state_dict(meta["shapes"], seed=1)
    variables = from_torch(tensors, config)
    back = to_torch(variables, config)
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        if "num_batches" not in key:
            np.testing.assert_array_equal(back[key], tensor, strict=True)
    again = from_torch(back, config)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_architecture_is_inferred_from_names_and_shapes(path):
    meta, config = golden(path)
    tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in meta["shapes"].items()}
    inferred = infer_config(tensors)
    assert weight_table(inferred) == weight_table(config)
    for field in ("depths", "dims", "patch_size", "num_classes", "ssm_d_state", "ssm_ratio"):
        if field in ("ssm_d_state",) and config.ssm_ratio == 0:
            continue
        assert getattr(inferred, field) == getattr(config, field), field


@pytest.mark.parametrize("name", list_models("v*_vmamba_*") + list_models("vmamba_*_s*"))
def test_a_released_architecture_is_inferred_as_registered(name):
    config = model_config(name)
    shapes = {
        weight.key: np.broadcast_to(np.float32(0), weight.shape) for weight in weight_table(config)
    }
    # LayerNorm's two layouts and the training-only drop rate leave no trace.
    assert infer_config(shapes).replace(norm_layer="ln") == config.replace(
        norm_layer="ln", drop_path_rate=0.0
    )


def test_a_missing_key_is_named(small):
    tensors, config = small
    tensors = {k: v for k, v in tensors.items() if k != "layers.1.blocks.0.op.Ds"}
    with pytest.raises(ValueError, match=r"missing layers\.1\.blocks\.0\.op\.Ds$"):
        from_torch(tensors, config)


def test_an_extra_key_is_named(small):
    tensors, config = small
    with pytest.raises(ValueError, match=r"unexpected layers\.9\.weight$"):
        from_torch({**tensors, "layers.9.weight": np.zeros(3, np.float32)}, config)


def test_a_wrong_shape_is_named_with_both(small):
    tensors, config = small
    wrong = {**tensors, "classifier.head.weight": np.zeros((9, 32), np.float32)}
    with pytest.raises(
        ValueError, match=r"classifier\.head\.weight has shape \(9, 32\), expected \(10, 32\)"
    ):
        from_torch(wrong, config)


def test_a_tree_that_does_not_fit_is_refused(small):
    tensors, config = small
    variables = from_torch(tensors, config)
    head = variables["params"]["head"]
    for params, message in (
        (
            {**variables["params"], "extra": {"kernel": np.zeros(2)}},
            "unexpected params/extra/kernel",
        ),
        ({k: v for k, v in variables["params"].items() if k != "head"}, "missing params/head/"),
        (
            {**variables["params"], "head": {**head, "bias": np.zeros(3)}},
            r"head/bias has shape \(3,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            to_torch({"params": params}, config)
    with pytest.raises(ValueError, match="missing the collection 'params'"):
        to_torch({}, config)


def test_something_else_entirely_is_no_vmamba():
    with pytest.raises(ValueError, match="no VMamba state dict"):
        infer_config({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})
