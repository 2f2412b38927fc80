"""Exported models: the same numbers without this package, any sizes, one clear error a bad file."""

import dataclasses
import json
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.export import export, symbolic_shape

from vmamba_jax import VSSM, UPerNet
from vmamba_jax.convert.artifact import save_model
from vmamba_jax.detection.config import MaskRCNNConfig
from vmamba_jax.errors import CheckpointError
from vmamba_jax.export import artifact, export_model, load_exported
from vmamba_jax.ops import selective_scan
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.segmentation.config import UPerNetConfig

CONFIG = tiny.CONFIG.replace(depths=(1, 1), dims=16, patch_size=4, num_classes=10)
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "export.md"
SHAPE = (3, 24, 32, 3)  # maps of 48 and 12 positions: whole chunks of an open length are 64
NAMES = [f"digit {i}" for i in range(10)]


def variables_of(network, shape=SHAPE):
    """Random weights, without compiling an initialisation."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: np.abs(rng.normal(0, 0.1, a.shape)).astype(np.float32), shapes)


def images_of(shape=SHAPE):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def variables():
    return variables_of(VSSM(CONFIG))


@pytest.fixture(scope="module")
def logits(variables):
    return np.asarray(jax.jit(VSSM(CONFIG).apply)(variables, images_of()))


@pytest.fixture(scope="module")
def exported(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.npz"
    export_model(
        path, variables, CONFIG, batch_size=3, image_size=SHAPE[1:3], platforms=["cpu", "cuda"],
        class_names=NAMES,
    )  # fmt: skip
    return path


def test_the_guides_lines_run_it_without_flax_and_give_the_models_bits(exported, logits, tmp_path):
    lines = GUIDE.read_text().split("```python\n")[1].split("```")[0]
    np.save(tmp_path / "images.npy", images_of())
    script = (
        "import sys\n"
        "sys.modules['flax'] = sys.modules['vmamba_jax'] = sys.modules['safetensors'] = None\n"
        f"path, images = {str(exported)!r}, __import__('numpy').load('images.npy')\n"
        f"{lines}\nnp.save('logits.npy', logits)\nprint(json.dumps(about['class_names']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), logits)
    assert json.loads(done.stdout) == NAMES


def test_a_tpu_has_a_program_of_its_own_with_the_kernel_where_sizes_are_fixed(variables, tmp_path):
    export_model(tmp_path / "m.npz", variables, CONFIG, batch_size=3, image_size=SHAPE[1:3])
    programs = load_exported(tmp_path / "m.npz").programs
    assert programs["program"].platforms == ("cpu", "cuda")
    assert programs["program_tpu"].platforms == ("tpu",)
    assert "tpu_custom_call" in programs["program_tpu"].mlir_module()
    assert "tpu_custom_call" not in programs["program"].mlir_module()


def test_images_of_another_size_or_dtype_are_refused(exported):
    loaded, images = load_exported(exported), images_of()
    for wrong in (images[:2], images[:, :20], images[..., :2], images[0]):
        with pytest.raises(ValueError, match=r"images must be \(3, 24, 32, 3\), got"):
            loaded(wrong)
    with pytest.raises(ValueError, match="float32 numbers, got uint8"):
        loaded(images.astype(np.uint8))


@pytest.mark.parametrize(
    "fields",
    [
        {"forward_type": "v05_noz", "patchembed_version": "v2"},
        {"forward_type": "m0_noz", "ssm_init": "v2", "downsample_version": "v1"},
        {"forward_type": "v052dc", "ssm_d_state": 2, "depths": (1,), "dims": 8},
        {"forward_type": "v052d3_onsoftmax", "norm_layer": "bn", "downsample_version": "v2"},
    ],
    ids=lambda fields: fields["forward_type"],
)
def test_one_program_takes_images_of_any_size_on_all_platforms(fields, tmp_path):
    config = CONFIG.replace(**fields)
    network = VSSM(config)
    variables = variables_of(network)
    export_model(tmp_path / "m.npz", variables, config, image_size=None)
    loaded = load_exported(tmp_path / "m.npz")
    assert {name: p.platforms for name, p in loaded.programs.items()} == {
        "program": ("cpu", "cuda", "tpu")
    }
    side = 4 * 2 ** (len(config.depths) - 1)
    assert loaded.takes == f"(any number, a multiple of {side}, a multiple of {side}, 3)"
    expected = jax.jit(network.apply)(variables, images_of())
    np.testing.assert_allclose(loaded(images_of()), expected, rtol=1e-5, atol=1e-6)
    for wrong in (images_of()[:, :22], images_of()[:0]):
        with pytest.raises(ValueError, match=r"must be \(any number, a multiple of"):
            loaded(wrong)


def test_a_segmenter_takes_images_of_any_size(tmp_path):
    backbone = CONFIG.replace(ssm_ratio=0.0)
    config = UPerNetConfig(backbone, 5, channels=8, auxiliary_channels=0, pool_scales=(1, 2))
    network = UPerNet(config)
    variables = variables_of(network)
    export_model(tmp_path / "m.npz", variables, config, image_size=None)
    logits = load_exported(tmp_path / "m.npz")(images_of())
    expected = jax.jit(network.apply)(variables, images_of()).decode
    assert logits.shape == (3, 6, 8, 5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "sequential", "associative"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_open_batch_and_length_is_the_reference(implementation, reverse):
    rng = np.random.default_rng(0)
    u, delta = (rng.standard_normal((3, 70, 2, 4), np.float32) for _ in range(2))
    b, c = (rng.standard_normal((3, 70, 2, 2), np.float32) for _ in range(2))
    decay = -np.abs(rng.standard_normal((2, 4, 2), np.float32))

    def scan(u, delta, b, c, implementation=implementation):
        return selective_scan(
            u, delta, jnp.asarray(decay), b, c, reverse=reverse, implementation=implementation
        )

    batch, length = symbolic_shape("b, l")
    shapes = [jax.ShapeDtypeStruct((batch, length, 2, n), jnp.float32) for n in (4, 4, 2, 2)]
    program = export(jax.jit(scan))(*shapes)
    expected = jax.jit(lambda *arrays: scan(*arrays, implementation="reference"))(u, delta, b, c)
    np.testing.assert_allclose(program.call(u, delta, b, c), expected, rtol=2e-5, atol=1e-5)


def test_bfloat16_weights_take_half_the_room_and_round_nothing_else(
    exported, variables, logits, tmp_path
):
    path = tmp_path / "m.npz"
    export_model(
        path, variables, CONFIG, batch_size=3, image_size=SHAPE[1:3], platforms=["cpu"],
        weight_dtype="bfloat16",
    )  # fmt: skip
    loaded, exact = load_exported(path), load_exported(exported)
    rounded = {name for name, a in loaded.weights.items() if a.dtype == np.uint16}
    assert {name.split("/")[-1] for name in rounded} == {
        "kernel", "x_proj_weight", "dt_projs_weight"
    }  # fmt: skip
    for name, array in exact.weights.items():
        if name in rounded:
            assert loaded.weights[name].nbytes * 2 == array.nbytes
        else:
            np.testing.assert_array_equal(loaded.weights[name], array)
    drift = np.abs(loaded(images_of()) - logits).max() / np.std(logits)
    assert 0 < drift < 0.05


def flip_a_weight(data: bytes) -> bytes:
    middle = data.index(b"weights/params/head/kernel.npy") + 400
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-100], lambda data: data[: len(data) // 2], flip_a_weight,
     lambda data: b"PK" + bytes(100), lambda data: b""],
    ids=["end", "half", "bit", "zeros", "empty"],
)  # fmt: skip
def test_a_damaged_file_is_one_clear_error(exported, tmp_path, damage):
    path = tmp_path / "damaged.npz"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(CheckpointError, match=r"damaged\.npz: not an exported model, cut short"):
        load_exported(path)


def test_a_foreign_or_newer_file_is_told_from_a_damaged_one(exported, tmp_path):
    with np.load(exported) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))

    def written(**changes):
        path = tmp_path / "other.npz"
        np.savez(path, **{**arrays, "about": np.array(json.dumps({**about, **changes}))})
        return path

    for changes, message in (
        ({"version": 2}, "of version 2 of the format, and this vmamba_jax reads version 1"),
        ({"format": "x"}, "vmamba-jax export` writes such files"),
        ({"calling_convention": 99, "jax": "9.9"}, r"JAX 9\.9 .* convention 99, .* export the"),
        ({"images": None}, "damaged"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_exported(written(**changes))
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match="writes such files"):
        load_exported(tmp_path / "foreign.npz")
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(2**20))
    with pytest.raises(CheckpointError, match="compressed"):
        load_exported(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "none.npz", "w") as file:
        file.writestr("about.npy", "no array")
    with pytest.raises(CheckpointError, match="damaged"):
        load_exported(tmp_path / "none.npz")
    with pytest.raises(OSError, match="absent"):
        load_exported(tmp_path / "absent.npz")


def test_a_program_that_this_jax_cannot_read_is_told_by_the_jax_that_wrote_it(exported, tmp_path):
    loaded = load_exported(exported)
    program = dataclasses.replace(loaded.programs["program"], mlir_module_serialized=b"ML\xefRnew")
    path, about = tmp_path / "m.npz", {**loaded.about, "jax": "9.9"}
    artifact.save_exported(path, {"program": program}, loaded.weights, about)
    with pytest.raises(
        CheckpointError, match=r"m\.npz: its program, written by JAX 9\.9, can't be"
    ):
        load_exported(path)


def test_what_cannot_be_exported_is_said_before_anything_is_written(variables, tmp_path):
    path = tmp_path / "m.npz"
    placed = CONFIG.replace(posembed=True, imgsize=(24, 32))
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (placed, {"image_size": None}, "position embedding takes images of one size"),
        (placed, {"image_size": (32, 32)}, r"images of \(24, 32\), not \(32, 32\)"),
        (MaskRCNNConfig(CONFIG), {}, "a detector"),
        (CONFIG, {"image_size": (3, 32)}, "too small"),
        (CONFIG, {"batch_size": 0}, "must be positive, got 0"),
        (CONFIG, {"platforms": []}, "some of cpu, cuda, rocm, tpu"),
    )
    for config, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_model(path, variables, config, **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_and_an_existing_file_stays(
    exported, variables, tmp_path, monkeypatch
):
    path = tmp_path / "m.npz"
    loaded = load_exported(exported)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(artifact.np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        artifact.save_exported(path, loaded.programs, loaded.weights, loaded.about)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        artifact.save_exported(path, loaded.programs, loaded.weights, loaded.about)
    assert path.read_text() == "mine"


@pytest.fixture
def run(run):
    return partial(run, "export")


def test_the_command_exports_a_checkpoint_with_names_and_preprocessing(run, variables, tmp_path):
    steps = Preprocessing((24, 32), 0.9, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    save_model(tmp_path / "saved", variables, CONFIG, {}, NAMES, steps)
    target = tmp_path / "out" / "m.npz"
    code, out, err = run(
        target, "--checkpoint", tmp_path / "saved", "--platforms", "cpu", "--batch-size", 2,
        "--check",
    )  # fmt: skip
    assert code == 0, err
    assert "images: float32 (2, 24, 32, 3)" in out
    assert "largest difference 0 of" in out
    assert "the same largest value in 100.0%" in out
    loaded = load_exported(target)
    assert loaded.class_names == NAMES
    assert loaded.preprocessing == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.onnx"], "examples/export_onnx.py"),
        (["m.bin"], "an exported model is an .npz file"),
        (["m.npz", "--any-size", "--image-size", "64"], "either --image-size or --any-size"),
        (["m.npz", "--image-size", "1", "2", "3"], "one number, or a height and a width"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(run, arguments, message, tmp_path):
    code, _, err = run(*arguments, "--checkpoint", tmp_path)
    assert code == 1
    assert message in " ".join(err.split())
