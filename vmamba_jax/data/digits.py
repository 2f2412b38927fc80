"""Real handwritten digits that ship with scikit-learn: the demonstration that needs no download."""

import numpy as np
from PIL import Image

from vmamba_jax.data.decode import Sample
from vmamba_jax.data.errors import DataError

SIZE = 32
_HELD_OUT_PER_CLASS = 36  # 360 of the 1797 scans


class Digits:
    """Scans of handwritten digits, 8x8 pixels enlarged to 32x32 RGB, ten classes.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as shipped
    by :func:`sklearn.datasets.load_digits`.

    Args:
      split: ``"train"`` (1437 scans) or ``"val"`` (360 held out, 36 of each digit, always the
        same ones).
      channels: 3.

    Raises:
      DataError: no such split, other channels, or scikit-learn is missing.
    """

    class_names = tuple("0123456789")

    def __init__(self, split: str, channels: int = 3):
        if channels != 3:
            raise DataError(f"The digits are RGB images: set data.channels to 3, not {channels}.")
        if split not in ("train", "val"):
            raise DataError(f"The digits have the splits 'train' and 'val', not {split!r}.")
        try:
            from sklearn.datasets import load_digits  # noqa: PLC0415 (optional, slow to import)
        except ImportError as error:
            raise DataError(
                "The digits come with scikit-learn: pip install 'vmamba-jax[demo]'."
            ) from error
        scans, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
        chosen = _held_out(labels)
        if split == "train":
            chosen = np.setdiff1d(np.arange(len(labels)), chosen)
        self._labels = labels[chosen]
        pixels = np.round(scans[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self._images = [
            Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
            for scan in pixels
        ]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int, /) -> Sample:
        return {"image": self._images[index], "label": int(self._labels[index])}


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Sorted indices of the held-out scans."""
    rng = np.random.RandomState(0)  # the legacy generator: its numbers are frozen for ever
    order = rng.permutation(len(labels))
    return np.sort(
        np.concatenate([order[labels[order] == c][:_HELD_OUT_PER_CLASS] for c in range(10)])
    )
