"""Images of other channels than RGB and of more than 8 bits: read, cut, normalised, refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from vmamba_jax.data import DataError, EvalTransform, TrainTransform, open_source
from vmamba_jax.data.bands import Bands
from vmamba_jax.data.decode import decode_image
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.preprocessing import Preprocessing, for_channels

_RNG = np.random.default_rng(0)
_GREY16 = _RNG.integers(0, 1 << 16, (12, 18), np.uint16)
_FIVE16 = _RNG.integers(0, 1 << 16, (12, 18, 5), np.uint16)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def picture(array: np.ndarray, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form)
    return stream.getvalue()


GREYS = {
    "png": picture(_GREY16, "PNG"),
    "tiff": picture(_GREY16, "TIFF"),
    "pgm": b"P5 18 12 65535\n" + _GREY16.astype(">u2").tobytes(),
    "npy": npy(_GREY16),
}


@pytest.mark.parametrize("name", GREYS)
def test_a_grey_image_of_16_bits_keeps_them_in_one_channel(name: str):
    image = decode_image(GREYS[name], name, 1)
    assert isinstance(image, Bands)
    np.testing.assert_array_equal(
        np.asarray(image)[:, :, 0], _GREY16.astype(np.float32) / np.float32(65535)
    )


@pytest.mark.parametrize("name", GREYS)
def test_a_grey_image_of_16_bits_makes_an_rgb_image(name: str):
    pixels = np.asarray(decode_image(GREYS[name], name))
    whole = pixels if name == "npy" else pixels / 255
    for channel in range(3):
        np.testing.assert_allclose(whole[:, :, channel], _GREY16 / 65535, atol=0.5 / 255 + 1e-6)


FIVE = {
    "npy": npy(_FIVE16),
    "npy by columns": npy(np.asfortranarray(_FIVE16)),
    "tiff": tiff(_FIVE16, photometric="minisblack", planarconfig="contig"),
    "tiff of planes": tiff(
        np.moveaxis(_FIVE16, -1, 0), photometric="minisblack", planarconfig="separate"
    ),
    "tiff of pages": tiff(np.moveaxis(_FIVE16, -1, 0), photometric="minisblack"),
    "deflated tiff": tiff(
        _FIVE16, photometric="minisblack", planarconfig="contig", compression="zlib"
    ),
}


@pytest.mark.parametrize("name", FIVE)
def test_every_band_is_read(name: str, tmp_path: Path):
    (tmp_path / "a").write_bytes(FIVE[name])
    for data in (FIVE[name], tmp_path / "a"):
        image = decode_image(data, name, 5)
        np.testing.assert_array_equal(image, _FIVE16.astype(np.float32) / np.float32(65535))


def test_numbers_that_are_no_integers_stay_as_they_are():
    values = _RNG.standard_normal((6, 7, 2), np.float32)
    for data in (npy(values), npy(values.astype(np.float64)), tiff(values, planarconfig="contig")):
        np.testing.assert_array_equal(decode_image(data, "a", 2), values)


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (npy(_FIVE16), 4, r"it has 5 channels \(12, 18, 5\), not 4"),
        (FIVE["tiff"], 3, "5 channels"),
        (picture(_FIVE16[:, :, :3].astype(np.uint8), "PNG"), 5, r"3 channels \(RGB\), not 5"),
        (npy(_FIVE16)[:-1], 5, "cut short"),
        (npy(_FIVE16.astype(np.int32)), 5, "convert them to uint8, uint16 or float32"),
        (npy(np.full((4, 4, 2), np.nan, np.float32)), 2, "not all of its values are finite"),
        (npy(np.array([{}] * 4)), 2, "no image"),
        (tiff(np.zeros((2, 3, 8, 8), np.uint8), photometric="minisblack"), 2, "not one image's"),
        (b"\x93NUMPY\x01\x00" + b"x" * 40, 2, ""),
    ],
)
def test_a_file_that_is_no_such_image_is_named_with_the_reason(data, channels, message):
    with pytest.raises(DamagedRecordError, match=rf"photo: .*{message}"):
        decode_image(data, "photo", channels)


def test_a_npy_file_can_claim_no_memory():
    head = npy(np.zeros((8, 8, 2), np.uint16))
    claim = head.replace(b"(8, 8, 2), }", b"(8, 8, 9999999999), }", 1)[:128]
    with pytest.raises(DamagedRecordError):
        decode_image(claim, "bomb", 2)


def test_bands_are_cut_resized_and_normalised_like_the_channels_of_a_photograph():
    colours = _RNG.integers(0, 256, (40, 60, 3), np.uint8)
    photo, bands = Image.fromarray(colours), Bands.from_array(colours)
    for transform in (
        EvalTransform(24),
        EvalTransform((16, 32), 0.9),
        TrainTransform(24, rand_augment=None),
    ):
        ours, theirs = (transform(image, np.random.default_rng(1)) for image in (bands, photo))
        assert ours.shape == theirs.shape
        # Bytes are rounded and clipped between the passes of the resize, and bands are not.
        theirs = theirs / 255 if theirs.dtype == np.uint8 else theirs
        assert np.abs(ours - theirs).mean() < 0.02
    assert EvalTransform((16, 32))(photo).shape == (16, 32, 3)
    with pytest.raises(DataError, match=r"choose data\.augmentation light"):
        TrainTransform(24)(bands, np.random.default_rng(0))
    with pytest.raises(ValueError, match="1 values of mean and std"):
        EvalTransform(24, mean=(0.5,), std=(0.5,))(photo)


def test_statistics_of_rgb_serve_other_channels_as_its_kernels_do():
    assert for_channels((0.1, 0.2, 0.6), 1) == pytest.approx((0.3,))
    assert for_channels((0.1, 0.2, 0.6), 5) == (0.1, 0.2, 0.6, 0.1, 0.2)
    assert for_channels((0.1, 0.2), 2) == (0.1, 0.2)
    with pytest.raises(ValueError, match="2 values of mean or std for images of 4 channels"):
        for_channels((0.1, 0.2), 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": (32, 1 << 20)}, "image_size must be"),
        ({"crop": 0.0}, "crop must lie"),
        ({"mean": (0.5,)}, "one value a channel"),
        ({"std": (0.5, 0.0, 0.5)}, "positive"),
    ],
)
def test_a_preprocessing_that_can_not_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)


def test_a_folder_of_arrays_is_a_data_set(tmp_path: Path):
    for split in ("train", "val"):
        for name in ("field", "forest"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.npy").write_bytes(npy(_FIVE16))
    source = open_source("image_folder", tmp_path, "train", 5)
    assert len(source) == 2
    np.testing.assert_array_equal(source[1]["image"], _FIVE16 / np.float32(65535))
    with pytest.raises(DataError, match=r"set data\.channels to 3"):
        open_source("digits", tmp_path, "train", 1)
