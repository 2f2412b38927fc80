"""The analyze command: figures and numbers from image files, whole, interrupted or refused."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from vmamba_jax import create_model, register_model
from vmamba_jax.analysis.erf import effective_receptive_field
from vmamba_jax.analysis.files import ImageFiles, label_by_folder
from vmamba_jax.analysis.views import ResultFolder, Views
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.training.interrupt import StopRequest

register_model("tiny", tiny.CONFIG)


@pytest.fixture
def run(run):
    return partial(run, "analyze")


@pytest.fixture
def photos(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("cat/a.png", "cat/[b].png", "dog/a.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 52, 3), np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.exhaustive
def test_every_view_writes_its_figures_and_numbers(run, photos, tmp_path):
    (photos / "dog" / "z.png").write_bytes(b"no image")
    code, out, err = run(
        *(photos, "--model", "tiny", "--out", tmp_path / "out", "--image-size", 32, 48),
        *("--views", "erf", "activation", "features", "resolution", "--sizes", 32, 48),
        *("--queries", 20, 8, 0, 0, "--pictures", 2, "--batch-size", 2, "--format", "svg"),
    )
    assert code == 1  # one file is no image
    assert "untrained" in err
    assert "z.png" in err
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    names = ["activation_0_[b]", "activation_1_a", "erf", "features_0_[b]", "features_1_a"]
    expected = [f"{name}{suffix}" for name in names for suffix in (".npz", ".svg")]
    assert written == sorted([*expected, "resolution.json", "resolution.svg"])
    assert "erf.svg" in out
    with np.load(tmp_path / "out" / "erf.npz") as arrays:
        assert arrays["stage_0"].shape == (32, 48)
    with np.load(tmp_path / "out" / "activation_0_[b].npz") as arrays:
        assert arrays["stage_0_routes"].shape == (2, 4, 4, 6)
        # Routes that have just begun: the first reads nothing but the corner itself.
        assert np.count_nonzero(arrays["stage_0_routes"][1, 0]) == 1
        assert arrays["stage_0_routes"][0, 0, :2].all()
    with np.load(tmp_path / "out" / "features_1_a.npz") as arrays:
        assert arrays["stage_0"].shape == (4, 6, 32)
    rows = json.loads((tmp_path / "out" / "resolution.json").read_text())
    assert [row["size"] for row in rows] == [32, 48]
    assert rows[0]["accuracy"] is None


class _Interrupted(ImageFiles):
    """Ctrl-C comes while image `at` is read."""

    at: int | None = None

    def __init__(self, paths, stop: StopRequest) -> None:
        super().__init__(paths, [-1] * len(paths))
        self._stop = stop

    def __getitem__(self, index: int):  # pyright: ignore[reportIncompatibleMethodOverride]
        if index == self.at:
            self._stop.name = "SIGINT"
        return super().__getitem__(index)


def test_an_interrupted_analysis_keeps_what_is_done(photos, tmp_path):
    model, variables = create_model("tiny")
    paths = sorted(photos.rglob("*.png"))
    stop, folder = StopRequest(), ResultFolder(tmp_path, "png", Console(quiet=True))
    with Progress(disable=True) as progress:

        def views(at: int) -> Views:
            files = _Interrupted(paths, stop)
            views = Views(model, variables, files, Preprocessing(32), progress, stop, folder)
            stop.name, files.at = None, at  # now: beartype has looked at an image, too
            return views

        view = views(1)
        view.receptive_fields([0])
        images = [view._normalised(view._picture(i))[None] for i in range(2)]
        expected = effective_receptive_field(model, variables, images)
        with np.load(tmp_path / "erf.npz") as arrays:
            np.testing.assert_allclose(arrays["stage_0"], expected, rtol=1e-6)
            assert arrays["stage_0_images"] == 2

        views(1).features(3)
        assert len(list(tmp_path.glob("features_*.npz"))) == 2

        # Through the first size, and not to the end of the second.
        sweep = views(-1)
        seen = []

        def advance(task, images: int = 1) -> None:
            seen.append(images)
            if len(seen) == 4:
                stop.name = "SIGINT"

        sweep._progress.advance = advance  # pyright: ignore[reportAttributeAccessIssue]
        rows = sweep.resolutions((32, 40), labelled=False, batch_size=1)
        assert [row.size for row in rows] == [32]
        assert json.loads((tmp_path / "resolution.json").read_text())[0]["size"] == 32


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--model", "tiny", "--image-size", "0"), "must be positive"),
        (("--model", "tiny", "--queries", "224", "0"), "must lie on the image"),
        (("--model", "tiny", "--stages", "1"), "stages 0 to 0"),
        (("--model", "tiny", "--block", "1"), "the blocks 0 to 0"),
        (("--model", "tiny", "--views", "resolution", "--sizes", "64", "4"), "too small"),
        (("--model", "tiny", "--labelled"), "has 2 classes and the model 10"),
        ((), "--checkpoint PATH or --model NAME"),
        (("--model", "tyny"), "unknown model"),
    ],
)
def test_what_can_not_be_analysed_is_one_line(run, photos, tmp_path, arguments, fault):
    code, _, err = run(photos, "--out", tmp_path / "out", *arguments)
    assert code == 1
    assert fault in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(run, photos):
    code, _, err = run(photos, "--model", "tiny", "--out", photos)
    assert code == 1
    assert "exists already" in err
    assert len(list(photos.rglob("*"))) == 5


def test_labels_are_the_folders_names_or_their_order(photos):
    paths = sorted(photos.rglob("*.png"))
    assert label_by_folder([photos], paths, ["dog", "horse", "cat"], 3) == [2, 2, 0]
    assert label_by_folder([photos], paths, ["Katze", "Hund"], 2) == [0, 0, 1]
    (photos / "loose.png").write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match="in no class's folder"):
        label_by_folder([photos], [*paths, photos / "loose.png"], None, 2)
    with pytest.raises(ValueError, match="needs one folder"):
        label_by_folder(paths, paths, None, 2)
