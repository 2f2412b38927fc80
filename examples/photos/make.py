"""Makes this folder's pictures and label maps from photographs that scikit-image ships.

``pip install scikit-image && python examples/photos/make.py`` writes the same files again. Each
photograph is cut in two: overlapping tiles of one part are for training, crops of the other for
validation; no pixel is in both.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import data, filters, segmentation

FOLDER = Path(__file__).parent
CLASSES = ("background", "cat", "cup", "coin")
CAT, CUP, COIN, NEITHER = 1, 2, 3, 255
TILE, CROP = 160, 96
Picture = tuple[np.ndarray, np.ndarray]
"""Photograph (H, W, 3) and label map (H, W), bytes."""


def cat() -> Picture:
    """Outlined by hand; what is out of focus below the chin is left open."""
    photo = data.chelsea()
    label = Image.new("L", photo.shape[1::-1])
    draw = ImageDraw.Draw(label)
    left = [(290, 300), (0, 300), (0, 130), (20, 118), (32, 85), (33, 50), (42, 0)]
    right = [(398, 0), (375, 35), (355, 75), (362, 120), (360, 150), (348, 178), (325, 200)]
    draw.polygon([*left, *right, (312, 240)], fill=CAT)
    draw.polygon([(312, 245), (390, 245), (385, 300), (230, 300), (290, 275)], fill=NEITHER)
    return photo, np.asarray(label)


def cup() -> Picture:
    """Two ellipses, saucer and rim, and the handle of the spoon; at three quarters of the size."""
    photo = data.coffee()
    label = Image.new("L", photo.shape[1::-1])
    draw = ImageDraw.Draw(label)
    draw.ellipse((77, 56, 479, 388), fill=CUP)
    draw.ellipse((173, 18, 405, 207), fill=CUP)
    draw.polygon([(396, 68), (424, 68), (424, 82), (412, 118), (400, 118)], fill=CUP)
    return resized(photo, np.asarray(label), 0.75)


def coins() -> Picture:
    """Flooded from what is surely dark and surely bright, over the edges; at 1.25 of the size."""
    photo = data.coins()[:, :378]
    sure = np.select([photo < 30, photo > 150], [1, 2], 0)
    inside = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(photo), sure) == 2)
    inside = ndimage.binary_opening(inside, iterations=3)
    label = np.where(inside, COIN, 0).astype(np.uint8)
    return resized(np.repeat(photo[..., None], 3, axis=2), label, 1.25)


def resized(photo: np.ndarray, label: np.ndarray, factor: float) -> Picture:
    """Both at `factor` times their size."""
    size = round(factor * photo.shape[1]), round(factor * photo.shape[0])
    return (
        np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC)),
        np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST)),
    )


def tiles(picture: Picture, side: int, rows: int, columns: int) -> Iterator[Picture]:
    """Squares in `rows` x `columns`, evenly spread from edge to edge."""
    photo, label = picture
    for top in np.linspace(0, label.shape[0] - side, rows).astype(int):
        for left in np.linspace(0, label.shape[1] - side, columns).astype(int):
            window = slice(top, top + side), slice(left, left + side)
            yield photo[window], label[window]


def part(picture: Picture, rows: slice, columns: slice) -> Picture:
    """A rectangle of both."""
    return picture[0][rows, columns], picture[1][rows, columns]


def save(split: str, name: str, pictures: Iterator[Picture]) -> None:
    """Writes JPEG and PNG files of the same name."""
    images, labels = FOLDER / "images" / split, FOLDER / "annotations" / split
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    for number, (photo, label) in enumerate(pictures):
        Image.fromarray(photo).save(images / f"{name}_{number:02}.jpg", quality=90)
        Image.fromarray(label).save(labels / f"{name}_{number:02}.png", optimize=True)


def main() -> None:
    """Writes both splits and the list of classes."""
    for folder in ("images", "annotations"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
    (FOLDER / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    every = slice(None)
    for name, picture, training, validation, grid in (
        ("cat", cat(), (slice(CROP, None), every), (slice(CROP), every), ((2, 4), (1, 4))),
        ("cup", cup(), (every, slice(250)), (every, slice(250, 250 + CROP)), ((3, 3), (3, 1))),
        ("coin", coins(), (every, slice(376)), (every, slice(376, None)), ((3, 4), (3, 1))),
    ):
        save("training", name, tiles(part(picture, *training), TILE, *grid[0]))
        save("validation", name, tiles(part(picture, *validation), CROP, *grid[1]))


if __name__ == "__main__":
    main()
