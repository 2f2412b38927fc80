"""Sources: what they read, and one clear error for everything that can be wrong with a data set."""

import io
import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from vmamba_jax.data import DataError, check_same_classes, open_source
from vmamba_jax.data.array_record import _example_type
from vmamba_jax.data.decode import decode_image
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.data.image_folder import ImageFolder
from vmamba_jax.training.config import DataConfig
from vmamba_jax.training.setup import open_sources

KINDS = ("image_folder", "array_record", "parquet", "saved_to_disk")
CLASSES = ("cat", "dog", "eel")


def photo(index: int) -> Image.Image:
    """An image whose pixels tell which one it is."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[..., 0] = 10 * index
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_folder(root: Path, split: str, *, classes=CLASSES, count: int = 9) -> None:
    for name in classes:
        (root / split / name).mkdir(parents=True)
    for index in range(count):
        photo(index).save(root / split / classes[index % len(classes)] / f"{index}.png")


def write_array_record(root: Path, split: str, records: list[tuple[bytes, int]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "label.labels.txt").write_text("\n".join(CLASSES) + "\n")
    for shard in range(2):
        path = root / f"pets-{split}.array_record-0000{shard}-of-00002"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        half = len(records) // 2
        for image, label in records[half:] if shard else records[:half]:
            example = _example_type()()
            example.features.feature["image"].bytes_list.value.append(image)
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()


def rows(records: list[tuple[bytes, int]]):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    columns = {
        "image": [{"bytes": image, "path": None} for image, _ in records],
        "label": [label for _, label in records],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def open_kind(kind: str, root: Path, records: list[tuple[bytes, int]]):
    """Writes the records in one of the formats and opens them."""
    if kind == "image_folder":
        for name in CLASSES:
            (root / "train" / name).mkdir(parents=True)
        for index, (image, label) in enumerate(records):
            (root / "train" / CLASSES[label] / f"{index}.png").write_bytes(image)
        return open_source("image_folder", root, "train")
    if kind == "array_record":
        write_array_record(root, "train", records)
        return open_source("array_record", root, "train")
    if kind == "parquet":
        rows(records).to_parquet(root / "train-00000-of-00001.parquet")
        return open_source("huggingface", root, "train")
    datasets.DatasetDict({"train": rows(records)}).save_to_disk(root / "disk")
    return open_source("huggingface", root / "disk", "train")


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_yields_the_images_and_labels_written(kind: str, tmp_path: Path):
    root = tmp_path / "data"
    root.mkdir()
    source = open_kind(kind, root, [(encoded(photo(i)), i // 3) for i in range(9)])
    assert list(source.class_names) == list(CLASSES)
    assert len(source) == 9
    for index in range(9):
        sample = source[index]
        assert sample["label"] == index // 3
        assert isinstance(sample["image"], Image.Image)
        assert sample["image"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(photo(index)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_survives_pickling_to_a_worker(kind: str, tmp_path: Path):
    root = tmp_path / "data"
    root.mkdir()
    source = open_kind(kind, root, [(encoded(photo(i)), i // 3) for i in range(9)])
    copy = pickle.loads(pickle.dumps(source))
    assert copy[4]["label"] == source[4]["label"] == 1
    np.testing.assert_array_equal(copy[4]["image"], source[4]["image"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_record_is_named(kind: str, tmp_path: Path):
    root = tmp_path / "data"
    root.mkdir()
    whole = encoded(photo(1))
    source = open_kind(kind, root, [(whole, 0), (whole[: len(whole) // 2], 1), (whole, 2)] * 2)
    damaged = {i for i in range(6) if source_raises(source, i)}
    assert len(damaged) == 2
    with pytest.raises(DamagedRecordError) as error:
        source[min(damaged)]
    expected = "1.png" if kind == "image_folder" else f"{min(damaged)}"
    assert expected in error.value.path
    assert str(root) in error.value.path


def source_raises(source, index: int) -> bool:
    try:
        source[index]
    except DamagedRecordError:
        return True
    return False


def test_a_label_outside_the_class_list_is_damage(tmp_path: Path):
    write_array_record(tmp_path / "data", "train", [(encoded(photo(0)), 7)] * 4)
    with pytest.raises(DamagedRecordError, match="label 7 of 3 classes"):
        open_source("array_record", tmp_path / "data", "train")[0]


def test_photographs_keep_every_mode_and_format(tmp_path: Path):
    palette = photo(3).quantize(4)
    palette.info["transparency"] = bytes([0, 128, 255, 255])
    files = {
        "gray.jpg": encoded(photo(3).convert("L"), "JPEG"),
        "cmyk.JPEG": encoded(photo(3).convert("CMYK"), "JPEG"),
        "palette.png": encoded(palette),
        "alpha.webp": encoded(photo(3).convert("RGBA"), "WEBP"),
        "scan.tiff": encoded(photo(3), "TIFF"),
    }
    for name, data in files.items():
        image = decode_image(data, name)
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        assert image.size == (8, 6)


def test_an_image_that_claims_to_be_enormous_is_refused():
    header = b"P6 60000 60000 255\n"
    with pytest.raises(DamagedRecordError, match="DecompressionBomb"):
        decode_image(header, "bomb.ppm")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_more_than_16_bits_are_refused_rather_than_clipped(dtype):
    deep = Image.fromarray(np.full((4, 4), 40000, dtype))
    with pytest.raises(DamagedRecordError, match="convert it to 8 or 16 bits"):
        decode_image(encoded(deep, "TIFF"), "deep.tif")


def test_only_image_decoders_are_reached():
    with pytest.raises(DamagedRecordError, match="PostScript can't be read here"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "x.jpg")


def test_folders_are_searched_deeply_and_hidden_files_passed_over(tmp_path: Path):
    write_folder(tmp_path, "train")
    deep = tmp_path / "train" / "cat" / "2024" / "june"
    deep.mkdir(parents=True)
    photo(5).save(deep / "last.PNG", "PNG")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    source = open_source("image_folder", tmp_path, "train")
    assert list(source.class_names) == list(CLASSES)
    assert len(source) == 10


def break_by_leaving_out_the_split(root: Path) -> None:
    write_folder(root, "training")


def break_by_emptying_the_split(root: Path) -> None:
    (root / "train").mkdir()


def break_by_laying_images_loose(root: Path) -> None:
    (root / "train").mkdir()
    photo(0).save(root / "train" / "0.png")


def break_by_having_one_class(root: Path) -> None:
    write_folder(root, "train", classes=("cat",))


def break_by_emptying_a_class(root: Path) -> None:
    write_folder(root, "train")
    (root / "train" / "fox").mkdir()


def break_by_an_unknown_extension(root: Path) -> None:
    write_folder(root, "train")
    (root / "train" / "fox").mkdir()
    (root / "train" / "fox" / "1.heic").write_bytes(b"")


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (break_by_leaving_out_the_split, r"no split 'train'.*found training"),
        (break_by_emptying_the_split, r"no class folders \(0 images"),
        (break_by_laying_images_loose, r"no class folders \(1 images.*move each image"),
        (break_by_having_one_class, r"one class, 'cat'.*at least two"),
        (break_by_emptying_a_class, r"fox has no image: found no file"),
        (break_by_an_unknown_extension, r"fox has no image: found 1 x \.heic.*\.jpg"),
    ],
)
def test_a_broken_folder_gives_one_clear_error(breakage, message: str, tmp_path: Path):
    breakage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source("image_folder", tmp_path, "train")


@pytest.mark.parametrize("kind", ["image_folder", "array_record", "huggingface"])
def test_a_missing_folder_gives_one_clear_error(kind: str, tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        open_source(kind, tmp_path / "nowhere", "train")


def test_an_unknown_kind_or_split_names_the_choices(tmp_path: Path):
    with pytest.raises(DataError, match=r"'folder'.*image_folder, array_record, huggingface"):
        open_source("folder", tmp_path, "train")
    with pytest.raises(DataError, match="'train' and 'val', not 'test'"):
        open_source("digits", tmp_path, "test")
    write_array_record(tmp_path / "data", "validation", [(encoded(photo(0)), 0)] * 4)
    with pytest.raises(DataError, match=r"no split 'train'; it has validation"):
        open_source("array_record", tmp_path / "data", "train")
    rows([(encoded(photo(0)), 0)]).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(DataError, match=r"'train'.*validation"):
        open_source("huggingface", tmp_path, "train")


def test_an_array_record_folder_says_what_is_missing(tmp_path: Path):
    write_array_record(tmp_path / "pets" / "1.0.0", "train", [(encoded(photo(0)), 0)] * 4)
    with pytest.raises(DataError, match=r"did you mean .*1\.0\.0"):
        open_source("array_record", tmp_path / "pets", "train")
    names = tmp_path / "pets" / "1.0.0" / "label.labels.txt"
    names.unlink()
    with pytest.raises(DataError, match=r"label\.labels\.txt is missing"):
        open_source("array_record", names.parent, "train")
    features = {"label": {"classLabel": {"numClasses": "3"}}}
    (names.parent / "features.json").write_text(
        json.dumps({"featuresDict": {"features": features}})
    )
    assert list(open_source("array_record", names.parent, "train").class_names) == ["0", "1", "2"]
    names.write_text("cat\n")
    with pytest.raises(DataError, match="names 1 classes"):
        open_source("array_record", names.parent, "train")


def test_tfrecord_files_and_damaged_files_are_told_apart(tmp_path: Path):
    (tmp_path / "pets-train.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match='file_format="array_record"'):
        open_source("array_record", tmp_path, "train")
    (tmp_path / "label.labels.txt").write_text("cat\ndog\n")
    (tmp_path / "pets-train.array_record-00000-of-00001").write_bytes(b"no record here" * 9000)
    with pytest.raises(DataError, match="not ArrayRecord files, or damaged"):
        open_source("array_record", tmp_path, "train")


def test_parquet_without_class_names_numbers_the_classes(tmp_path: Path):
    data = rows([(encoded(photo(i)), i % 3) for i in range(6)])
    data.cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / "train.parquet")
    assert list(open_source("huggingface", tmp_path, "train").class_names) == ["0", "1", "2"]


def test_parquet_without_an_image_or_a_label_column_is_refused(tmp_path: Path):
    data = rows([(encoded(photo(0)), 0)])
    data.remove_columns("label").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has the columns image: name the one to use 'label'"):
        open_source("huggingface", tmp_path, "train")


def test_splits_with_different_classes_do_not_go_together(tmp_path: Path):
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "val", classes=("cat", "dog", "emu", "fox"))
    train = open_source("image_folder", tmp_path, "train")
    val = open_source("image_folder", tmp_path, "val")
    with pytest.raises(DataError, match=r"only in training: eel; only in validation: emu, fox"):
        check_same_classes(train, val)
    check_same_classes(train, train)


def test_a_class_without_held_out_images_is_no_error(tmp_path: Path):
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "val", classes=("cat", "dog"), count=4)
    train = open_source("image_folder", tmp_path, "train")
    for eel in (tmp_path / "val" / "eel", None):
        if eel is not None:
            eel.mkdir()  # empty, and in the second round it is not there
        val = open_source("image_folder", tmp_path, "val", classes=train.class_names)
        check_same_classes(train, val)
        assert isinstance(val, ImageFolder)
        assert val.empty_classes == ["eel"]
        assert [val[i]["label"] for i in range(4)] == [0, 0, 1, 1]
        if eel is not None:
            eel.rmdir()
    (tmp_path / "val" / "emu").mkdir()
    photo(1).save(tmp_path / "val" / "emu" / "1.png")
    val = open_source("image_folder", tmp_path, "val", classes=train.class_names)
    with pytest.raises(DataError, match="only in validation: emu"):
        check_same_classes(train, val)


def test_numbered_classes_may_be_missing_among_the_held_out_rows(tmp_path: Path):
    root = tmp_path / "data"
    root.mkdir()
    for split, labels in (("train", (0, 1, 2)), ("validation", (0, 1))):
        data = rows([(encoded(photo(i)), label) for i, label in enumerate(labels)])
        data.cast_column("label", datasets.Value("int64")).to_parquet(root / f"{split}.parquet")
    train = open_source("huggingface", root, "train")
    val = open_source("huggingface", root, "validation", classes=train.class_names)
    check_same_classes(train, val)


def test_single_data_sets_of_save_to_disk_are_read(tmp_path: Path):
    records = [(encoded(photo(i)), i % 3) for i in range(6)]
    for split in ("train", "val"):
        rows(records).save_to_disk(tmp_path / "splits" / split)
        assert len(open_source("huggingface", tmp_path / "splits", split)) == 6
    rows(records).save_to_disk(tmp_path / "one")
    assert open_source("huggingface", tmp_path / "one", "train")[4]["label"] == 1
    with pytest.raises(DataError, match=r"one data set, and would be both splits.*one/val"):
        open_sources(DataConfig(kind="huggingface", root=tmp_path / "one"))
    data = rows(records)
    named = datasets.Dataset.from_dict(data[:], features=data.features, split=datasets.Split.TRAIN)
    named.save_to_disk(tmp_path / "named")
    with pytest.raises(DataError, match=r"holds the split train alone.*named/val"):
        open_source("huggingface", tmp_path / "named", "val")


@pytest.mark.parametrize(
    ("package", "kind", "extra"),
    [("datasets", "huggingface", "datasets"), ("sklearn.datasets", "digits", "demo")],
)
def test_a_missing_optional_package_is_named_with_its_command(
    package: str, kind: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"pip install 'vmamba-jax\[{extra}\]'"):
        open_source(kind, tmp_path, "train")


def test_the_digits_are_split_once_and_for_all():
    train, val = (open_source("digits", "", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    labels = [val[i]["label"] for i in range(len(val))]
    np.testing.assert_array_equal(np.bincount(labels), [36] * 10)
    assert labels[:12] == [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9]
    assert val[0]["image"].size == (32, 32)
    pixels = {np.asarray(train[i]["image"]).tobytes() for i in range(len(train))}
    assert not any(np.asarray(val[i]["image"]).tobytes() in pixels for i in range(len(val)))
