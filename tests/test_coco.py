"""Average precisions of detections whose precision is known by counting."""

import json

import numpy as np
import pytest
from PIL import Image

from vmamba_jax.data.errors import DataError
from vmamba_jax.detection.coco import Record, average_precisions, find_all, load_coco
from vmamba_jax.detection.detect import Found, Instance

SIZE = (60, 80)
# Side 40: medium in COCO's terms. Two pictures, two cats and a dog.
TRUTH = [(1, 7, [0, 0, 40, 40]), (2, 7, [10, 10, 40, 40]), (2, 3, [20, 5, 40, 40])]


@pytest.fixture
def folder(tmp_path):
    """A data set in COCO's layout; category 3 comes after 7."""
    (tmp_path / "val").mkdir()
    for i in (1, 2):
        Image.new("RGB", (80, 60)).save(tmp_path / "val" / f"{i}.png")
    images = [
        {"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)
    ]
    annotations = [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [corners(*box)],
        }
        for i, (image, category, box) in enumerate(TRUTH)
    ]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    write(tmp_path, images=images, annotations=annotations, categories=categories)
    return tmp_path


def corners(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def write(folder, **content):
    (folder / "truth.json").write_text(json.dumps(content))


def load(folder, names=("cat", "dog"), named=True):
    return load_coco(folder / "truth.json", folder / "val", names, named)


def instance(label, score, x, y, width, height):
    box = np.array([x, y, x + width, y + height], np.float32)
    return Instance(label, score, box, np.ones((28, 28), np.float32))


def scores_of(folder, found, **options):
    """Average precisions of instances by picture."""
    dataset = load(folder, **options)
    record = Record(folder / "record.jsonl", {})
    results = (Found(path, SIZE, found[path.name]) for path in dataset.paths.values())
    detections = find_all(lambda paths: results, dataset, record, lambda: None)
    return average_precisions(dataset, detections)


def test_everything_found_exactly(folder):
    found = {
        "1.png": [instance(0, 0.9, 0, 0, 40, 40)],
        "2.png": [instance(1, 0.8, 20, 5, 40, 40), instance(0, 0.7, 10, 10, 40, 40)],
    }
    scores = scores_of(folder, found)
    for kind in ("box", "mask"):
        assert scores[kind] == {"AP": 1, "AP50": 1, "AP75": 1, "APs": -1, "APm": 1, "APl": -1}


def test_one_cat_of_two_and_a_dog_that_overlaps_by_three_quarters(folder):
    found = {
        # The second of these is wrong, and less probable than the right one.
        "1.png": [instance(0, 0.9, 0, 0, 40, 40), instance(0, 0.3, 60, 30, 10, 10)],
        "2.png": [instance(1, 0.8, 20, 5, 30, 40)],  # 30 of 40 columns
    }
    scores = scores_of(folder, found)
    # Precision 1 at 51 of the 101 recalls, 0 to 0.5; the dog counts at 6 of 10 overlaps.
    cat, dog = 51 / 101, 6 / 10
    for kind in ("box", "mask"):
        np.testing.assert_allclose(scores[kind]["AP"], (cat + dog) / 2)
        np.testing.assert_allclose(scores[kind]["AP50"], (cat + 1) / 2)


def test_nothing_found(folder):
    scores = scores_of(folder, {"1.png": [], "2.png": []})
    assert scores["box"]["AP"] == scores["mask"]["AP"] == 0


def test_classes_without_names_are_the_categories_in_the_order_of_their_numbers(folder):
    dataset = load(folder, ("class 0", "class 1"), named=False)
    assert dataset.categories == [3, 7]
    assert load(folder).categories == [7, 3]


def test_a_stopped_evaluation_goes_on(folder):
    dataset, asked = load(folder), []

    def find(paths):
        for path in paths:
            asked.append(path.name)
            yield Found(path, SIZE, [instance(0, 0.5, 0, 0, 9, 9)])
            if len(asked) == 1:
                raise KeyboardInterrupt

    path = folder / "record.jsonl"
    with pytest.raises(KeyboardInterrupt):
        find_all(find, dataset, Record(path, {"setting": 1}), lambda: None)
    with path.open("a") as file:
        file.write('{"image": 2, "detec')  # cut off while it was written
    results = find_all(find, dataset, Record(path, {"setting": 1}), lambda: None)
    assert asked == ["1.png", "2.png"]
    assert [result["image_id"] for result in results] == [1, 2]
    assert find_all(find, dataset, Record(path, {"setting": 1}), lambda: None) == results
    with pytest.raises(DataError, match="of another checkpoint, data set or setting"):
        Record(path, {"setting": 2})
    path.write_text("something else\n")
    with pytest.raises(DataError, match="no record of detections"):
        Record(path, {"setting": 1})


def test_what_is_wrong_with_a_data_set_is_said(folder):
    content = json.loads((folder / "truth.json").read_text())
    with pytest.raises(DataError, match=r"no category 'cow'.*\(1 of 2 are missing\)"):
        load(folder, ("cat", "cow"))
    with pytest.raises(DataError, match="2 categories, and the detector 3 classes"):
        load(folder, ("class 0", "class 1", "class 2"), named=False)
    for name in ("3.png", "../truth.json", "/etc/passwd"):
        image = {**content["images"][0], "file_name": name}
        write(folder, **{**content, "images": [image]})
        with pytest.raises(DataError, match=f"its picture '{name}' is not in"):
            load(folder)
    without_masks = [{k: v for k, v in a.items() if k != "area"} for a in content["annotations"]]
    write(folder, **{**content, "annotations": without_masks})
    with pytest.raises(DataError, match="an object lacks one of area"):
        load(folder)
    for text in ("[]", "{", '{"images": 3, "annotations": [], "categories": []}'):
        (folder / "truth.json").write_text(text)
        with pytest.raises(DataError, match="no annotations in COCO's format"):
            load(folder)
    write(folder, **{**content, "annotations": []})
    with pytest.raises(DataError, match="no pictures or no objects"):
        load(folder)
    (folder / "truth.json").unlink()
    with pytest.raises(DataError, match="can't be read"):
        load(folder)
