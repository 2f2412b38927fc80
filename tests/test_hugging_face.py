"""Folders of the Hugging Face port: read to the golden's logits, written back bit for bit."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
import torch_writer

from vmamba_jax import VSSM, VMambaConfig, model_config
from vmamba_jax.convert import CheckpointError, read_weights
from vmamba_jax.convert.export import save_safetensors
from vmamba_jax.convert.hugging_face import one_rank_note, save_port
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.convert.naming import hugging_face_name, standard_names
from vmamba_jax.convert.pretrained import RELEASES
from vmamba_jax.convert.safetensors_file import load_safetensors

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "fixtures" / "more" / "huggingface_folder"
RELEASED = DATA / "fixtures" / "cls_released_v2.pth"
NAMES = [f"name {i}" for i in range(10)]


@pytest.fixture
def shards(tmp_path) -> Path:
    """The folder's model in two files and an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(FOLDER / "config.json", folder)
    tensors = load_safetensors(FOLDER / "model.safetensors")
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_safetensors(
            folder / shard,
            {name: np.asarray(tensors[name]) for name in tensors if weight_map[name] == shard},
        )
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_folder_gives_the_golden_logits_and_its_class_names():
    read = read_weights(FOLDER)
    assert read.class_names == NAMES
    assert (read.provenance["layout"], read.provenance["prefix"]) == ("Hugging Face", "vmamba.")
    assert not [change for change in read.changes if change.action == "left out"]
    with np.load(DATA / "golden_small" / "v05_noz_ln2d.npz") as arrays:
        expected = arrays["logits"]
    images = jnp.asarray(recipe.images((2, 3, 40, 48), 7).transpose(0, 2, 3, 1))
    logits = jax.jit(VSSM(read.config).apply)(read.variables(), images)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("inside", ["", "model.safetensors.index.json"])
def test_shards_are_one_model(shards, inside):
    read, whole = read_weights(shards / inside), read_weights(FOLDER)
    assert read.class_names == NAMES
    assert read.state_dict.keys() == whole.state_dict.keys()
    for key, array in read.state_dict.items():
        np.testing.assert_array_equal(array, whole.state_dict[key], strict=True)


def test_the_file_alone_is_read_with_and_without_its_config(tmp_path):
    assert read_weights(FOLDER / "model.safetensors").class_names == NAMES
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    read = read_weights(tmp_path / "model.safetensors")
    assert read.class_names is None
    assert read.config == read_weights(FOLDER).config


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "no file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file beside it"),
        ({"weight_map": {"a": "..\\model.safetensors"}}, "no file beside it"),
        ({"weight_map": {"a": ""}}, "missing"),
        ({"weight_map": {"a": ".."}}, "missing"),
        ({"weight_map": {"a": 3}}, "no file beside it"),
        ({"weight_map": {"a": "model-9.safetensors"}}, r"model-9\.safetensors is missing"),
        ({"weight_map": {"a": "model-0.safetensors"}}, "'a' is not in the shard"),
        ([], "no JSON object"),
    ],
)
def test_a_wrong_index_is_named_with_its_fault(shards, change, fault):
    (shards / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=fault) as caught:
        read_weights(shards)
    assert "\n" not in str(caught.value)


