"""Classifies image files with the released evaluation protocol."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmamba_jax.data.augment import EvalTransform
from vmamba_jax.data.bands import Bands
from vmamba_jax.data.decode import EXTENSIONS, decode_image
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.models import VSSM
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.typing import Variables

_ROW_HEIGHT, _PICTURE_WIDTH = 224, 760


class Prediction(NamedTuple):
    """One class that an image may belong to.

    Attributes:
        label: index of the class in the head.
        name: of the class.
        probability: softmax of its logit; of the only one, its sigmoid.
    """

    label: int
    name: str
    probability: float


class Result(NamedTuple):
    """What came of one image.

    Attributes:
        path: the file.
        predictions: the most probable classes, best first; empty if it could not be read.
        error: why it could not be read, else None.
    """

    path: Path
    predictions: list[Prediction]
    error: str | None = None


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as given, and folders as the image files in and below them, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in EXTENSIONS)
            found.extend(p for p in inside if p.is_file())
        else:
            found.append(path)
    return found


def predict(
    model: VSSM,
    variables: Variables,
    paths: Sequence[Path],
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int = 16,
    top: int = 5,
) -> Iterator[Result]:
    """Classifies image files, a batch at a time.

    Args:
        model: the classifier.
        variables: its weights.
        paths: image files. One that can't be read gives a `Result` with an error.
        class_names: names of the classes in the head's order.
        preprocessing: what the images go through.
        batch_size: images at a time.
        top: how many classes to name.

    Yields:
        One result a path, in order.
    """
    transform = EvalTransform.of(preprocessing)
    batch_size, channels = min(batch_size, len(paths)), model.config.in_chans

    @jax.jit
    def probabilities(variables: Variables, images: jax.Array) -> jax.Array:
        logits = cast("jax.Array", model.apply(variables, images))  # pyright: ignore[reportArgumentType]
        # The softmax of one logit is 1 whatever it is.
        return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits, axis=-1)

    for start in range(0, len(paths), batch_size):
        results: list[Result] = []
        # One shape for every batch, so that the model compiles once.
        images = np.zeros((batch_size, *preprocessing.size, channels), np.float32)
        for i, path in enumerate(paths[start : start + batch_size]):
            try:
                images[i] = transform(decode_image(path, str(path), channels))
                results.append(Result(path, []))
            except DamagedRecordError as error:
                results.append(Result(path, [], error.reason))
        if all(result.error for result in results):
            yield from results
            continue
        scores = np.asarray(probabilities(variables, images))
        for result, row in zip(results, scores[: len(results)], strict=True):
            if result.error is None:
                for i in map(int, np.argsort(-row, kind="stable")[:top]):
                    result.predictions.append(Prediction(i, class_names[i], float(row[i])))
            yield result


def draw(results: Sequence[Result], path: Path, channels: int = 3) -> None:
    """Saves a picture: a row for each image with its classes as bars.

    Args:
        results: of `predict`; unreadable images are skipped.
        path: where to; the suffix decides the format.
        channels: of the images.

    Raises:
        ValueError: for a suffix that Pillow can't write.
    """
    shown = [result for result in results if result.error is None]
    picture = Image.new("RGB", (_PICTURE_WIDTH, _ROW_HEIGHT * max(len(shown), 1)), "white")
    font, canvas = ImageFont.load_default(size=14), ImageDraw.Draw(picture)
    for row, result in enumerate(shown):
        top = row * _ROW_HEIGHT
        image = decode_image(result.path, str(result.path), channels)
        image = image.preview() if isinstance(image, Bands) else image
        image.thumbnail((_ROW_HEIGHT, _ROW_HEIGHT))
        picture.paste(image, ((_ROW_HEIGHT - image.width) // 2, top))
        left, right = _ROW_HEIGHT + 16, _PICTURE_WIDTH - 70
        step = _ROW_HEIGHT / max(len(result.predictions), 1)
        for i, prediction in enumerate(result.predictions):
            y = top + i * step
            name = prediction.name.split(",")[0]
            canvas.text((left, y + 6), name, fill="black", font=font)
            length = (right - left) * prediction.probability
            canvas.rectangle((left, y + 26, left + max(length, 1), y + 36), fill=(31, 119, 180))
            canvas.text(
                (right + 8, y + 22), f"{prediction.probability:.1%}", fill="black", font=font
            )
    picture.save(path)


def as_json(result: Result) -> dict[str, Any]:
    """A result as JSON types."""
    if result.error is not None:
        return {"image": str(result.path), "error": result.error}
    predictions = [prediction._asdict() for prediction in result.predictions]
    return {"image": str(result.path), "predictions": predictions}
