"""An exported model on disk: one uncompressed ``.npz`` file.

- ``weights/...``: the weights under their Flax names, the arguments of the programs;
- ``program``: bytes of `jax.export`, ``(weights, images) -> logits``; ``program_tpu``: the TPU's,
  where the TPU's kernel can't share a program with other platforms;
- ``about``: JSON: format and version, the images it takes, architecture, class names,
  preprocessing.

NumPy's own format, so that JAX and NumPy are all it takes to read one; its checksums tell damage.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.export import (
    Exported,
    deserialize,
    maximum_supported_calling_convention_version,
    minimum_supported_calling_convention_version,
)

from vmamba_jax.errors import CheckpointError
from vmamba_jax.preprocessing import Preprocessing, from_json
from vmamba_jax.typing import Array, Float, Num

FORMAT, VERSION = "vmamba_jax.export", 1
WEIGHTS = "weights/"
PROGRAM, TPU_PROGRAM = "program", "program_tpu"
_ABOUT = "about"
_DAMAGED = "not an exported model, cut short or damaged"


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A model as `load_exported` reads it; call it with images.

    Attributes:
        programs: ``"program"`` and, where it has its own, ``"program_tpu"``; each takes
            (weights, images).
        weights: arrays by name, the programs' first argument.
        about: what is kept beside them, as JSON types: ``images`` (what is asked of each axis),
            ``task``, ``config``, ``class_names``, ``preprocessing``, ``provenance``, and more.
    """

    programs: Mapping[str, Exported]
    weights: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __call__(self, images: Num[Any, "..."]) -> Float[Array, "..."]:
        """Runs the model on the default device.

        Args:
            images: normalised float32 images (B, H, W, C), of sizes that it was exported for.

        Returns:
            float32: logits (B, classes) of a classifier, pooled features (B, C) where it has no
            head; logits (B, h, w, classes) of a segmenter, of the size of its largest map.

        Raises:
            ValueError: for images that it was not exported for, or a platform.
        """
        asked = self.about["images"]
        shape = tuple(images.shape)
        if len(shape) != len(asked) or not all(map(_fits, shape, asked)):
            raise ValueError(f"images must be {self.takes}, got {shape}")
        if images.dtype != np.float32:
            raise ValueError(f"images must be normalised float32 numbers, got {images.dtype}")
        weights, program = self._ready
        return program(weights, images)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits, where they were known."""
        return self.about["class_names"]

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What images have to go through, where it was known."""
        steps = self.about["preprocessing"]
        return None if steps is None else from_json(Preprocessing, steps)

    @property
    def takes(self) -> str:
        """The shape of the images, in words."""
        return f"({', '.join(map(_in_words, self.about['images']))})"

    @property
    def program(self) -> Exported:
        """The program of the default device's platform."""
        on_tpu = jax.default_backend() == "tpu" and TPU_PROGRAM in self.programs
        return self.programs[TPU_PROGRAM if on_tpu else PROGRAM]

    @cached_property
    def _ready(self) -> tuple[Any, Any]:
        """The weights on the device, and the program, compiled once a shape."""
        return jax.device_put(dict(self.weights)), jax.jit(self.program.call)


def _fits(size: int, asked: int | Mapping[str, int]) -> bool:
    if isinstance(asked, int):
        return size == asked
    return size > 0 and size % asked["multiple_of"] == 0


def _in_words(asked: int | Mapping[str, int]) -> str:
    if isinstance(asked, int):
        return str(asked)
    step = int(asked["multiple_of"])
    return "any number" if step == 1 else f"a multiple of {step}"


def refuse_existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file that does not exist yet.

    Raises:
        CheckpointError: something is there.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name or delete it")
    return path


def save_exported(
    path: str | os.PathLike[str],
    programs: Mapping[str, Exported],
    weights: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> None:
    """Writes an exported model; the file appears only when it is complete.

    Args:
        path: a file that does not exist yet.
        programs: see `ExportedModel`.
        weights: arrays of NumPy's own dtypes, by names that begin with ``weights/``.
        about: see `ExportedModel`.

    Raises:
        CheckpointError: if something is at `path` already.
        OSError: if it can't be written.
    """
    path = refuse_existing(path)
    versions = {
        "format": FORMAT,
        "version": VERSION,
        "jax": jax.__version__,
        "calling_convention": max(p.calling_convention_version for p in programs.values()),
    }
    data = {name: np.frombuffer(p.serialize(), np.uint8) for name, p in programs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            about_json = np.array(json.dumps({**versions, **about}))
            np.savez(file, allow_pickle=False, **{_ABOUT: about_json}, **data, **weights)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_exported(path: str | os.PathLike[str]) -> ExportedModel:
    """Reads what `export_model` or `vmamba-jax export` wrote; loads neither Flax nor a network.

    A file that is damaged is told from a sound one. But a program is a program: run only those of
    people whom you trust.

    Args:
        path: the file.

    Raises:
        CheckpointError: not such a file, damaged, or of versions that this package or this JAX
            can't read.
        OSError: if it can't be opened.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            _check_members(file, path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            about = _about(arrays)
            names = [name for name in (PROGRAM, TPU_PROGRAM) if name in arrays.files]
            programs = {name: deserialize(bytearray(arrays[name])) for name in names}
            weights = {name: arrays[name] for name in arrays.files if name.startswith(WEIGHTS)}
        if PROGRAM not in programs:
            raise ValueError("it holds no program")
        loaded = ExportedModel(programs, weights, about)
        _check_readable(loaded.program, about["jax"])
        _ = loaded.takes, loaded.class_names, loaded.preprocessing  # whether they can be read
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # what damaged bytes provoke is never our caller's
        raise CheckpointError(f"{path}: {_DAMAGED} ({str(error)[:200]})") from error
    return loaded


def _check_members(file: zipfile.ZipFile, size: int) -> None:
    """No small file may become a large one in memory."""
    members = file.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{_DAMAGED}: it is compressed")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{_DAMAGED}: its parts overlap")


def _check_readable(program: Exported, writer: str) -> None:
    try:
        program.mlir_module()
    except jax.errors.JaxRuntimeError as error:
        raise CheckpointError(
            f"its program, written by JAX {writer}, can't be read by JAX {jax.__version__}, which "
            "reads those of JAX up to six months older: take a newer JAX, or export it again with "
            "this one"
        ) from error


def _about(arrays: Any) -> dict[str, Any]:
    if _ABOUT not in arrays.files:
        raise CheckpointError(f"{_DAMAGED}: `vmamba-jax export` writes such files")
    about = json.loads(str(arrays[_ABOUT]))
    if about["format"] != FORMAT:
        raise CheckpointError(f"{_DAMAGED}: `vmamba-jax export` writes such files")
    if about["version"] != VERSION:
        raise CheckpointError(
            f"of version {about['version']!r} of the format, and this vmamba_jax reads version "
            f"{VERSION}: export the model again, or use the vmamba_jax that wrote it"
        )
    oldest = minimum_supported_calling_convention_version
    newest = maximum_supported_calling_convention_version
    if not oldest <= about["calling_convention"] <= newest:
        raise CheckpointError(
            f"exported by JAX {about['jax']} with calling convention "
            f"{about['calling_convention']!r}, and JAX {jax.__version__} runs {oldest} to "
            f"{newest}: export the model again with a JAX nearer to this one"
        )
    return about
