"""A bucket's address is refused in one line, before anything is written."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.cli import main as vmamba_jax
from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert import load_model, save_model
from vmamba_jax.convert.pretrained import open_pretrained
from vmamba_jax.data import LabelMapFolder, open_source
from vmamba_jax.local_path import NotLocalError, local_path
from vmamba_jax.training.cli import main
from vmamba_jax.training.config import RunConfig
from vmamba_jax.training.loop import train


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., object]]:
    """Runs vmamba-jax and gives its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> object:
        monkeypatch.setattr("sys.argv", ["vmamba-jax", *arguments])
        with pytest.raises(SystemExit) as ended:
            vmamba_jax()
        return ended.value.code

    yield run
    for number, handler in handlers.items():  # training listens to the end of its process
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run=gs://bucket/run"],
        ["--run", "gs://bucket/run"],
        ["finetune", "--data.root", "s3://bucket/photos"],
        ["finetune", "--init-from=az://bucket/model"],
        ["eval", "--run=gs://bucket/run"],
        ["compile", "--output=gs://bucket/report.json"],
        ["--run=https://host/run"],
    ],
)
def test_training_refuses_a_bucket(arguments: list[str], capfd: pytest.CaptureFixture[str]):
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "mount the bucket" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "gs://bucket/model.pth", "model"],
        ["convert", "model.pth", "gs://bucket/model"],
        ["predict", "s3://bucket/photos", "--checkpoint", "model"],
        ["predict", "photo.jpg", "--checkpoint=model", "--save=gs://bucket/picture.png"],
        ["analyze", "photo.jpg", "--checkpoint", "model", "--out", "gs://bucket/figures"],
        ["train", "--run", "gs://bucket/run"],
    ],
)
def test_every_command_refuses_a_bucket(
    arguments: list[str], command: Callable[..., object], capfd: pytest.CaptureFixture[str]
):
    assert command(*arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "mount the bucket" in error
    assert len(error.splitlines()) == 1


def test_vmamba_jax_train_is_train_py(
    command: Callable[..., object], capfd: pytest.CaptureFixture[str]
):
    assert command("--help") == 0
    assert "train" in capfd.readouterr().out
    assert command("train", "--help") == 0
    text = capfd.readouterr().out
    assert "vmamba-jax train [COMMAND] [PRESET] [OPTIONS]" in text
    assert "imagenet-tiny" in text
    assert "train.py" not in text
    assert command("train", "imagenet-tyni") == 1
    assert "Did you mean 'imagenet-tiny'" in capfd.readouterr().err


@pytest.mark.parametrize(
    "use",
    [
        lambda: save_model("gs://bucket/model", {}, VMambaConfig()),
        lambda: load_model("gs://bucket/model"),
        lambda: open_pretrained("gs://bucket/model"),
        lambda: Checkpoints("gs://bucket/run"),
        lambda: train(RunConfig(run=Path("gs://bucket/run"))),
        lambda: LabelMapFolder("gs://bucket/photos", "train", num_classes=2),
        *(
            lambda kind=kind: open_source(kind, "gs://bucket/photos", "train")
            for kind in ("image_folder", "array_record", "huggingface")
        ),
    ],
)
def test_every_function_refuses_a_bucket(use: Callable[[], Any]):
    with pytest.raises(NotLocalError, match=r"gs:/+bucket.*mount the bucket"):
        use()


def test_folders_are_paths():
    for path in ("runs/digits", "/data/a:b", "C:/data", "./x", "a:b/c"):
        assert local_path(path) == Path(path)
