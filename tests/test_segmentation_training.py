"""A segmenter is trained: recipe, loss, BatchNorm over a mesh, exact resume, start, evaluation."""

import dataclasses
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vmamba_jax import cli as vmamba_jax
from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert import CheckpointError, load_model, save_model
from vmamba_jax.convert.upernet import upernet_weights
from vmamba_jax.models import VSSM
from vmamba_jax.registry import model_config, register_model
from vmamba_jax.segmentation import Inference, UPerNet, UPerNetConfig
from vmamba_jax.segmentation.inference import segment
from vmamba_jax.training.cli import main
from vmamba_jax.training.config import from_json, to_json
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.metrics import read_rows
from vmamba_jax.training.segmentation import build_segmentation_learner, starting_weights
from vmamba_jax.training.segmentation_config import (
    SEGMENTATION_PRESETS,
    SegmentationConfig,
    SegmentationData,
    SegmentationOptimizer,
    SegmenterConfig,
)
from vmamba_jax.training.segmentation_evaluation import make_segmentation_step
from vmamba_jax.training.segmentation_optimizer import (
    make_linear_schedule,
    make_segmentation_optimizer,
)
from vmamba_jax.training.sharding import MeshConfig, make_mesh, put_batch
from vmamba_jax.training.state import abstract_variables, create_state

pytestmark = pytest.mark.xdist_group("segmentation training")  # its tests share a run

SIZE, CLASSES, UPDATES = 32, 3, 16
register_model(
    "two_maps",
    VMambaConfig(
        patch_size=8,
        depths=(1, 1),
        dims=(8, 16),
        ssm_d_state=1,
        ssm_ratio=1.0,
        forward_type="v05_noz",
        mlp_ratio=1.0,
        downsample_version="v3",
        patchembed_version="v1",
    ),
)
MODEL = SegmenterConfig("two_maps", channels=8, auxiliary_channels=4, drop_path_rate=0.0)
RUN = SegmentationConfig(
    model=MODEL,
    data=SegmentationData(crop_size=SIZE, scale=(64, 32), batch_size=8),
    optimizer=SegmentationOptimizer(learning_rate=1e-2, warmup_updates=1),
)


