"""The image files that are analysed, and what class they are of."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from vmamba_jax.data.decode import Sample, decode_rgb
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.training.interrupt import StopRequest


class ImageFiles(Sequence[Sample]):
    """Image files as samples; the label of an unknown class is -1."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths, self._labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:  # pyright: ignore[reportIncompatibleMethodOverride]
        path = self.paths[index]
        return {"image": decode_rgb(path, str(path)), "label": self._labels[index]}


def readable_files(
    paths: Sequence[Path], labels: Sequence[int] | None, progress: Progress, stop: StopRequest
) -> ImageFiles:
    """The files that can be read; says which can't.

    Raises:
        ValueError: if none can.
    """
    kept, classes = [], []
    task = progress.add_task("reading", total=len(paths))
    for i, path in enumerate(paths):
        if stop.name:
            raise KeyboardInterrupt
        try:
            decode_rgb(path, str(path))
            kept.append(path)
            classes.append(-1 if labels is None else labels[i])
        except DamagedRecordError as error:
            progress.console.print(f"[red]unreadable:[/red] {escape(str(error))}", soft_wrap=True)
        progress.advance(task)
    progress.remove_task(task)
    if not kept:
        raise ValueError("none of the images can be read")
    return ImageFiles(kept, classes)


def label_by_folder(
    images: Sequence[Path], paths: Sequence[Path], names: Sequence[str] | None, num_classes: int
) -> list[int]:
    """The class of each file in the head, by its folder's name or, failing that, its place.

    Raises:
        ValueError: if the folders are not the model's classes.
    """
    if len(images) != 1 or not images[0].is_dir():
        raise ValueError("--labelled needs one folder, which has a folder for each class")
    folders = [path.relative_to(images[0]).parts[0] for path in paths]
    loose = [path for path in paths if path.parent == images[0]]
    if loose:
        raise ValueError(f"--labelled: {loose[0]} lies in no class's folder")
    classes = sorted(set(folders))
    if names is not None and set(classes) <= set(names):
        return [list(names).index(folder) for folder in folders]
    if len(classes) != num_classes:
        raise ValueError(
            f"--labelled: {images[0]} has {len(classes)} classes and the model {num_classes}; name "
            "the folders as the model's classes, or give a folder for each of them"
        )
    return [classes.index(folder) for folder in folders]
