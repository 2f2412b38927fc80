"""Images with label maps: what is read, what augmentation does to it, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmamba_jax.data import (
    DataError,
    LabelMapFolder,
    PhotometricDistortion,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    eval_batches,
    train_iterator,
)

RAW: dict = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255), "distortion": None}
"""Pixels as the bytes they were, in training."""


def write(
    root: Path, name: str, image: np.ndarray, label: np.ndarray, split: str = "training"
) -> None:
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "images" / split / f"{name}.png")
    Image.fromarray(label).save(root / "annotations" / split / f"{name}.png")


def pair(seed: int, height: int = 12, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """An image that shows its label map: red is 60 times the label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, (height, width), np.uint8)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    image[..., 0] = 60 * label
    return image, label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(5):
        write(tmp_path, str(seed), *pair(seed))
    (tmp_path / "classes.txt").write_text("sky\ntree\n\nroad\n")
    return tmp_path


def test_images_and_label_maps_are_paired_by_name(folder: Path) -> None:
    source = LabelMapFolder(folder, "training")
    assert list(source.class_names) == ["sky", "tree", "road"]
    assert len(source) == 5
    for index in range(5):
        image, label = pair(index)
        np.testing.assert_array_equal(source[index]["image"], image)
        np.testing.assert_array_equal(source[index]["label"], label)


def test_ade20k_is_recognised_and_its_zero_means_no_class(tmp_path: Path) -> None:
    image, _ = pair(0)
    stored = np.arange(192, dtype=np.uint8).reshape(12, 16) % 151
    stored[0, 0] = 255
    write(tmp_path, "ADE_train_1", image, stored)
    rows = [f"{i}\t0.1\t10\t1\tname {i}, synonym {i}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    source = LabelMapFolder(tmp_path, "training")
    assert len(source.class_names) == 150
    assert source.class_names[149] == "name 150"
    expected = np.where((stored == 0) | (stored == 255), 255, stored.astype(int) - 1)
    np.testing.assert_array_equal(source[0]["label"], expected)


def test_a_palette_holds_labels_by_index(folder: Path) -> None:
    _, label = pair(3)
    coloured = Image.fromarray(label, "P")
    coloured.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    coloured.save(folder / "annotations/training/3.png")
    np.testing.assert_array_equal(LabelMapFolder(folder, "training")[3]["label"], label)


def _spoil(kind: str) -> Callable[[Path], object]:
    def label(root: Path, array: np.ndarray) -> None:
        Image.fromarray(array).save(root / "annotations/training/2.png")

    return {
        "empty": lambda root: [p.unlink() for p in (root / "images/training").iterdir()],
        "no folder": lambda root: (root / "annotations").rename(root / "labels"),
        "no label": lambda root: (root / "annotations/training/2.png").unlink(),
        "size": lambda root: label(root, np.zeros((16, 12), np.uint8)),
        "range": lambda root: label(root, np.full((12, 16), 3, np.uint8)),
        "colours": lambda root: label(root, np.zeros((12, 16, 3), np.uint8)),
        "wide": lambda root: label(root, np.zeros((12, 16), np.uint16)),
        "no classes": lambda root: (root / "classes.txt").unlink(),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "images/training has no image"),
        ("no folder", "annotations/training: expected .*annotations/training/NAME.png"),
        ("no label", r"1 of 5 images in .* have no label map; the first lacks .*2\.png"),
        ("size", r"2\.png is 12x16 pixels and its image .*2\.png is 16x12"),
        ("range", r"2\.png has the labels 3, but there are 3 classes.*reduce-zero-label"),
        ("colours", r"2\.png: this label map is a picture in colours \(RGB\)"),
        ("wide", r"2\.png: this label map is of more than 8 bits"),
        ("no classes", r"write their names into .*classes\.txt.*--data\.num-classes"),
    ],
)
def test_a_folder_that_cannot_be_used_gives_one_clear_error(
    kind: str, message: str, folder: Path
) -> None:
    _spoil(kind)(folder)
    with pytest.raises(DataError, match=message):
        LabelMapFolder(folder, "training")


