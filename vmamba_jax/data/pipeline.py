"""From a source to batches: order, sharding over processes, workers, exact resume, damage.

Training data is one endless (or ``num_epochs`` long) sequence of *global* batches, a pure function
of the seed: every epoch is shuffled anew, its incomplete last batch is dropped, and the process
with index p takes the p-th part of each batch. So neither the number of processes nor that of
workers changes what the model sees, and the iterator's whole state is the number of the next
batch: it can be saved anywhere and restored on other hardware.

Photographs stay bytes all the way to the device, which normalises them: a quarter of what has to
be passed on from workers and to the device (measured in ``benchmarks/results/data.json``).

A record that can't be read is replaced by its next readable neighbour, so the batches of all
processes stay full and in step.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from vmamba_jax.data.augment import Transform
from vmamba_jax.data.decode import ImageSource, LabelMapSample, LabelMapSource, Sample
from vmamba_jax.data.errors import DamagedRecordError, DataError
from vmamba_jax.data.segmentation import LabelMapTransform
from vmamba_jax.data.workers import follow_parent, portable

Batch = dict[str, np.ndarray]
"""``image`` ``(B, H, W, C)`` as the transform leaves it, ``label`` int32 ``(B,)``; in evaluation
bool ``mask``.

Of a source of label maps, ``label`` is uint8 ``(B, H, W)``.
"""

_logger = logging.getLogger(__name__)
_HOPELESS = 100  # unreadable records in a row after which the disk is to blame, not the records


def batches_per_epoch(
    source: ImageSource | LabelMapSource, batch_size: int, process_count: int = 1
) -> int:
    """Training batches in one epoch, for ``batch_size`` samples per process.

    Raises:
      DataError: the source is too small to fill one batch.
    """
    count = len(source) // (batch_size * process_count)
    if not count:
        raise DataError(
            f"{len(source)} training images do not fill one batch of {batch_size * process_count}: "
            "lower the batch size or add images."
        )
    return count


def train_iterator(
    source: ImageSource | LabelMapSource,
    transform: Transform | LabelMapTransform,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    worker_count: int = 0,
    damaged_is_fatal: bool = False,
) -> "BatchIterator":
    """Shuffled, augmented training batches.

    Args:
      source: the training images.
      transform: augmentation of one image.
      batch_size: samples per batch of this process; the global batch is ``process_count`` times
        as large.
      seed: determines order and augmentation.
      num_epochs: None repeats for ever.
      process_index: this process among those that share the data.
      process_count: how many processes share the data.
      worker_count: extra processes that decode; 0 decodes in threads of this one, which is
        fastest on few cores. With workers, guard the program by ``if __name__ == "__main__"``.
      damaged_is_fatal: raise at the first damaged record instead of replacing it.

    Returns:
      An iterator over :data:`Batch`. Close it when done.

    Raises:
      DataError: the source is too small to fill one batch.
    """
    total = batches_per_epoch(source, batch_size, process_count) * process_count
    shuffle_seed, transform_seed = np.random.SeedSequence(seed).generate_state(2)
    dataset = (
        grain.MapDataset.range(len(source))
        .shuffle(seed=int(shuffle_seed))
        .random_map(_Load(source, transform, damaged_is_fatal), seed=int(transform_seed))
        .batch(batch_size, drop_remainder=True, batch_fn=_collate)
        .slice(slice(total))
        .slice(slice(process_index, None, process_count))
        .repeat(num_epochs)
    )
    return BatchIterator(dataset, worker_count)


def eval_batches(
    source: ImageSource | LabelMapSource,
    transform: Transform | LabelMapTransform,
    *,
    batch_size: int,
    groups: Iterable[Sequence[int]] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    worker_count: int = 0,
    damaged_is_fatal: bool = False,
) -> "BatchIterator":
    """Batches that together hold every sample of the source once, in order.

    Every process yields the same number of batches, all of them full: where ``mask`` is False the
    sample is padding (or stands for a damaged record) and must not be counted.

    Args:
      source: the images.
      transform: preprocessing of one image.
      batch_size: samples per batch of this process.
      groups: indices of the samples that may share a batch; None: all may. Every group fills
        batches of its own, as images of different sizes must.
      process_index: this process among those that share the data.
      process_count: how many processes share the data.
      worker_count: extra processes that decode, as in :func:`train_iterator`.
      damaged_is_fatal: raise at the first damaged record instead of masking it.

    Returns:
      An iterator over :data:`Batch` with a ``mask``. Close it when done.
    """
    order = _padded_order(
        [range(len(source))] if groups is None else groups, batch_size * process_count
    )
    dataset = (
        grain.MapDataset.source(order)
        .random_map(_LoadOnce(source, transform, damaged_is_fatal), seed=0)
        .batch(batch_size, batch_fn=_collate)
        .slice(slice(process_index, None, process_count))
    )
    return BatchIterator(dataset, worker_count)


class BatchIterator(grain.DatasetIterator[Batch]):
    """Iterates over batches, prefetching, and can be saved and restored at any batch.

    A grain iterator, so ``grain.checkpoint.CheckpointSave`` takes it. Its state,
    ``{"next_batch": n}``, is the same in every process and holds for any number of processes and
    workers, as long as source, seed and global batch size stay the same.

    Attributes:
      damaged: path and reason of every damaged record met so far; each is logged once.
    """

    def __init__(self, dataset: "grain.MapDataset[Any]", worker_count: int):
        super().__init__()
        self.damaged: dict[str, str] = {}
        self._dataset = dataset
        self._worker_count = worker_count
        self._next_batch = 0
        self._ended = False
        self._batches: grain.DatasetIterator | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __next__(self) -> Batch:
        self.start_prefetch()
        assert self._batches is not None
        batch = next(self._batches)
        self._next_batch += 1
        for path, reason in batch.pop("damaged"):
            if path not in self.damaged:
                self.damaged[path] = reason
                _logger.warning("damaged record skipped: %s: %s", path, reason)
        return batch

    def start_prefetch(self) -> None:
        """Begins to prepare batches in the background.

        Raises:
          ValueError: the iterator is closed.
        """
        if self._ended:
            raise ValueError("This iterator over batches is closed.")
        if self._batches is None:
            self._batches = iter(_prefetch(self._dataset[self._next_batch :], self._worker_count))
            self._batches.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: the number of the batch that comes next."""
        return {"next_batch": self._next_batch}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the batch at which :meth:`get_state` was called."""
        self._stop()
        self._next_batch = int(state["next_batch"])

    def close(self) -> None:
        """Ends workers and threads; idempotent."""
        self._stop()
        self._ended = True
        super().close()

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _prefetch(dataset: "grain.MapDataset[Any]", worker_count: int) -> "grain.IterDataset[Any]":
    if not worker_count:
        # One batch a thread: Pillow and NumPy release the interpreter lock where time is spent.
        threads = min(os.cpu_count() or 1, 16)
        return dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only absl's main sets
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    ).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=worker_count, per_worker_buffer_size=2),
        worker_init_fn=follow_parent,
    )


class _Load:
    """Reads and transforms the record at an index, or its next readable neighbour."""

    def __init__(
        self,
        source: ImageSource | LabelMapSource,
        transform: Transform | LabelMapTransform,
        fatal: bool,
    ):
        self._source = source
        self._transform: Any = transform
        self._fatal = fatal
        self._dtype: np.dtype | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        try:
            return self._load(index, rng)
        except (Exception, SystemExit) as error:
            whole = portable(error)
            if whole is error:
                raise
            raise whole from error

    def _load(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        sample, damaged = self._read(index)
        image, label = sample["image"], sample["label"]
        if isinstance(label, Image.Image):  # it is cut and turned with its image
            pixels, labels = self._transform(image, label, rng)
        else:
            pixels, labels = self._transform(image, rng), np.int32(label)
            self._check_dtype(pixels.dtype, index)
        return {"image": pixels, "label": labels, "damaged": damaged}

    def _check_dtype(self, dtype: np.dtype, index: int) -> None:
        """That records are bytes, or numbers, as the first one is: all processes must know it."""
        if self._dtype is None:
            first: Any = self._read(0)[0]["image"]
            self._dtype = self._transform(first, np.random.default_rng(0)).dtype
        if dtype != self._dtype:
            raise DataError(
                f"record {index} holds {dtype} values and the first {self._dtype}: photographs "
                "of 8 bits and images of more can't be one data set; convert them to one kind."
            )

    def _read(self, index: int) -> tuple[Sample | LabelMapSample, list[tuple[str, str]]]:
        """The sample, and path and reason of each damaged record on the way to it."""
        size = len(self._source)
        damaged = []
        for attempt in range(min(size, _HOPELESS)):
            try:
                return self._source[(index + attempt) % size], damaged
            except DamagedRecordError as error:
                if self._fatal:
                    raise
                damaged.append((error.path, error.reason))
        path, reason = damaged[-1]
        raise DataError(
            f"{len(damaged)} records in a row can't be read; the last is {path}: {reason}. "
            "Check that the data is where it was and readable."
        )


class _LoadOnce(_Load):
    """Reads and transforms a record for evaluation; padding and what stands in are masked."""

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        padding = index < 0
        element = super().__call__(~index if padding else index, rng)
        return {**element, "mask": np.bool_(not padding and not element["damaged"])}

    def _read(self, index: int) -> tuple[Sample | LabelMapSample, list[tuple[str, str]]]:
        if not isinstance(self._source, LabelMapSource):
            return super()._read(index)
        try:
            return self._source[index], []
        except DamagedRecordError as error:
            if self._fatal:
                raise
            return self._source.blank(index), [(error.path, error.reason)]


def _padded_order(groups: Iterable[Sequence[int]], multiple: int) -> list[int]:
    """The groups' indices one after another, each group filled up with its first one inverted."""
    order: list[int] = []
    for group in groups:
        order += [*group, *[~group[0]] * (-len(group) % multiple)]
    return order


def _collate(elements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {
        name: np.stack([element[name] for element in elements])
        for name in elements[0]
        if name != "damaged"
    }
    batch["damaged"] = [entry for element in elements for entry in element["damaged"]]
    return batch
