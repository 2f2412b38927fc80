"""The loop as a user meets it: one command trains, resumes, draws, and says what is wrong."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert import CheckpointError, Weights, load_model, save_model
from vmamba_jax.models import VSSM
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.registry import model_config, register_model
from vmamba_jax.run_folder import choose_step, complete_steps
from vmamba_jax.training import classification
from vmamba_jax.training.cli import main
from vmamba_jax.training.metrics import read_rows
from vmamba_jax.training.start import check_same_labels

pytestmark = pytest.mark.xdist_group("training loop")  # its tests share a run

# Small enough to compile in seconds: one block over 4x4 patches.
register_model(
    "one_block",
    VMambaConfig(
        patch_size=8,
        depths=(1,),
        dims=(16,),
        ssm_d_state=1,
        ssm_ratio=1.0,
        forward_type="v05_noz",
        mlp_ratio=1.0,
        downsample_version="v3",
        patchembed_version="v2",
    ),
)
_SMALL = [
    "--model.name=one_block",
    "--data.batch-size=472",
    "--data.eval-batch-size=360",
    "--optimizer.learning-rate=5e-3",
]


def _train(run: Path, *options: str) -> int:
    return main([*_SMALL, f"--run={run}", *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "digits"
    assert _train(run, "--epochs=2", "--log-every=1", "--keep=1") == 0
    return run


def test_a_run_leaves_metrics_picture_config_and_events(finished: Path) -> None:
    rows = read_rows(finished)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "accuracy" in row] == [3, 6]
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "config.json").read_text())["model"]["name"] == "one_block"
    assert list(finished.glob("events.out.tfevents.*"))


def test_the_last_line_is_the_held_out_accuracy_and_a_finished_run_says_how_to_start_afresh(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _train(finished, "--epochs=2") == 0
    output = capfd.readouterr().out
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(r"held-out accuracy \d+\.\d\d%", last)
    recorded = [row["accuracy"] for row in read_rows(finished) if "accuracy" in row][-1]
    assert last == f"held-out accuracy {100 * recorded:.2f}%"
    assert "To train afresh, delete that folder" in output


@pytest.mark.exhaustive
def test_a_longer_run_goes_on_from_the_last_checkpoint(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # By other means, which change nothing of what is computed.
    assert _train(finished, "--epochs=3", "--log-every=1", "--model.use-checkpoint") == 0
    assert "after update 6 of 9" in capfd.readouterr().out
    steps = [row["step"] for row in read_rows(finished) if "loss" in row]
    assert steps == list(range(1, 10))
    with Checkpoints(finished / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.name=one_blok"], "Did you mean 'one_block'"),
        (["--mesh.data=7"], "does not use 8 devices"),
        (["--data.batch-size=481"], "use a multiple of 8, such as 480 or 488"),
        (["--data.kind=image_folder", "--data.root=/nowhere"], "nowhere"),
        (["--optimizer.warmup-epochs=9"], "warm-up"),
    ],
)
def test_bad_input_gives_one_clear_error(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _train(tmp_path, "--epochs=2", *options) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_another_run_in_the_folder_is_refused_and_kept(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(finished.rglob("*"))
    assert _train(finished, "--epochs=4", "--seed=1") == 1
    assert "seed: 0 -> 1" in capfd.readouterr().err
    assert sorted(finished.rglob("*")) == before


def test_an_unknown_preset_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["imagenet-tyni"]) == 1
    assert "Did you mean 'imagenet-tiny'" in capfd.readouterr().err


def test_a_run_that_diverges_stops_with_a_message_and_an_intact_checkpoint(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs=40", "--log-every=1", "--max-skipped=4", "--optimizer.clip-norm=0"]
    assert _train(tmp_path, *options, "--optimizer.learning-rate=1e36") == 1
    error = capfd.readouterr().err
    assert "not finite in the last 4 updates" in error
    assert "optimizer.learning-rate" in error
    losses = [row["loss"] for row in read_rows(tmp_path) if "loss" in row]
    assert np.count_nonzero(np.isnan(losses)) >= 4


def test_a_finished_run_can_be_evaluated_by_itself(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # With the settings it was trained with, none of which are given again.
    assert main(["eval", f"--run={finished}", "--step=latest"]) == 0
    output = capfd.readouterr().out
    recorded = [row["accuracy"] for row in read_rows(finished) if "accuracy" in row][-1]
    assert output.strip().splitlines()[-1] == f"held-out accuracy {100 * recorded:.2f}%"
    assert f"update {complete_steps(finished / 'checkpoints')[-1]}, " in output  # 6, or 9 by now
    assert "moving average" in output
    smaller = ["--data.image-size=24", "--data.eval-crop=0.75", "--data.eval-batch-size=120"]
    assert main(["eval", "--run", str(finished), *smaller]) == 0
    assert main(["eval", f"--run={finished}", "--model.name=vmamba_digits"]) == 1
    assert "another architecture than vmamba_digits" in capfd.readouterr().err
    assert main(["eval", *_SMALL, f"--run={finished / 'nothing'}"]) == 1
    assert "train first" in capfd.readouterr().err


def test_a_checkpoint_that_is_not_there_is_said(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for step, message in (("foo", "best, latest or a number, not 'foo'"), ("4", "of step 4")):
        assert main(["eval", f"--run={finished}", f"--step={step}"]) == 1
        assert message in capfd.readouterr().err
    copied = shutil.copytree(finished, tmp_path / "run")
    for metrics in copied.glob("checkpoints/*/metrics/metrics"):
        metrics.unlink()
    assert main(["eval", f"--run={copied}", "--step=best"]) == 1
    assert "none of its checkpoints was evaluated" in capfd.readouterr().err


@pytest.mark.exhaustive
def test_a_fault_in_an_evaluation_costs_nothing_and_it_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault(*_: object) -> None:
        raise OSError("the disk with the held-out images is gone")

    # No save falls on the end of an epoch, after 3 updates, but for the evaluation there.
    options = ["--epochs=2", "--log-every=1", "--keep=1", "--save-every=4"]
    with monkeypatch.context() as patched:
        patched.setattr(classification, "evaluate", fault)
        assert _train(tmp_path, *options) == 1
    assert "disk with the held-out images" in capfd.readouterr().err
    assert complete_steps(tmp_path / "checkpoints") == [3]
    assert _train(tmp_path, *options) == 0
    assert "after update 3 of 6" in capfd.readouterr().out
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows if "accuracy" in row] == [3, 6]
    best = max((row["accuracy"], row["step"]) for row in rows if "accuracy" in row)[1]
    assert complete_steps(tmp_path / "checkpoints") == [3, 6]  # the best before, and the latest
    assert choose_step(tmp_path / "checkpoints", "best") == best
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.metrics(best)["accuracy"] == max(
            row["accuracy"] for row in rows if "accuracy" in row
        )


def test_throughput_reports_forward_and_backward(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--images=8", "--warmup=1", "--timed=1", "--num-classes=10"]
    assert main(["throughput", "--model.name=one_block", *options]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert ["img/s" in line for line in lines] == [True, True]


def test_fine_tuning_takes_architecture_and_weights_of_a_saved_model(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Seven classes, and an activation that leaves no trace in the weights, of no registered model.
    config = model_config("one_block").replace(num_classes=7, mlp_act_layer="relu")
    variables = VSSM(config).init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    save_model(tmp_path / "seven", cast(Any, variables), config)
    run = tmp_path / "run"
    options = [
        *("finetune", "--data.kind=digits", "--data.image-size=32", "--data.augmentation=digits"),
        *("--data.batch-size=472", "--data.eval-batch-size=360", "--optimizer.warmup-epochs=0"),
        *("--optimizer.head-only", "--epochs=1", f"--run={run}"),
    ]
    assert main([*options, f"--init-from={tmp_path / 'seven'}"]) == 0
    output = capfd.readouterr().out
    assert f"starting from {tmp_path / 'seven'}" in output
    assert "a new head of 10 classes in place of 7" in output
    tuned = load_model(run)
    assert isinstance(tuned.config, VMambaConfig)
    assert tuned.config.mlp_act_layer == "relu"
    assert tuned.class_names == [*"0123456789"]
    assert tuned.preprocessing == Preprocessing(32, 224 / 256)
    np.testing.assert_array_equal(
        tuned.variables["params"]["patch_embed"]["conv1"]["kernel"],
        variables["params"]["patch_embed"]["conv1"]["kernel"],
    )
    assert tuned.variables["params"]["head"]["kernel"].shape == (16, 10)
    # The run knows its architecture: what it started from may be gone, but no other be asked for.
    shutil.rmtree(tmp_path / "seven")
    assert main([*options, "--model.name=one_block"]) == 1
    assert "mlp_act_layer: relu -> gelu" in capfd.readouterr().err
    assert main([*options, "--optimizer.accumulation-steps=1"]) == 0
    assert "is finished" in capfd.readouterr().out


def test_weights_and_images_must_be_of_the_same_classes() -> None:
    def weights(names: list[str] | None, classes: int) -> Weights:
        return Weights({}, VMambaConfig(num_classes=classes), {}, [], names)

    def check(weights: Weights, names: Sequence[str]) -> None:
        check_same_labels(weights, "runs/pets", names, "photos (val)")

    check(weights(["cat", "dog"], 2), ["cat", "dog"])
    check(weights(None, 2), ["cat", "dog"])
    check(weights(["tench, Tinca tinca", "dog"], 2), ["n01440764", "dog"])
    with pytest.raises(CheckpointError, match=r"runs/pets tells 3 .* photos \(val\) has 2: "):
        check(weights(None, 3), ["cat", "dog"])
    with pytest.raises(CheckpointError, match="other classes: 0: dog and cat; 1: cat and dog"):
        check(weights(["dog", "cat"], 2), ["cat", "dog"])


def test_weights_of_another_model_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = model_config("one_block").replace(dims=(8,))
    variables = VSSM(config).init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    save_model(tmp_path / "other", cast(Any, variables), config)
    assert _train(tmp_path / "run", "--epochs=2", f"--init-from={tmp_path / 'other'}") == 1
    assert "another architecture" in capfd.readouterr().err