def batch(seed: int, size: int = 8) -> dict[str, np.ndarray]:
    """Images whose quarters have the colours of their classes."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, CLASSES, (size, 2, 2))
    label = np.repeat(np.repeat(quarters, SIZE // 2, 1), SIZE // 2, 2).astype(np.uint8)
    colours = np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2]], np.float32)
    noise = rng.standard_normal((size, SIZE, SIZE, 3), np.float32)
    label[:, :3] = 255
    return {"image": colours[label % 255 % CLASSES] + 0.3 * noise, "label": label}


def test_the_preset_is_the_published_recipe() -> None:
    recipe = SEGMENTATION_PRESETS["segment"]
    assert recipe.optimizer == SegmentationOptimizer(
        learning_rate=6e-5,
        warmup_factor=1e-6,
        warmup_updates=1500,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        clip_norm=0.0,
        ema_decay=0.0,
    )
    assert (recipe.updates, recipe.data.batch_size, recipe.data.crop_size) == (160_000, 16, 512)
    assert (recipe.data.scale, recipe.data.ratio) == ((2048, 512), (0.5, 2.0))
    assert (recipe.data.max_share, recipe.data.photometric) == (0.75, True)
    assert (recipe.model.channels, recipe.model.auxiliary_channels) == (512, 256)
    rates = {name: preset.model.drop_path_rate for name, preset in SEGMENTATION_PRESETS.items()}
    assert (rates["segment"], rates["segment-small"], rates["segment-base"]) == (0.2, 0.3, 0.6)


@pytest.mark.parametrize("name", SEGMENTATION_PRESETS)
def test_a_configuration_survives_json(name: str) -> None:
    preset = SEGMENTATION_PRESETS[name]
    assert from_json(SegmentationConfig, json.loads(json.dumps(to_json(preset)))) == preset


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    rate = make_linear_schedule(SegmentationOptimizer(), 160_000)
    assert rate(0) == pytest.approx(6e-11)
    assert rate(1) == pytest.approx(6e-5 * (1e-6 + (1 - 1e-6) / 1499), rel=1e-12)
    assert rate(1499) == rate(1500) == 6e-5
    assert rate(1500 + 15_849) == pytest.approx(0.9 * 6e-5, rel=1e-4)
    assert rate(159_998) == pytest.approx(6e-5 / 158_499)
    assert rate(159_999) == 0
    with pytest.raises(ValueError, match=r"1500 of them.*optimizer\.warmup-updates"):
        make_linear_schedule(SegmentationOptimizer(), 1000)


def test_only_what_pytorch_calls_norm_is_not_decayed() -> None:
    config = UPerNetConfig(model_config("two_maps"), CLASSES, channels=8, auxiliary_channels=4)
    weights = [weight for weight in upernet_weights(config) if weight.path[0] == "params"]
    optimizer = make_segmentation_optimizer(SegmentationOptimizer(weight_decay=0.5), config)
    params: Any = {}
    for weight in weights:
        node = params
        for name in weight.path[1:-1]:
            node = node.setdefault(name, {})
        node[weight.path[-1]] = jnp.ones(1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params, learning_rate=0.1)

    def shrunk(weight: Any) -> bool:
        leaf = updates
        for name in weight.path[1:]:
            leaf = leaf[name]
        return float(leaf[0]) == pytest.approx(-0.05)

    kept = {weight.key for weight in weights if not shrunk(weight)}
    assert kept == {weight.key for weight in weights if "norm" in weight.key}
    assert "backbone.outnorm0.weight" in kept
    assert "backbone.layers.0.blocks.0.op.out_norm.bias" in kept
    decayed = {weight.key for weight in weights} - kept
    assert "decode_head.bottleneck.bn.weight" in decayed
    assert "decode_head.conv_seg.bias" in decayed
    assert any(key.endswith("A_logs") for key in decayed)


def some(model: Any) -> Any:
    """Variables of a model, of noise."""
    rng = np.random.default_rng(0)
    abstract = abstract_variables(model, (SIZE, SIZE, 3))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)


def test_batchnorm_sees_the_whole_batch_of_a_mesh() -> None:
    backbone = model_config("two_maps").replace(drop_path_rate=0.0)
    model = UPerNet(UPerNetConfig(backbone, CLASSES, 8, auxiliary_channels=0, dropout=0.0))
    variables = some(model)
    forward = partial(model.apply, train=True, mutable=["batch_stats"])

    def run(devices: int) -> Any:
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            images = put_batch(batch(0), mesh)["image"]
            assert len(images.sharding.device_set) == devices
            return jax.device_get(jax.jit(forward)(variables, images))

    (one, one_statistics), (two, two_statistics) = run(1), run(2)
    np.testing.assert_allclose(two.decode, one.decode, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), two_statistics, one_statistics
    )


@pytest.mark.exhaustive
def test_a_mesh_trains_as_one_device() -> None:
    def losses(devices: int) -> list[float]:
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        learner = build_segmentation_learner(RUN, num_classes=CLASSES, mesh=mesh)
        found = []
        with jax.set_mesh(mesh):
            state = create_state(learner.init, mesh)
            for step in range(3):
                state, metrics = learner.train_step(
                    state, put_batch(batch(step), mesh), np.float32(1e-2)
                )
                found.append(float(metrics["loss"]))
        return found

    np.testing.assert_allclose(losses(2), losses(1), rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quarters")
    for split, seed in (("training", 0), ("validation", 1)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        parts = batch(seed, 12)
        pixels = np.clip(128 + 50 * parts["image"], 0, 255).astype(np.uint8)
        for i, (image, label) in enumerate(zip(pixels, parts["label"], strict=True)):
            Image.fromarray(image).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def options(folder: Path, run: Path, updates: int = UPDATES) -> list[str]:
    return [
        f"--run={run}",
        f"--data.root={folder}",
        f"--updates={updates}",
        "--init-from=None",
        "--eval-every=8",
        "--save-every=4",
        "--log-every=1",
        "--optimizer.warmup-updates=1",
        "--optimizer.learning-rate=2e-2",
        "--model.name=two_maps",
        "--model.channels=8",
        "--model.auxiliary-channels=4",
        "--data.crop-size=32",
        "--data.scale",
        "64",
        "32",
        "--data.batch-size=8",
        "--data.eval-batch-size=8",
        "--data.eval-stride=16",
    ]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["segment", *options(folder, run)]) == 0
    return run


@pytest.mark.exhaustive
def test_a_run_lowers_the_loss_and_leaves_metrics_a_picture_and_the_best_checkpoint(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(finished)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, UPDATES + 1))
    # 29 of 32 rows count; two heads guess three classes at first.
    assert losses[0] == pytest.approx(1.4 * np.log(CLASSES) * 29 / 32, rel=0.2)
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert [row["step"] for row in rows if "mean_iou" in row] == [8, 16]
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    with Checkpoints(finished / "checkpoints", read_only=True) as checkpoints:
        best = max((row["mean_iou"], row["step"]) for row in rows if "mean_iou" in row)[1]
        assert checkpoints.best_step == best


@pytest.mark.exhaustive
def test_an_interrupted_run_resumes_bit_for_bit(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()
    with monkeypatch.context() as patched:
        # Twice before the first update, and after each.
        patched.setattr(StopRequest, "reached", lambda self: next(asked) == 4)
        assert main(["segment", *options(folder, tmp_path)]) == 0
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == [1, 2, 3]
    assert main(["segment", *options(folder, tmp_path)]) == 0

    def losses(run: Path) -> list[float]:
        return [row["loss"] for row in read_rows(run) if "loss" in row]

    assert losses(tmp_path) == losses(finished)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_model(tmp_path, step="latest").variables,
        load_model(finished, step="latest").variables,
    )


@pytest.mark.exhaustive
def test_a_finished_run_is_evaluated_by_itself_with_every_class(
    finished: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "segment", *options(folder, finished)]) == 0
    output = capfd.readouterr().out
    recorded = [row["mean_iou"] for row in read_rows(finished) if "mean_iou" in row][-1]
    assert output.strip().splitlines()[-1] == f"held-out mIoU {100 * recorded:.2f}%"
    for name in ("red", "green", "blue", "12 images"):
        assert name in output
    by_windows = ["--data.eval-mode=slide", "--data.eval-batch-size=16", "--step=8"]
    assert main(["eval", "segment", *options(folder, finished), *by_windows]) == 0
    # The images are as large as a window: both ways are the same.
    evaluated = next(row["mean_iou"] for row in read_rows(finished) if "mean_iou" in row)
    assert f"held-out mIoU {100 * evaluated:.2f}%" in capfd.readouterr().out


@pytest.mark.exhaustive
def test_a_run_segments_photographs_as_it_evaluated_them(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, how = load_model(finished), Inference("whole", (64, 32), (32, 32), (16, 16))
    assert saved.preprocessing == how
    image, labels = folder / "images" / "validation" / "0.png", tmp_path / "labels.png"
    segmenter = tmp_path / "segmenter"
    for command in (
        ("convert", finished, segmenter),
        ("segment", image, "--checkpoint", segmenter, "--save-labels", labels),
    ):
        monkeypatch.setattr(sys, "argv", ["vmamba-jax", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            vmamba_jax.main()
        assert ended.value.code == 0
    assert isinstance(saved.config, UPerNetConfig)
    with Image.open(image) as file:
        expected = segment(UPerNet(saved.config), saved.variables, file.convert("RGB"), how)
    with Image.open(labels) as file:
        np.testing.assert_array_equal(np.asarray(file), expected)


def test_a_classifier_gives_the_backbone_and_a_segmenter_everything(tmp_path: Path) -> None:
    classifier = VSSM(model_config("two_maps"))
    model = UPerNet(
        UPerNetConfig(model_config("two_maps"), CLASSES, channels=8, auxiliary_channels=4)
    )
    variables, fresh = some(classifier), some(model)
    save_model(tmp_path / "classifier", variables, classifier.config)
    save_model(tmp_path / "segmenter", fresh, model.config)

    config = dataclasses.replace(RUN, init_from=str(tmp_path / "classifier"))
    start = starting_weights(config, model, fresh)
    np.testing.assert_array_equal(
        start["params"]["backbone"]["patch_embed"]["conv"]["kernel"],
        variables["params"]["patch_embed"]["conv"]["kernel"],
    )
    for head in ("decode_head", "auxiliary_head"):
        jax.tree.map(np.testing.assert_array_equal, start["params"][head], fresh["params"][head])
    with pytest.raises(CheckpointError, match="without a segmenter's heads"):
        starting_weights(config, model, None)

    config = dataclasses.replace(RUN, init_from=str(tmp_path / "segmenter"))
    jax.tree.map(np.testing.assert_array_equal, starting_weights(config, model, None), fresh)


@pytest.mark.exhaustive
def test_what_cannot_be_is_refused(
    folder: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for extra, message in (
        (["--data.root=/nowhere"], "/nowhere/images/validation"),
        (["--optimizer.warmup-updates=16"], "warm-up"),
        (["--data.num-classes=4"], "lists 3 classes and data.num-classes is 4"),
        ([f"--run={finished}", "--seed=5"], "seed: 0 -> 5"),
    ):
        assert main(["segment", *options(folder, tmp_path), *extra]) == 1
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    with pytest.raises(ValueError, match="eval_stride must be 1 to crop_size"):
        SegmentationData(crop_size=32, eval_stride=64)
    assert main([f"--run={finished}"]) == 1
    assert "holds a run of another task" in capfd.readouterr().err
    assert main(["throughput", "segment"]) == 1
    assert "throughput is for classifiers" in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_batch_is_evaluated_as_each_photograph_by_itself(mode: Any) -> None:
    """Window by window and pixel by pixel, with the logits in full."""
    config = UPerNetConfig(model_config("two_maps"), CLASSES, channels=8, auxiliary_channels=0)
    model = UPerNet(config)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((8, 40, 72, 3), np.float32)
    labels = rng.choice([0, 1, 2, 255], (8, 67, 90)).astype(np.uint8)
    init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables: Any = jax.tree.map(lambda x: x * 3, init)  # far from ties
    mask = np.arange(8) < 7
    mesh = make_mesh(MeshConfig())
    data = SegmentationData(crop_size=32, eval_stride=24, eval_mode=mode)
    with jax.set_mesh(mesh):
        step = make_segmentation_step(model, data, mesh)
        inputs = put_batch({"image": images, "label": labels, "mask": mask}, mesh)
        results = jax.device_get(step(variables, inputs))

    @jax.jit
    def logits_of(part: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, part)
        shape = (*part.shape[:3], CLASSES)
        return jax.image.resize(logits.decode, shape, "linear", antialias=False)

    if mode == "whole":
        logits = np.asarray(logits_of(jnp.asarray(images)))
    else:
        logits, count = np.zeros((8, 40, 72, CLASSES), np.float32), np.zeros((40, 72, 1))
        for top in (0, 8):
            for left in (0, 24, 40):
                window = (slice(top, top + 32), slice(left, left + 32))
                logits[:, *window] += np.asarray(logits_of(jnp.asarray(images[:, *window])))
                count[window] += 1
        logits = (logits / count).astype(np.float32)
    full = jax.image.resize(jnp.asarray(logits), (8, 67, 90, CLASSES), "linear", antialias=False)
    expected = np.argmax(np.asarray(full), axis=-1)
    assert len(np.unique(expected)) > 1
    assert np.mean(results["prediction"] == expected) > 0.9995
    assert results["count"] == 7
    seen = labels[:7] != 255
    matrix = np.zeros((CLASSES, CLASSES), int)
    np.add.at(matrix, (labels[:7][seen], results["prediction"][:7][seen]), 1)
    np.testing.assert_array_equal(results["confusion"], matrix)
