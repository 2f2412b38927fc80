"""The views of the analyze command: each computes, draws and writes, and stops when told to."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from vmamba_jax.analysis.activation import activation_maps
from vmamba_jax.analysis.erf import effective_receptive_field
from vmamba_jax.analysis.features import stage_maps
from vmamba_jax.analysis.figures import (
    draw_activation_maps,
    draw_receptive_fields,
    draw_resolutions,
    draw_stage_maps,
)
from vmamba_jax.analysis.files import ImageFiles
from vmamba_jax.analysis.resolution import Resolution, resolution_sweep
from vmamba_jax.data.augment import normalize
from vmamba_jax.local_path import local_path
from vmamba_jax.models import VSSM
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.typing import Variables


class ResultFolder:
    """Where results go; made with the first of them.

    Args:
        path: the folder.
        suffix: format of the figures.
        console: told of each figure.
    """

    def __init__(self, path: Path, suffix: str, console: Console) -> None:
        self._path, self._suffix, self._console = local_path(path), suffix, console

    def write(self, name: str, figure: Any, arrays: dict[str, Any]) -> None:
        """A figure and the arrays behind it."""
        self._write_figure(name, figure)
        np.savez_compressed(self._path / f"{name}.npz", **arrays)

    def write_json(self, name: str, figure: Any, rows: Sequence[Resolution]) -> None:
        """A figure and the numbers behind it."""
        self._write_figure(name, figure)
        text = json.dumps([row._asdict() for row in rows], indent=1)
        (self._path / f"{name}.json").write_text(text + "\n")

    def _write_figure(self, name: str, figure: Any) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        picture = self._path / f"{name}.{self._suffix}"
        figure.savefig(picture, dpi=200)
        written = f"written: {escape(str(picture))}"
        self._console.print(written, soft_wrap=True, highlight=False)


class Views:
    """One model before some images."""

    def __init__(
        self,
        model: VSSM,
        variables: Variables,
        files: ImageFiles,
        preprocessing: Preprocessing,
        progress: Progress,
        stop: StopRequest,
        folder: ResultFolder,
    ) -> None:
        self._model, self._variables, self._files = model, variables, files
        self._preprocessing, self._size = preprocessing, preprocessing.size
        self._progress, self._stop, self._folder = progress, stop, folder

    def receptive_fields(self, stages: Sequence[int]) -> None:
        """The mean over all images, stage by stage."""
        task = self._progress.add_task("receptive field", total=len(stages) * len(self._files))
        fields, arrays, seen = {}, {}, 0

        def batches() -> Iterator[np.ndarray]:
            nonlocal seen
            for i in range(len(self._files)):
                if i and self._stop.name:
                    return
                seen = i + 1
                yield self._normalised(self._picture(i))[None]
                self._progress.advance(task)

        for stage in stages:
            if self._stop.name:
                break
            field = effective_receptive_field(self._model, self._variables, batches(), stage=stage)
            fields[f"stage {stage}, {seen} images"] = field
            arrays |= {f"stage_{stage}": field, f"stage_{stage}_images": seen}
        if fields:
            self._folder.write("erf", draw_receptive_fields(fields), arrays)

    def activations(
        self,
        stages: Sequence[int],
        block: int,
        queries: Sequence[tuple[int, int]],
        pictures: int,
    ) -> None:
        """The weights of the scan, image by image."""
        height, width = self._size
        config = self._model.config
        shares = [((y + 0.5) / height, (x + 0.5) / width) for y, x in queries]
        for i, picture in self._pictures("activation maps", pictures):
            image, maps = self._normalised(picture), {}
            for stage in stages:
                rows, columns = config.feature_size(height, width, stage)
                at = [(int(y * rows), int(x * columns)) for y, x in shares]
                maps[f"stage {stage}"] = activation_maps(
                    self._model, self._variables, image, at, stage=stage, block=block
                )
            pixels = np.asarray(picture, np.float32) / 255
            figure = draw_activation_maps(pixels, maps, shares, config.forward_type)
            arrays = {
                f"{title.replace(' ', '_')}_{name}": np.asarray(array)
                for title, found in maps.items()
                for name, array in found._asdict().items()
            }
            self._folder.write(f"activation_{self._name(i)}", figure, arrays)

    def features(self, pictures: int) -> None:
        """The stages' maps, image by image."""
        for i, picture in self._pictures("stage maps", pictures):
            image = self._normalised(picture)[None]
            maps = [stage[0] for stage in stage_maps(self._model, self._variables, image)]
            figure = draw_stage_maps(np.asarray(picture, np.float32) / 255, maps)
            arrays = {f"stage_{stage}": array for stage, array in enumerate(maps)}
            self._folder.write(f"features_{self._name(i)}", figure, arrays)

    def resolutions(
        self, sizes: Sequence[int], labelled: bool, batch_size: int
    ) -> list[Resolution]:
        """The sweep over image sizes."""
        task = self._progress.add_task("resolutions", total=len(sizes) * len(self._files))
        rows: list[Resolution] = []

        def advance(images: int) -> None:
            self._progress.advance(task, images)
            if self._stop.name:
                raise KeyboardInterrupt

        try:
            for row in resolution_sweep(
                self._model,
                self._variables,
                self._files,
                sizes,
                preprocessing=self._preprocessing,
                labelled=labelled,
                batch_size=batch_size,
                on_images=advance,
            ):
                rows.append(row)
        except KeyboardInterrupt:
            pass  # the sizes before are kept
        if rows:
            self._folder.write_json("resolution", draw_resolutions(rows), rows)
        return rows

    def _pictures(self, what: str, count: int) -> Iterator[tuple[int, Image.Image]]:
        count = min(count, len(self._files))
        task = self._progress.add_task(what, total=count)
        for i in range(count):
            if self._stop.name:
                return
            yield i, self._picture(i)
            self._progress.advance(task)

    def _picture(self, index: int) -> Image.Image:
        """The image, resized and cropped about its centre."""
        height, width = self._size
        image = self._files[index]["image"]
        assert isinstance(image, Image.Image)  # of RGB
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)

    def _normalised(self, picture: Image.Image) -> np.ndarray:
        return normalize(picture, self._preprocessing.mean, self._preprocessing.std)

    def _name(self, index: int) -> str:
        """Of files of the same name in several folders each has its own."""
        return f"{index}_{self._files.paths[index].stem}"