def test_a_mask_of_0_and_255_is_refused(tmp_path: Path) -> None:
    image, label = pair(0)
    write(tmp_path, "0", image, np.where(label == 0, 0, 255).astype(np.uint8))
    with pytest.raises(DataError, match="hold 0 and 255, and 255 means no class"):
        LabelMapFolder(tmp_path, "training", num_classes=2)


def test_image_and_labels_stay_together_through_crop_flip_and_padding() -> None:
    image, label = (Image.fromarray(array) for array in pair(0, 12, 16))
    transform = SegmentationTrainTransform(size=14, scale=(16, 12), ratio=(1.0, 1.0), **RAW)
    lefts, flips = set(), set()
    for seed in range(40):
        pixels, labels = transform(image, label, np.random.default_rng(seed))
        assert pixels.shape == (14, 14, 3)
        assert (pixels.dtype, labels.dtype) == (np.float32, np.uint8)
        # Twelve rows are there; what is missing at the bottom is zero and belongs to no class.
        np.testing.assert_array_equal(pixels[..., 0][:12], 60.0 * labels[:12])
        np.testing.assert_array_equal(pixels[12:], 0)
        np.testing.assert_array_equal(labels[12:], 255)
        whole = np.asarray(label)
        windows = {
            (left, flip): whole[:, left : left + 14][:, :: -1 if flip else 1]
            for left in range(3)
            for flip in (False, True)
        }
        found = [key for key, window in windows.items() if np.array_equal(window, labels[:12])]
        assert len(found) == 1
        lefts.add(found[0][0])
        flips.add(found[0][1])
    assert lefts == {0, 1, 2}
    assert flips == {False, True}


def test_normalisation_comes_before_padding() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    label = Image.new("L", (4, 4), 1)
    transform = SegmentationTrainTransform(size=6, scale=(4, 4), ratio=(1.0, 1.0), distortion=None)
    pixels, _ = transform(image, label, np.random.default_rng(0))
    mean = np.array([123.675, 116.28, 103.53])
    std = np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(pixels[0, 0], (np.array([10, 20, 30]) - mean) / std, rtol=1e-5)
    np.testing.assert_array_equal(pixels[4:], 0)
    np.testing.assert_array_equal(pixels[:, 4:], 0)


def test_a_crop_of_almost_one_class_is_drawn_again() -> None:
    label = np.zeros((8, 64), np.uint8)
    label[:, 30:34] = 1  # a crop of 8 columns sees half of each only where it holds the strip
    image = Image.fromarray(np.repeat(60 * label[..., None], 3, 2))
    options = {"size": 8, "scale": (64, 8), "ratio": (1.0, 1.0), **RAW}

    def balanced(share: float) -> float:
        transform = SegmentationTrainTransform(max_share=share, **options)
        shares = [
            transform(image, Image.fromarray(label), np.random.default_rng(seed))[1].mean()
            for seed in range(100)
        ]
        return float(np.mean([0.25 < share < 0.75 for share in shares]))

    once, redrawn = balanced(1.01), balanced(0.75)
    assert once < 0.2
    # 11 draws of 5 windows in 57 that hold more than a quarter and less than three.
    assert redrawn > 0.5


def test_ignored_pixels_do_not_count_towards_the_share() -> None:
    label = np.full((4, 4), 255, np.uint8)
    label[0, :2], label[0, 2:] = 0, 1
    transform = SegmentationTrainTransform(size=4, scale=(4, 4), ratio=(1.0, 1.0), **RAW)
    rng = np.random.default_rng(0)
    before = np.random.default_rng(0)
    transform(Image.new("RGB", (4, 4)), Image.fromarray(label), rng)
    for draw in ("uniform", "random"):
        getattr(before, draw)()  # one factor, no choice of window, one coin
    assert rng.random() == before.random()  # one draw was enough


def test_the_scale_is_drawn_uniformly() -> None:
    image, label = Image.new("RGB", (64, 32)), Image.new("L", (64, 32))
    transform = SegmentationTrainTransform(size=64, scale=(128, 32), **RAW)
    heights = [
        int((transform(image, label, np.random.default_rng(seed))[1][:, 0] == 0).sum())
        for seed in range(200)
    ]
    assert min(heights) >= 16
    assert max(heights) <= 64
    assert 36 < np.mean(heights) < 44  # uniform in [16, 64]