def test_an_index_or_a_config_that_is_damaged_is_named(shards):
    (shards / "model.safetensors.index.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        read_weights(shards)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        read_weights(shards)
    shutil.copy(FOLDER / "model.safetensors", shards)
    (shards / "config.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 4 MiB"):
        read_weights(shards)


@pytest.mark.parametrize(
    ("stated", "names"),
    [
        ({str(i): f"LABEL_{i}" for i in range(10)}, None),
        ({str(i): f"a {i}" for i in range(9)}, None),  # of another head
        ({str(i): i for i in range(10)}, None),
        (None, None),
        ({str(9 - i): f"a {9 - i}" for i in range(10)}, [f"a {i}" for i in range(10)]),
    ],
)
def test_only_names_for_every_class_are_taken(tmp_path, stated, names):
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    config = json.loads((FOLDER / "config.json").read_text()) | {"id2label": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).class_names == names


@pytest.mark.parametrize(
    ("stated", "fault"),
    [({"layer_norm_eps": 1e-6}, "layer_norm_eps"), ({"hidden_act": "mish"}, "unknown ssm_act")],
)
def test_what_the_config_states_is_never_replaced_silently(tmp_path, stated, fault):
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    config = json.loads((FOLDER / "config.json").read_text()) | stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=fault):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("stated", "size"),
    [(160, (160, 160)), ([160, 256], (160, 256)), ([160], (224, 224)), ([-1, 256], (224, 224))],
)
def test_the_size_of_the_images_may_be_a_height_and_a_width(tmp_path, stated, size):
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    config = json.loads((FOLDER / "config.json").read_text()) | {"image_size": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).config.input_size == size


def test_a_written_folder_has_the_port_s_names_and_comes_back_bit_for_bit(tmp_path):
    read = read_weights(RELEASED)
    save_port(tmp_path / "out", read.state_dict, read.config, NAMES)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", FOLDER))
    assert {key: ours[key] for key in theirs} == theirs
    assert ours["ssm_dt_rank"] == 3
    written = load_safetensors(tmp_path / "out" / "model.safetensors")
    expected = load_safetensors(FOLDER / "model.safetensors")
    assert written.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(written[key], array, strict=True)
    again = read_weights(tmp_path / "out")
    assert again.class_names == NAMES
    assert again.config == read.config
    for key, array in again.state_dict.items():
        np.testing.assert_array_equal(array, read.state_dict[key], strict=True)
    with pytest.raises(CheckpointError, match="exists already"):
        save_port(tmp_path / "out", read.state_dict, read.config, NAMES)


@pytest.mark.parametrize("name", RELEASES)
def test_every_released_name_goes_there_and_back(name):
    config = model_config(name)
    array = np.broadcast_to(np.float32(0), (1,))
    keys = [weight.key for weight in weight_table(config)]
    theirs = [hugging_face_name(key, config) for key in keys]
    assert all(key.startswith(("vmamba.", "classifier.")) for key in theirs)
    inner = {key.removeprefix("vmamba."): array for key in theirs}
    back, _ = standard_names(inner)
    assert list(back) == keys


def test_a_rank_for_each_stage_is_told():
    assert one_rank_note(read_weights(FOLDER).config) is None
    note = one_rank_note(model_config("vmamba_tiny_s1l8"))
    assert note is not None
    assert "ssm_dt_rank" in note


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"forward_type": "v051d_noz"}, "forward_type v051d_noz"),
        ({"forward_type": "v05_onnone"}, "forward_type v05_onnone"),
        ({"norm_layer": "bn", "gmlp": True}, "norm_layer bn, a gated MLP"),
        ({"posembed": True}, "a position embedding"),
    ],
)
def test_an_architecture_that_the_port_lacks_is_refused(tmp_path, change, fault):
    config = VMambaConfig(forward_type="v05_noz", norm_layer="ln2d").replace(**change)
    with pytest.raises(CheckpointError, match=fault):
        save_port(tmp_path / "out", {}, config, None)
    assert not list(tmp_path.iterdir())


def test_names_of_the_port_in_a_pth_file_are_read(tmp_path):
    tensors = dict(load_safetensors(FOLDER / "model.safetensors"))
    torch_writer.save(tmp_path / "pytorch_model.pth", tensors)
    read = read_weights(tmp_path / "pytorch_model.pth")
    assert read.config.num_classes == 10
    backbone = {k: a for k, a in tensors.items() if k.startswith("vmamba.")}
    torch_writer.save(tmp_path / "b.pth", backbone)
    assert read_weights(tmp_path / "b.pth").config.num_classes == 0
