"""The whole way of a user's weights: fine-tune, predict, convert back to PyTorch."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vmamba_jax import VSSM, VMambaConfig, create_model, register_model
from vmamba_jax.cli import main as vmamba_jax
from vmamba_jax.convert import infer_config, load_model, read_weights
from vmamba_jax.convert.identity import differing_fields
from vmamba_jax.data.augment import EvalTransform
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.training.cli import main as train

pytestmark = pytest.mark.xdist_group("walk")  # its tests share a run

DATA = Path(__file__).parent / "data"
FILE = DATA / "fixtures" / "cls_released_v2.pth"
CLASSES = ["ant", "bee", "cow"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 100, (40, 48, 3)) + 70 * np.eye(3, dtype=int)[label]
                path = folder / split / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned from a PyTorch file, whose architecture is nowhere named."""
    run = tmp_path_factory.mktemp("walk") / "run"
    options = ["--data.image-size=32", "--data.batch-size=24", "--data.eval-batch-size=16"]
    options += ["--epochs=2", "--optimizer.warmup-epochs=0", "--optimizer.ema-decay=0.5"]
    options += ["--optimizer.head-only"]  # compiles sooner, and only the way is tested
    paths = [f"--data.root={photos}", f"--init-from={FILE}", f"--run={run}"]
    assert train(["finetune", *paths, *options]) == 0
    return run


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["vmamba-jax", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        vmamba_jax()
    assert ended.value.code == 0


def logits(path: Path, images: jax.Array, config: Any) -> np.ndarray:
    return np.asarray(_forward(config)(read_weights(path).variables(), images))


@functools.cache
def _forward(config: Any) -> Callable[..., Any]:
    return jax.jit(VSSM(config).apply)


def peer_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch model, with a head for the three classes."""
    with np.load(DATA / "golden_small" / "v05_noz_ln2d.npz") as arrays:
        shapes = json.loads(str(arrays["meta"]))["shapes"]
    heads = {"classifier.head.weight": (3, 32), "classifier.head.bias": (3,)}
    return {key: tuple(shape) for key, shape in (shapes | heads).items()}


@pytest.mark.exhaustive
def test_a_run_predicts_its_own_classes_and_converts_to_pytorch(
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = load_model(run)
    assert saved.class_names == CLASSES
    assert saved.provenance["averaged"]
    predict = ("predict", photos / "val", "--json", "--top", 3, "--checkpoint")
    command(monkeypatch, *predict, run)
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert saved.provenance["weights"] in captured.err
    assert "moving average" in captured.err

    target = tmp_path / "back.safetensors"
    command(monkeypatch, "convert", run, target)
    assert "moving average" in capsys.readouterr().out
    back = read_weights(target)
    assert {key: array.shape for key, array in back.state_dict.items()} == peer_shapes()
    assert infer_config(back.state_dict).num_classes == 3

    assert isinstance(saved.preprocessing, Preprocessing)
    assert isinstance(saved.config, VMambaConfig)
    transform = EvalTransform.of(saved.preprocessing)
    images = jnp.stack([transform(Image.open(result["image"])) for result in results])
    # By the architecture that the run states, and by that which the file's names and shapes say.
    assert not differing_fields(back.config, saved.config)
    ours, theirs = (logits(path, images, back.config) for path in (run, target))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5)
    for result, row in zip(results, np.asarray(jax.nn.softmax(theirs)), strict=True):
        given = {p["name"]: p["probability"] for p in result["predictions"]}
        np.testing.assert_allclose([given[name] for name in CLASSES], row, atol=2e-5)

    # As a folder it keeps names, size, mean and std.
    command(monkeypatch, "convert", run, tmp_path / "folder", "--step", "latest")
    folder = load_model(tmp_path / "folder")
    assert folder.class_names == CLASSES
    assert folder.preprocessing == saved.preprocessing
    register_model("walked", saved.config.replace(num_classes=1000))
    _, variables = create_model("walked", pretrained=run, num_classes=3)
    jax.tree.map(np.testing.assert_array_equal, variables, saved.variables)


@pytest.mark.parity
def test_a_run_becomes_a_file_that_pytorch_loads(
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    from torch_backbone import VMamba  # noqa: PLC0415 (needs torch)

    command(monkeypatch, *("predict", photos / "val", "--json", "--top", 3, "--checkpoint", run))
    results = json.loads(capsys.readouterr().out)
    target = tmp_path / "back.pth"
    command(monkeypatch, "convert", run, target)
    model = VMamba(peer_shapes())
    tensors = torch.load(target, weights_only=True)["model"]
    model.load_state_dict(tensors, strict=True)
    for key, array in read_weights(run).state_dict.items():
        np.testing.assert_array_equal(tensors[key].numpy(), array)

    saved = load_model(run)
    assert isinstance(saved.preprocessing, Preprocessing)
    transform = EvalTransform.of(saved.preprocessing)
    images = np.stack([transform(Image.open(result["image"])) for result in results])
    with torch.no_grad():
        pictures = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).split(1)
        theirs = torch.cat([model(picture) for picture in pictures])
    ours = logits(run, jnp.asarray(images), saved.config)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-5)
    for result, row in zip(results, torch.softmax(theirs, -1).numpy(), strict=True):
        given = {p["name"]: p["probability"] for p in result["predictions"]}
        np.testing.assert_allclose([given[name] for name in CLASSES], row, rtol=0, atol=2e-5)