class _Forced(np.random.Generator):
    """A generator whose coins all show one side, and whose other draws are given."""

    def __init__(self, coins: list[int], draws: list[float]):
        super().__init__(np.random.PCG64(0))
        self.coins, self.draws = coins, draws

    def integers(self, *_: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.coins.pop(0)

    def uniform(self, low: float, high: float) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        value = self.draws.pop(0)
        assert low <= value <= high
        return value


def distorted(colour: tuple[int, int, int], coins: list[int], draws: list[float]) -> tuple:
    image = PhotometricDistortion()(Image.new("RGB", (2, 2), colour), _Forced(coins, draws))
    pixels = np.asarray(image)
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(value) for value in pixels[0, 0])


# Coins in order: brightness, contrast last?, [contrast], saturation, hue and its turn, [contrast].
@pytest.mark.parametrize(
    ("coins", "draws", "expected"),
    [
        ([0, 0, 0, 0, 0], [], (200, 100, 50)),
        ([1, 0, 0, 0, 0], [-20.5], (179, 79, 29)),
        ([1, 1, 0, 0, 0], [32.0], (232, 132, 82)),
        ([0, 0, 1, 0, 0], [1.5], (255, 150, 75)),
        ([1, 1, 0, 0, 1], [32.0, 0.5], (116, 66, 41)),
        ([1, 0, 1, 0, 0], [32.0, 0.5], (116, 66, 41)),
    ],
)
def test_brightness_and_contrast_are_the_published_arithmetic(
    coins: list[int], draws: list[float], expected: tuple[int, ...]
) -> None:
    assert distorted((200, 100, 50), coins, draws) == expected


def test_saturation_and_hue_turn_in_hsv() -> None:
    # Half the saturation: each channel moves half-way to the largest.
    half = distorted((200, 100, 50), [0, 0, 0, 1, 0], [0.5])
    np.testing.assert_allclose(half, (200, 150, 125), atol=2)
    # 15 units of two degrees take pure red to the orange of 30 degrees.
    assert distorted((255, 0, 0), [0, 0, 0, 0, 1, 15], [])[0] == 255
    np.testing.assert_allclose(
        distorted((255, 0, 0), [0, 0, 0, 0, 1, 15], []), (255, 127.5, 0), atol=4
    )
    np.testing.assert_allclose(
        distorted((255, 0, 0), [0, 0, 0, 0, 1, -15], []), (255, 0, 127.5), atol=4
    )


def test_training_batches_are_determined_by_the_seed_and_resume_exactly(folder: Path) -> None:
    source = LabelMapFolder(folder, "training")
    transform = SegmentationTrainTransform(size=8, scale=(16, 12))

    def batches(seed: int = 0):
        return train_iterator(source, transform, batch_size=2, seed=seed)

    iterator = batches()
    first = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    rest = [next(iterator) for _ in range(3)]
    assert first[0]["image"].shape == (2, 8, 8, 3)
    assert (first[0]["label"].shape, first[0]["label"].dtype) == ((2, 8, 8), np.uint8)
    again = batches()
    again.set_state(state)
    for batch in rest:
        np.testing.assert_equal(next(again), batch)
    other = next(batches(seed=1))
    assert not np.array_equal(other["image"], first[0]["image"])


def test_evaluation_batches_hold_images_of_one_size_and_full_size_labels(folder: Path) -> None:
    write(folder, "wide", *pair(9, 8, 20))
    source = LabelMapFolder(folder, "training")
    (folder / "images/training/3.png").write_bytes(b"not an image")
    transform = SegmentationEvalTransform(scale=(32, 24))
    batches = list(eval_batches(source, transform, batch_size=2, groups=source.groups()))
    seen = []
    for batch in batches:
        for label, counted in zip(batch["label"], batch["mask"], strict=True):
            if counted:
                seen.append(label)
            elif label.shape == (1, 1):
                assert label == 255  # the damaged one
    shapes = {(batch["image"].shape[1:3], batch["label"].shape[1:]) for batch in batches}
    assert ((24, 32), (12, 16)) in shapes
    assert ((13, 32), (8, 20)) in shapes
    expected = [pair(seed)[1] for seed in (0, 1, 2, 4)] + [pair(9, 8, 20)[1]]
    assert len(seen) == 5
    for label, wanted in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(label, wanted)
