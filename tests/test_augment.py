"""Augmentation: RandAugment pixel for pixel, everything else against its definition."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vmamba_jax.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DigitsTransform,
    EvalTransform,
    TrainTransform,
    normalize,
    random_resized_crop,
)
from vmamba_jax.data.randaugment import (
    OPERATIONS,
    RandAugment,
    apply_operation,
    operation_argument,
)
from vmamba_jax.preprocessing import normalize_images

GOLDEN = np.load(Path(__file__).parent / "data" / "randaugment.npz")
META = json.loads(str(GOLDEN["meta"]))
PHOTO = Image.fromarray(GOLDEN["image"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows with x, green with y: where a crop came from can be read off its pixels."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("case", META["arguments"])
def test_randaugment_equals_the_golden_pixels(case: str):
    name, magnitude = case.split("/")
    argument = operation_argument(name, float(magnitude))
    expected = META["arguments"][case]
    assert argument == (expected[0] if expected else 0.0)
    result = np.asarray(apply_operation(name, PHOTO, argument))
    if case in META["raises"]:  # no bit is kept: black, as Pillow gave until version 12
        np.testing.assert_array_equal(result, np.zeros_like(GOLDEN["image"]))
    else:
        np.testing.assert_array_equal(result, GOLDEN[case])


def test_the_operations_are_those_of_the_recipe():
    assert list(OPERATIONS) == META["operations"]
    policy = RandAugment()
    assert (policy.magnitude, policy.magnitude_std) == (META["magnitude"], META["magnitude_std"])
    assert (policy.num_layers, policy.probability) == (META["num_layers"], META["op_probability"])


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_a_signed_operation_goes_both_ways(name: str):
    there, back = (operation_argument(name, 9.0, sign) for sign in (1.0, -1.0))
    assert there == -back != 0
    # The mirror image of one way is the other way on the mirror image, up to resampling.
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    if name in ("ShearY", "TranslateYRel"):
        mirror = Image.Transpose.FLIP_TOP_BOTTOM
    one = apply_operation(name, PHOTO, there)
    other = apply_operation(name, PHOTO.transpose(mirror), back).transpose(mirror)
    difference = np.abs(np.asarray(one, np.int32) - np.asarray(other, np.int32))
    if name.startswith("Translate"):
        assert np.median(difference) <= 2
    else:
        assert np.median(difference) <= 8


@pytest.mark.parametrize(
    "name",
    ["ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"],
)
def test_an_enhancement_weakens_as_much_as_it_strengthens(name: str):
    assert operation_argument(name, 5.0, 1.0) == pytest.approx(1.45)
    assert operation_argument(name, 5.0, -1.0) == pytest.approx(0.55)
    assert operation_argument(name, 10.0, -1.0) == pytest.approx(0.1)


def test_randaugment_draws_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def record(name: str, image: Image.Image, argument: float) -> Image.Image:
        calls.append((name, argument))
        return image

    monkeypatch.setattr("vmamba_jax.data.randaugment.apply_operation", record)
    policy, generator, runs = RandAugment(), rng(), 6000
    for _ in range(runs):
        policy(PHOTO, generator)
    # Two draws an image, each applied half of the time, over fifteen operations alike.
    assert len(calls) / runs == pytest.approx(1.0, abs=0.04)
    counts = np.array([sum(name == op for name, _ in calls) for op in OPERATIONS])
    np.testing.assert_allclose(counts / len(calls), 1 / 15, atol=0.015)
    # 30 degrees at magnitude 10, N(9, 0.5) clipped at 10, either way round.
    degrees = np.array([argument for name, argument in calls if name == "Rotate"])
    assert np.mean(np.abs(degrees)) == pytest.approx(27, abs=0.4)
    assert np.std(np.abs(degrees)) == pytest.approx(1.5, abs=0.25)
    assert np.abs(degrees).max() == 30.0
    assert np.mean(degrees > 0) == pytest.approx(0.5, abs=0.08)


def test_an_image_depends_on_its_generator_alone():
    transform = TrainTransform(size=32)
    one, again, other = (transform(PHOTO, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8


def test_random_crops_cover_the_promised_share_and_shape():
    image, generator = gradient(240, 240), rng()
    shares, ratios = [], []
    for _ in range(800):
        crop = np.asarray(random_resized_crop(image, 64, (0.08, 1.0), (3 / 4, 4 / 3), generator))
        # The corners' colours tell where the crop began and ended.
        width = np.ptp(crop[32, :, 0].astype(float)) / 255 * 240 * 64 / 63
        height = np.ptp(crop[:, 32, 1].astype(float)) / 255 * 240 * 64 / 63
        shares.append(width * height / (240 * 240))
        ratios.append(width / height)
    assert 0.06 < min(shares) < 0.12
    assert 0.9 < max(shares) < 1.06
    # Crops that stick out are drawn again: of all shares and log-ratios alike in probability,
    # those with share < min(ratio, 1 / ratio) remain, and their mean share is 0.478.
    assert np.mean(shares) == pytest.approx(0.478, abs=0.03)
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.43
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (1, 1), (3, 2)])
def test_extreme_images_still_give_a_crop(size: tuple[int, int]):
    image = gradient(*size)
    assert random_resized_crop(image, 16, (0.9, 1.0), (3 / 4, 4 / 3), rng()).size == (16, 16)
    assert TrainTransform(size=16)(image, rng()).shape == (16, 16, 3)
    assert EvalTransform(size=16)(image).shape == (16, 16, 3)


def test_a_flip_happens_half_of_the_time():
    transform = TrainTransform(size=16, scale=(1.0, 1.0), rand_augment=None)
    generator, image = rng(), gradient(16, 16)
    rows = [transform(image, generator)[8, :, 0] for _ in range(1000)]
    flipped = [row[0] > row[-1] for row in rows]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.05)


def test_normalisation_is_that_of_imagenet():
    expected = (GOLDEN["image"] / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(normalize(PHOTO, IMAGENET_MEAN, IMAGENET_STD), expected, atol=2e-6)
    bytes_or_not = (GOLDEN["image"], GOLDEN["image"].astype(np.float32) / 255)
    for images in bytes_or_not:
        (given,) = normalize_images(jnp.asarray(images[None]), IMAGENET_MEAN, IMAGENET_STD)
        np.testing.assert_allclose(given, expected, atol=2e-6)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (300, 1200)])
def test_evaluation_resizes_to_256_and_crops_the_centre(width: int, height: int):
    image = gradient(width, height)
    short = min(width, height)
    resized = image.resize(
        (int(256 * width / short), int(256 * height / short)), Image.Resampling.BICUBIC
    )
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = resized.crop((left, top, left + 224, top + 224))
    np.testing.assert_array_equal(
        EvalTransform()(image), normalize(expected, IMAGENET_MEAN, IMAGENET_STD)
    )
    np.testing.assert_array_equal(EvalTransform().values(image), np.asarray(expected))


def test_the_digits_move_a_little_and_stay_whole():
    digit = Image.new("RGB", (32, 32))
    digit.paste((255, 255, 255), (12, 8, 20, 24))
    transform, generator = DigitsTransform(), rng()
    mass = np.asarray(digit).sum() / 255
    centers = []
    for _ in range(300):
        moved = transform(digit, generator) / 255
        assert moved.sum() == pytest.approx(mass, rel=0.25)  # 0.9 ** 2 to 1.1 ** 2
        y, x = np.indices((32, 32)) + 0.5
        centers.append([(axis * moved[..., 0]).sum() / moved[..., 0].sum() for axis in (x, y)])
    shifts = np.array(centers) - 16
    assert np.abs(shifts).max() < 0.06 * 32 + 0.1
    assert np.abs(shifts).max() > 1.5
    np.testing.assert_allclose(shifts.mean(0), 0, atol=0.25)
