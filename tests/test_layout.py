"""The one VMamba in a checkpoint is found whatever program saved it, or the choice is shown."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
import torch_writer

from vmamba_jax import VSSM
from vmamba_jax.convert import CheckpointError, Opaque, load_torch_file, read_weights
from vmamba_jax.convert.hugging_face import load_port
from vmamba_jax.convert.layout import find_weights

DATA = Path(__file__).parent / "data"
MORE = DATA / "fixtures" / "more"
IMAGES = jnp.asarray(recipe.images((2, 3, 40, 48), 7).transpose(0, 2, 3, 1))
NAMES = ("patch_embed.0.weight", "layers.0.blocks.0.norm.weight", "classifier.head.bias")


@functools.cache
def golden(name: str) -> tuple[dict, dict]:
    with np.load(DATA / "golden_small" / f"{name}.npz") as arrays:
        return json.loads(str(arrays["meta"])), {key: arrays[key] for key in arrays.files}


@functools.cache  # most files here hold one architecture: compiled once
def forward(config):
    return jax.jit(VSSM(config).apply)


def vmamba(prefix: str = "", value: float = 0.0) -> dict[str, np.ndarray]:
    """As much of a VMamba as it takes to be found."""
    return {prefix + name: np.full(2, value, np.float32) for name in NAMES}


def value_of(found) -> float:
    assert set(found.tensors) == set(NAMES)
    return found.tensors[NAMES[0]][0]


@pytest.mark.parametrize(
    ("file", "weights", "layout", "entry", "prefix", "averaged", "left_out"),
    [
        ("lightning.ckpt", "auto", "Lightning", "state_dict", "model.", False, "criterion.weight"),
        ("mmengine_ema_hook.pth", "ema", "mmengine", "state_dict", "backbone.", True, "optimizer"),
        ("timm_saver.pth.tar", "auto", "timm", "state_dict_ema", "", True, "state_dict"),
        ("timm_saver.pth.tar", "ema", "timm", "state_dict_ema", "", True, "arch"),
        ("deepspeed_module.pt", "model", "DeepSpeed", "module", "_orig_mod.", False, "ds_version"),
        ("flop_counter_buffers.pth", "auto", "training", "model", "", False, "total_ops"),
        (
            *("fsdp_and_activation_checkpoint_wrappers.pth", "auto", "training", "state_dict"),
            *("_fsdp_wrapped_module.", False, None),
        ),
    ],
)
def test_files_of_other_programs_give_the_golden_logits(
    file, weights, layout, entry, prefix, averaged, left_out
):
    read = read_weights(MORE / file, weights)
    _, expected = golden("v05_noz_ln2d")
    logits = forward(read.config)(read.variables(), IMAGES)
    np.testing.assert_allclose(np.asarray(logits), expected["logits"], rtol=0, atol=2e-5)
    about = read.provenance
    assert (about["layout"], about["weights"], about["prefix"]) == (layout, entry, prefix)
    assert about["averaged"] == averaged
    unused = [change.source for change in read.changes if change.action == "left out"]
    assert left_out in unused if left_out else not unused


@pytest.mark.parametrize(
    ("file", "prefix", "reference", "decoder"),
    [
        ("nnunet_encoder.pth", "vssm_encoder.", "v05_noz_ln2d", "decoder.stages.0.conv.weight"),
        ("vm_unet_best.pth", "vmunet.", "v0", "vmunet.layers_up.0.blocks.0.ln_1.weight"),
    ],
)
def test_a_segmenter_s_encoder_gives_the_golden_features(file, prefix, reference, decoder):
    read = read_weights(MORE / file)
    assert read.provenance["prefix"] == prefix
    assert read.config.num_classes == 0
    assert decoder in {change.source for change in read.changes if change.action == "left out"}
    features = functools.partial(VSSM(read.config).apply, out_indices=(0, 1), method="features")
    _, expected = golden(reference)
    for i, stage in enumerate(jax.jit(features)(read.variables(), IMAGES)):
        mean = np.asarray(stage).mean(axis=(1, 2))
        np.testing.assert_allclose(mean, expected[f"stage{i}_mean_hw"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("file", "key"),
    [("mmengine_ema_hook.pth", "ema_state_dict"), ("timm_saver.pth.tar", "state_dict")],
)
def test_the_weights_as_trained_are_not_the_average(file, key):
    read = read_weights(MORE / file, "model")
    assert (read.provenance["weights"], read.provenance["averaged"]) == (key, False)
    for name, array in read.state_dict.items():
        np.testing.assert_array_equal(array, recipe.weight(name, array.shape, 1007))


LIGHTNING_AVERAGE = {
    "state_dict": vmamba("model.", 2),
    "averaging_state": {"n_averaged": np.asarray(3)},
    "current_model_state": vmamba("model.", 1),
}
MMENGINE_AVERAGE = {
    "state_dict": vmamba("backbone.", 2),
    "ema_state_dict": {"steps": np.asarray(3), **vmamba("module.backbone.", 1)},
}


@pytest.mark.parametrize(
    "checkpoint",
    [
        LIGHTNING_AVERAGE,
        MMENGINE_AVERAGE,
        {"model": vmamba(value=1), "model_ema": vmamba(value=2)},
        {"params": vmamba(value=1), "params_ema": vmamba(value=2)},
        {"net": vmamba(value=1), "ema": {"n_averaged": np.asarray(1), **vmamba("module.", 2)}},
        {"model": {**vmamba("net.", 1), **vmamba("ema_net.module.", 2)}},
        {**vmamba("net.", 1), "mean.n_averaged": np.asarray(1), **vmamba("mean.module.", 2)},
    ],
)
def test_each_choice_of_weights_takes_the_right_set(checkpoint):
    assert value_of(find_weights(checkpoint, "model")) == 1
    assert value_of(find_weights(checkpoint, "ema")) == 2
    found = find_weights(checkpoint, "auto")
    assert (value_of(found), found.averaged) == (2, True)


@pytest.mark.parametrize("empty", [{}, None, {"module.backbone.a": np.zeros(3)}])
@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "params_ema", "ema"])
def test_an_empty_average_beside_good_weights_is_no_error(key, empty):
    found = find_weights({"state_dict": vmamba(), key: empty})
    assert (found.entry, found.averaged) == ("state_dict", False)
    with pytest.raises(CheckpointError, match=r"no averaged \(EMA\) weights"):
        find_weights({"state_dict": vmamba(), key: empty}, "ema")


@pytest.mark.parametrize("empty", [{}, None])
def test_without_weights_to_swap_with_the_state_dict_is_as_trained(empty):
    found = find_weights({"meta": {}, "state_dict": vmamba(), "ema_state_dict": empty})
    assert (found.entry, found.averaged) == ("state_dict", False)


def test_an_average_module_alone_is_an_average():
    found = find_weights({"n_averaged": np.asarray(4), **vmamba("module.", 2)})
    assert (found.averaged, found.prefix) == (True, "module.")
    assert found.left_out == {"n_averaged": "no part of a VMamba under 'module.'"}
    with pytest.raises(CheckpointError, match="no plain weights"):
        find_weights({"n_averaged": np.asarray(4), **vmamba("module.", 2)}, "model")


def test_two_sets_of_which_none_says_that_it_is_the_average_are_never_guessed():
    checkpoint = {"state_dict": vmamba(value=1), "ema_state_dict": vmamba(value=2)}
    for choice in ("auto", "ema", "model"):
        with pytest.raises(CheckpointError, match="--entry state_dict or --entry ema_state_dict"):
            find_weights(checkpoint, choice)
    assert value_of(find_weights(checkpoint, entry="ema_state_dict")) == 2


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.", "encoder."),
        *("vmamba.", "a.b.c.", "_fsdp_wrapped_module.model.", "vssm_encoder."),
    ],
)
@pytest.mark.parametrize(
    "entry", ["", "model", "state_dict", "net", "weights", "params", "module", "state/model"]
)
def test_a_vmamba_is_found_under_any_prefix_in_any_entry(prefix, entry):
    checkpoint = {**vmamba(prefix, 5), "loss.weight": np.zeros(3)}
    for key in reversed(entry.split("/") if entry else ()):
        checkpoint = {key: checkpoint, "epoch": 3}
    found = find_weights(checkpoint)
    assert value_of(found) == 5
    assert (found.entry, found.prefix) == (entry, prefix)
    assert "loss.weight" in found.left_out


def test_what_lies_beside_an_entry_is_left_out_at_every_depth():
    state = {"net": vmamba("module."), "teacher": vmamba(value=1), "step": 3}
    found = find_weights({"state": state, "epoch": 3, "more": vmamba()}, entry="state/net")
    another = "another set of weights; --weights or --entry chooses"
    assert found.left_out == {
        "epoch": "training state",
        "more": another,
        "state/teacher": another,
        "state/step": "training state",
    }
    assert found.sources[NAMES[0]] == f"module.{NAMES[0]}"
    found = find_weights({**vmamba(), "inner": {"net": vmamba(value=1)}}, entry="inner/net")
    assert set(found.left_out) == set(NAMES)


def test_the_report_has_the_names_of_the_file():
    port, wrapped = (
        MORE / "huggingface_folder",
        MORE / "fsdp_and_activation_checkpoint_wrappers.pth",
    )
    held = {port: load_port(port).tensors, wrapped: load_torch_file(wrapped)["state_dict"]}
    for path, tensors in held.items():
        assert {change.source for change in read_weights(path).changes} == tensors.keys()


def test_wrappers_are_dropped_inside_a_name():
    name = "layers._orig_mod.0._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.norm.weight"
    array = np.zeros(2)
    found = find_weights({"patch_embed.0.weight": array, name: array})
    assert set(found.tensors) == {"patch_embed.0.weight", "layers.0.blocks.0.norm.weight"}
    both = {"patch_embed.0.weight": array, name: array, "layers.0.blocks.0.norm.weight": array}
    with pytest.raises(CheckpointError, match=r"two of its tensors stand for layers\.0"):
        find_weights(both)


def test_two_candidates_are_shown_with_the_option_that_chooses():
    entries = {"student": vmamba(value=1), "teacher": vmamba(value=2)}
    with pytest.raises(CheckpointError, match=r"'student'.*'teacher'.*--entry"):
        find_weights(entries)
    assert value_of(find_weights(entries, entry="teacher")) == 2
    prefixes = {"model": {**vmamba("student.", 1), **vmamba("teacher.", 2)}}
    with pytest.raises(CheckpointError, match=r"'student\.'.*'teacher\.'.*--prefix"):
        find_weights(prefixes)
    assert value_of(find_weights(prefixes, prefix="teacher.")) == 2
    assert value_of(find_weights(prefixes, prefix="student")) == 1
    with pytest.raises(CheckpointError, match="no VMamba is under that entry or prefix"):
        find_weights(prefixes, entry="student")


def test_the_file_s_options_reach_the_search(tmp_path):
    meta, _ = golden("v05_noz_ln2d")
    state_dict = recipe.state_dict(meta["shapes"], 7)
    torch_writer.save(tmp_path / "a.pth", {"one": state_dict, "two": {"x": state_dict}})
    with pytest.raises(CheckpointError, match="--entry"):
        read_weights(tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth", entry="two/x").provenance["weights"] == "two/x"


@pytest.mark.parametrize(
    ("checkpoint", "fault"),
    [
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({"epoch": 3}, "its entries are: epoch"),
        ({"model": {}}, "no VMamba state dict"),
        ({"model": {"a": 3}}, "no VMamba state dict"),
        ({"model": Opaque("vmamba.VSSM")}, r"model \(an object of vmamba\.VSSM\)"),
        ({"model": {**vmamba(), "layers.0.blocks.0.x": 3}}, "no tensor but int"),
        (
            {"model": {**vmamba(), "layers.0.blocks.0.x": Opaque("builtins.eval")}},
            r"no tensor but builtins\.eval",
        ),
        (Opaque("vmamba.VSSM"), "whole pickled object"),
    ],
)
def test_a_checkpoint_without_weights_is_refused(checkpoint, fault):
    with pytest.raises(CheckpointError, match=fault):
        find_weights(checkpoint)


def test_a_checkpoint_that_holds_itself_is_searched_once():
    checkpoint: dict = {"model": vmamba()}
    checkpoint["self"] = checkpoint["model"]["self"] = checkpoint
    assert find_weights(checkpoint).entry == "model"
