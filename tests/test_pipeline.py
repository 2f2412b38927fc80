"""The pipeline: order, sharding, exact resume, damage, every sample once in evaluation."""

import json
import logging
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from vmamba_jax.data import DataError, DigitsTransform, batches_per_epoch, open_source
from vmamba_jax.data.bands import Bands, Picture
from vmamba_jax.data.decode import Sample
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.data.pipeline import eval_batches, train_iterator


class Numbers:
    """Record i is a 1x1 image of label i; the records in ``damaged`` can't be read."""

    class_names = ("even", "odd")

    def __init__(self, size: int, damaged: tuple[int, ...] = ()):
        self.size = size
        self.damaged = damaged

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Sample:
        if index in self.damaged:
            raise DamagedRecordError(f"/data/{index}.jpg", "image file is truncated")
        return {"image": Image.new("RGB", (1, 1), (index % 256, 0, 0)), "label": index}


def noisy(image: Picture, rng: np.random.Generator) -> np.ndarray:
    """A transform whose result shows the generator's state."""
    return (np.asarray(image) + rng.random((1, 1, 3))).astype(np.float32)


def train(source=None, **options):
    options = {"batch_size": 4, "seed": 0, **options}
    return train_iterator(source or Numbers(22), noisy, **options)


def evaluate(source, **options):
    return eval_batches(source, noisy, **{"batch_size": 4, **options})


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def assert_same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_float32_images_and_int32_labels():
    batch = next(train())
    assert set(batch) == {"image", "label"}
    assert batch["image"].shape == (4, 1, 1, 3)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)


def test_an_epoch_holds_no_sample_twice_and_the_next_one_is_shuffled_anew():
    iterator = train()
    epochs = [np.concatenate([b["label"] for b in take(iterator, 5)]) for _ in range(3)]
    for labels in epochs:
        assert len(set(labels.tolist())) == 20  # 22 less the incomplete batch
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_epochs_of_neighbouring_seeds_are_unrelated():
    first, second = train(Numbers(64), seed=0), train(Numbers(64), seed=1)
    later = np.concatenate([batch["label"] for batch in take(first, 32)[16:]])
    other = np.concatenate([batch["label"] for batch in take(second, 16)])
    assert not np.array_equal(later, other)


def test_the_same_seed_gives_the_same_batches():
    assert_same(take(train(), 12), take(train(), 12))
    assert not np.array_equal(next(train(seed=0))["image"], next(train(seed=1))["image"])


def test_a_number_of_epochs_ends_the_iterator():
    iterator = train(num_epochs=2)
    assert len(iterator) == len(list(iterator)) == 2 * batches_per_epoch(Numbers(22), 4) == 10


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batches_of_one_process(count: int):
    alone = take(train(batch_size=8), 7)
    parts = [
        take(train(batch_size=8 // count, process_index=index, process_count=count), 7)
        for index in range(count)
    ]
    joined = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(joined, alone)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 13])
def test_a_restored_iterator_continues_at_the_exact_sample(stop: int):
    iterator = train()
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 9)
    fresh = train()
    fresh.set_state(state)
    assert_same(take(fresh, 9), expected)
    iterator.set_state(state)  # also backwards, mid-iteration
    assert_same(take(iterator, 9), expected)


def test_a_state_moves_to_another_number_of_processes():
    two = [train(process_index=index, process_count=2) for index in range(2)]
    for iterator in two:
        take(iterator, 3)
    assert two[0].get_state() == two[1].get_state()
    one = train(batch_size=8)
    one.set_state(two[0].get_state())
    labels = np.concatenate([next(iterator)["label"] for iterator in two])
    np.testing.assert_array_equal(next(one)["label"], labels)


def test_a_checkpoint_holds_the_iterator(tmp_path: Path):
    iterator = train()
    take(iterator, 7)
    arguments = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=arguments)
        manager.wait_until_finished()
        expected = take(iterator, 3)
        fresh = train()
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(7, args=ocp.args.Composite(data=restore))
    assert_same(take(fresh, 3), expected)


