"""Where commands write what comes of images; what can't be is said before the work, not after."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def check_picture(option: str, path: Path, images: Sequence[Path]) -> None:
    """Refuses a file that can't become a picture of images.

    Args:
        option: of the command line, for messages.
        path: the file; its suffix decides the format.
        images: the files of the images.

    Raises:
        ValueError: Pillow writes no RGB pictures with that suffix, a folder has that name, or it is
            one of the images.
    """
    file_format = Image.registered_extensions().get(path.suffix.lower(), "")
    try:  # of the formats that Pillow knows it writes some, and of those not all hold colours
        Image.new("RGB", (64, 64)).save(io.BytesIO(), file_format)
    except (KeyError, OSError, ValueError):
        fault = "no picture format has that ending; .png is one"
        raise ValueError(f"{option} {path}: {fault}") from None
    if path.is_dir():
        raise ValueError(f"{option} {path}: there is a folder of that name")
    _check_spared(option, [path], images)


def is_folder(given: Path) -> bool:
    """Whether results go into a folder, one file an image, rather than into a single file."""
    return not given.suffix or given.is_dir()


def picture_paths(option: str, given: Path, images: Sequence[Path]) -> list[Path]:
    """As `result_paths`, of pictures: a single one is what `check_picture` lets pass."""
    paths = result_paths(option, given, images)
    if not is_folder(given):
        check_picture(option, given, images)
    return paths


def result_paths(
    option: str, given: Path, images: Sequence[Path], suffix: str = ".png"
) -> list[Path]:
    """The file that the result of each image goes to.

    Args:
        option: of the command line, for messages.
        given: that file, of a single image; or the folder for one file an image, under its name
            and, where images bear one name, its number.
        images: the files of the images.
        suffix: of the files in a folder.

    Raises:
        ValueError: several images are to go into one file, a file has the folder's name, or one of
            the images would be replaced.
    """
    if not is_folder(given):
        if len(images) > 1:
            raise ValueError(f"{len(images)} images don't fit one picture: give {option} a folder")
        paths = [given]
    else:
        if given.is_file():
            raise ValueError(f"{option} {given}: a folder is needed, and a file has that name")
        stems = [image.stem for image in images]
        if len({stem.casefold() for stem in stems}) < len(stems):
            stems = [f"{i:04}-{stem}" for i, stem in enumerate(stems, 1)]
        paths = [given / f"{stem}{suffix}" for stem in stems]
    _check_spared(option, paths, images)
    return paths


def _check_spared(option: str, paths: Sequence[Path], images: Sequence[Path]) -> None:
    read = {image.resolve() for image in images}
    if replaced := [path for path in paths if path.resolve() in read]:
        raise ValueError(f"{option}: {replaced[0]} is one of the images; choose another place")
