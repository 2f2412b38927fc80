"""Formats of image files: what is read, what is refused by its name, and what folders take."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vmamba_jax.data import DamagedRecordError, open_source
from vmamba_jax.data.decode import EXTENSIONS, decode_image
from vmamba_jax.predict import find_images


def encoded(kind: str, **options) -> bytes:
    stream = io.BytesIO()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :, 0] = 200
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "needs"), [("GIF", None), ("JPEG2000", "jpg_2000"), ("AVIF", "avif")]
)
def test_gif_jpeg_2000_and_avif_are_read(kind: str, needs: str | None):
    if needs is not None and needs not in features.get_supported():
        pytest.skip(f"this Pillow has no {kind}")
    image = decode_image(encoded(kind), "photo")
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.size == (16, 16)
    pixels = np.asarray(image).astype(int)
    assert abs(pixels[2, 8, 0] - 200) < 20
    assert pixels[13, 8, 0] < 20


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(stream.getvalue(), "moving.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("begins", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_other_formats_are_refused_by_their_name(
    begins: bytes, name: str, on_disk: bool, tmp_path: Path
):
    data = begins + b"\0" * 64
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(DamagedRecordError, match=f"{name} can't be read here: convert it"):
        decode_image(path if on_disk else data, "photo.jpg")


def test_garbage_is_told_in_words_of_the_formats_and_not_of_the_machine():
    with pytest.raises(DamagedRecordError, match=r"not a readable image .*JPEG, PNG") as error:
        decode_image(b"garbage" * 9, "photo.jpg")
    assert "0x" not in str(error.value)


def test_training_and_predicting_take_the_same_files(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for ending in EXTENSIONS:
            (tmp_path / "train" / folder / f"photo{ending.upper()}").write_bytes(b"")
        (tmp_path / "train" / folder / "notes.txt").write_text("no image")
    assert len(open_source("image_folder", tmp_path, "train")) == 2 * len(EXTENSIONS)
    assert len(find_images([tmp_path])) == 2 * len(EXTENSIONS)