def test_workers_change_nothing_but_the_speed():
    source = open_source("digits", "", "train")
    move = DigitsTransform()
    expected = take(train_iterator(source, move, batch_size=8, seed=3), 8)
    workers = train_iterator(source, move, batch_size=8, seed=3, worker_count=2)
    try:
        workers.set_state({"next_batch": 3})
        assert_same(take(workers, 5), expected[3:])
    finally:
        workers.close()


def test_a_closed_iterator_says_so():
    iterator = train()
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_a_damaged_record_is_replaced_counted_and_reported_once(
    caplog: pytest.LogCaptureFixture,
):
    whole, broken = train(), train(Numbers(22, damaged=(5, 6, 17)))
    with caplog.at_level(logging.WARNING):
        batches = take(broken, 15)  # three epochs
    expected = take(whole, 15)
    replaced = {5: 7, 6: 7, 17: 18}
    for batch, original in zip(batches, expected, strict=True):
        labels = [replaced.get(label, label) for label in original["label"].tolist()]
        np.testing.assert_array_equal(batch["label"], labels)
    seen = {label for batch in expected for label in batch["label"].tolist()} & set(replaced)
    assert seen
    assert {f"/data/{label}.jpg" for label in seen} <= set(broken.damaged)
    assert len(caplog.messages) == len(broken.damaged)
    for path in broken.damaged:
        assert sum(f"{path}: image file is truncated" in line for line in caplog.messages) == 1


def test_damage_does_not_disturb_an_exact_resume():
    source = Numbers(22, damaged=(0, 5, 6, 21))
    iterator = train(source)
    take(iterator, 4)
    state = iterator.get_state()
    expected = take(iterator, 6)
    fresh = train(source)
    fresh.set_state(state)
    assert_same(take(fresh, 6), expected)


def test_damage_can_be_made_fatal():
    with pytest.raises(DamagedRecordError, match=r"/data/5\.jpg: image file is truncated"):
        take(train(Numbers(22, damaged=(5,)), damaged_is_fatal=True), 20)
    with pytest.raises(DamagedRecordError, match=r"/data/5\.jpg"):
        list(evaluate(Numbers(22, damaged=(5,)), damaged_is_fatal=True))


def test_data_that_is_all_damaged_ends_the_run():
    with pytest.raises(DataError, match=r"100 records in a row can't be read.*/data/"):
        next(train(Numbers(200, damaged=tuple(range(200)))))


def test_a_source_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match="22 training images do not fill one batch of 32"):
        train(batch_size=8, process_count=4)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 4, 22, 24])
def test_evaluation_covers_every_sample_exactly_once(size: int, processes: int):
    parts = [
        list(evaluate(Numbers(size), process_index=index, process_count=processes))
        for index in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1  # collectives stay in step
    batches = [batch for part in parts for batch in part]
    assert all(batch["image"].shape == (4, 1, 1, 3) for batch in batches)
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert sorted(labels.tolist()) == list(range(size))


def test_evaluation_masks_a_damaged_sample_and_keeps_the_rest():
    batches = evaluate(Numbers(22, damaged=(5, 21)))
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert labels.tolist() == [i for i in range(22) if i not in (5, 21)]
    assert sorted(batches.damaged) == ["/data/21.jpg", "/data/5.jpg"]


class Mixed(Numbers):
    """Record 3 is of 16 bits, the others are of 8."""

    def __getitem__(self, index: int, /) -> Sample:
        if index != 3:
            return super().__getitem__(index)
        return {"image": Bands.from_array(np.zeros((1, 1, 3), np.uint16)), "label": index}


def test_bytes_and_finer_values_are_no_one_data_set():
    def values(image: Picture, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(image)

    for batches in (
        eval_batches(Mixed(8), values, batch_size=4),
        train_iterator(Mixed(8), values, batch_size=4, seed=0),
    ):
        with pytest.raises(DataError, match="record 3 holds float32 values and the first uint8"):
            take(batches, 2)
