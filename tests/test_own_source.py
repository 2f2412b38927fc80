"""A data source of one's own: by name, in worker processes, and when it raises."""

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vmamba_jax.data import (
    DataError,
    ImageSource,
    Sample,
    open_source,
    register_source,
    sources,
    train_iterator,
)
from vmamba_jax.data import workers as workers_module
from vmamba_jax.data.augment import normalize
from vmamba_jax.data.bands import Picture


class Squares:
    """Record i is a square as bright as i, of class 0 or 1."""

    class_names = ("dark", "bright")

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int, /) -> Sample:
        return {"image": Image.new("RGB", (4, 4), (index,) * 3), "label": index // 8}


class OwnError(Exception):
    """Pickles, and can't be rebuilt: it takes two arguments and passes one on."""

    def __init__(self, what: str, index: int):
        super().__init__(f"no {what} at {index}")


class Raising(Squares):
    """Raises what `make` makes of the index."""

    def __init__(self, make: Callable[[int], BaseException]):
        self._make = make

    def __getitem__(self, index: int, /) -> Sample:
        raise self._make(index)


def to_array(image: Picture, rng: np.random.Generator) -> np.ndarray:
    del rng
    return normalize(image, (0.0,) * 3, (1.0,) * 3)


def own_error(index: int) -> OwnError:
    return OwnError("camera", index)


def test_a_source_of_ones_own_is_opened_by_its_name():
    opened = []

    def squares(root: str, split: str, channels: int) -> Squares:
        opened.append((root, split, channels))
        return Squares()

    register_source("squares", squares)
    register_source("squares", squares)
    assert len(open_source("squares", "shapes", "train")) == 16
    assert opened == [("shapes", "train", 3)]
    with pytest.raises(ValueError, match="registered already"):
        register_source("squares", lambda root, split, channels: Squares())
    with pytest.raises(ValueError, match="built in"):
        register_source("image_folder", squares)
    with pytest.raises(DataError, match=r"'tfds'.*image_folder, array_record"):
        open_source("tfds", "data", "train")


def test_the_guide_s_source_reads_what_its_table_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "_own", {})
    guide = Path(__file__).parents[1] / "docs" / "guides" / "training.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    exec(compile(code, str(guide), "exec"), {"__name__": "train_table"})
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("a.png,dog\na.png,cat\n")
    source = open_source("table", tmp_path, "train")
    assert [source[i]["label"] for i in range(len(source))] == [1, 0]
    assert isinstance(source, ImageSource)


def test_workers_leave_signals_to_their_parent():
    options: dict[str, Any] = {"batch_size": 4, "seed": 0}
    alone = train_iterator(Squares(), to_array, **options)
    shared = train_iterator(Squares(), to_array, worker_count=1, **options)
    try:
        for step in range(8):
            np.testing.assert_array_equal(next(shared)["image"], next(alone)["image"])
            for worker in multiprocessing.active_children() if step == 0 else []:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGTERM)
                os.kill(worker.pid, signal.SIGINT)
    finally:
        shared.close()
        alone.close()


def test_an_exception_leaves_a_worker_whole():
    batches = train_iterator(Raising(own_error), to_array, batch_size=4, seed=0, worker_count=1)
    try:
        with pytest.raises(
            DataError, match=r"test_own_source.OwnError: no camera at \d+\n(.*\n)*.*_make\(index\)"
        ):
            next(batches)
    finally:
        batches.close()


def test_an_exception_keeps_its_class_where_it_can(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(OwnError, match="no camera"):
        next(train_iterator(Raising(own_error), to_array, batch_size=4, seed=0))
    monkeypatch.setattr(workers_module.multiprocessing, "parent_process", object)
    error = LookupError("nothing there", 3)
    assert workers_module.portable(error) is error
    assert isinstance(workers_module.portable(OwnError("lens", 1)), DataError)


@pytest.mark.parametrize("kind", [StopIteration, SystemExit])
def test_no_exception_ends_the_data_in_silence(kind: type[BaseException]):
    batches = train_iterator(Raising(lambda index: kind("over")), to_array, batch_size=4, seed=0)
    with pytest.raises(DataError, match=f"{kind.__name__}: over"):
        next(batches)
