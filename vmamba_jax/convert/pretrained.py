"""Trained weights from anywhere: fetched once, converted once, kept, fitted to what is asked."""

import dataclasses
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.adapt import replace_input_channels
from vmamba_jax.convert.artifact import save_model
from vmamba_jax.convert.backbone import backbone_from_torch
from vmamba_jax.convert.identity import describe_difference, differing_fields
from vmamba_jax.convert.mapping import from_torch
from vmamba_jax.convert.releases import RELEASES, pinned_sha256
from vmamba_jax.convert.source import (
    Weights,
    adapt_weights,
    read_backbone,
    read_weights,
    sha256,
    vmamba_of,
)
from vmamba_jax.convert.tasks import task_of
from vmamba_jax.detection.config import MaskRCNNConfig
from vmamba_jax.errors import CheckpointError
from vmamba_jax.local_path import local_path
from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.typing import Variables

_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 1.0  # seconds before the second attempt, doubled each time
_CHUNK = 1 << 20

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def load_pretrained(
    source: Literal[True] | str | os.PathLike[str], config: VMambaConfig, name: str, seed: int = 0
) -> Variables:
    """Trained weights for a model.

    Args:
        source: see `open_pretrained`.
        config: the architecture to fill; see `fit_weights`.
        name: the model's name.
        seed: of a new head's weights.

    Returns:
        float32 NumPy variables for ``VSSM(config).apply``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another architecture.
        OSError: it can't be read, or fetched and kept.
    """
    return fit_weights(open_pretrained(source, name), source, config, name, seed).variables()


def load_backbone(
    source: Literal[True] | str | os.PathLike[str],
    config: VMambaConfig,
    name: str,
    out_indices: Sequence[int],
) -> Variables:
    """Trained weights for a backbone, from a classifier's, segmenter's or detector's checkpoint.

    Norms of the maps that the checkpoint has not start anew; a log message names them.

    Args:
        source: see `open_pretrained`.
        config: the architecture to fill. A first convolution for RGB images is fitted to other
            channels.
        name: the model's name.
        out_indices: the stages whose maps are asked for.

    Returns:
        float32 NumPy variables for ``VSSMBackbone(config, out_indices).apply``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another architecture.
        OSError: it can't be read, or fetched and kept.
    """
    config = config.replace(posembed=False)
    weights = read_backbone(_locate(source, name), out_indices)
    label = name if source is True else source
    new = sorted({c.target.partition(".")[0] for c in weights.changes if c.action == "initialised"})
    if new:
        _logger.warning("%s: it has no %s; they start anew", label, ", ".join(new))
    return _fill(
        label,
        weights,
        config,
        name,
        lambda: backbone_from_torch(
            replace_input_channels(weights.state_dict, config.in_chans)[0], config, out_indices
        ),
    )


def load_network(
    source: Literal[True] | str | os.PathLike[str],
    config: UPerNetConfig | MaskRCNNConfig,
    name: str,
    fresh: Callable[[], Variables],
    seed: int = 0,
) -> Variables:
    """Trained weights for a segmenter or detector, or for its backbone alone.

    The backbone alone is filled if the source is of another task; a log message says so.

    Args:
        source: see `open_pretrained`.
        config: the architecture to fill. Last layers of another number of classes than the
            source's start anew.
        name: of the backbone's model.
        fresh: makes initial variables of the network.
        seed: of new last layers' weights.

    Returns:
        Variables for the network's ``apply``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another architecture.
        OSError: it can't be read, or fetched and kept.
    """
    task, label = task_of(config), name if source is True else source
    weights = open_pretrained(source, name)
    held = weights.config
    if isinstance(held, VMambaConfig) or task_of(held) is not task:
        _logger.warning("%s: it has no heads of %s; they start anew", label, task.holds)
        backbone = load_backbone(source, config.backbone, name, range(len(config.depths)))
        variables = fresh()
        for collection, tree in backbone.items():
            variables[collection]["backbone"] = tree
        return variables
    try:
        fitted = adapt_weights(
            weights, config.num_classes, in_chans=config.backbone.in_chans, seed=seed
        )
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    new = [change.target for change in fitted.changes if change.action == "initialised"]
    if new:
        _logger.warning("%s: other classes; %s start anew", label, ", ".join(new))
    held = fitted.config
    apart = {field: getattr(held, field) for field in ("backbone", *task.untraced)}
    if not differing_fields(held.backbone, config.backbone) and held != config.replace(**apart):
        raise CheckpointError(f"{label}: its heads are not those asked for: {held}")
    read = dataclasses.replace(weights, config=weights.config.backbone)
    return _fill(label, read, config.backbone, name, lambda: from_torch(fitted.state_dict, config))


def open_pretrained(
    source: Literal[True] | str | os.PathLike[str], name: str | None = None, step: str | None = None
) -> Weights[Any]:
    """Trained weights as their file has them: a classifier's, a segmenter's or a detector's.

    Args:
        source: True for the released checkpoint of `name`, or the name of a released model; or the
            address of a checkpoint; or a path to one, to a saved model, to a training run or one
            of its checkpoints. An address may end in ``#sha256=DIGITS`` to say what its content
            must be.
        name: the model's name.
        step: which checkpoint of a run; see `load_model`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        OSError: it can't be read, or fetched and kept.
    """
    return read_weights(_locate(source, name), step=step)


def _locate(source: Literal[True] | str | os.PathLike[str], name: str | None) -> Path:
    """Where the file or folder behind a source lies here, fetched if need be."""
    if isinstance(source, bool):
        if name not in RELEASES:
            raise CheckpointError(
                f"no checkpoint of {name!r} was released; those are: {', '.join(RELEASES)}. "
                "pretrained also takes a path or an address"
            )
        source = name
    source = os.fspath(source)
    if source in RELEASES and not Path(source).exists():
        source = RELEASES[source].url
    is_url = source.startswith(("http://", "https://"))
    return cached_model(source) if is_url else local_path(source)


def fit_weights(
    weights: Weights[Any], source: object, config: VMambaConfig, name: str, seed: int = 0
) -> Weights[VMambaConfig]:
    """Fits weights to an architecture that was asked for.

    Args:
        weights: from `open_pretrained`; of a segmenter or detector its backbone is taken.
        source: what they were opened from, for messages.
        config: the architecture to fill. A head of another number of classes than the weights'
            starts anew, a position embedding of another image size is resized, and a first
            convolution for RGB images is fitted to other channels.
        name: the architecture's name, for messages.
        seed: of a new head's weights.

    Raises:
        CheckpointError: they are of another architecture.
    """
    weights = vmamba_of(weights)
    label = name if source is True else source

    def fit() -> Weights[VMambaConfig]:
        fitted = adapt_weights(
            weights, config.num_classes, config.input_size, config.in_chans, seed
        )
        from_torch(fitted.state_dict, config)
        return dataclasses.replace(fitted, config=config)

    return _fill(label, weights, config, name, fit)


def _fill(
    label: object,
    weights: Weights[VMambaConfig],
    config: VMambaConfig,
    name: str,
    convert: Callable[[], Result],
) -> Result:
    """What `convert` makes of weights, or an error that says what they are instead of `name`."""
    try:
        converted = convert()
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    except ValueError as error:
        what = describe_difference(weights.config, name, config)
        raise CheckpointError(
            f"{label} is {what}: another architecture than {name}. {error}"
        ) from error
    # What the weights leave open and the source states is not replaced silently. A model of this
    # package states all of it.
    stated = weights.provenance.get("stated", [field.name for field in fields(VMambaConfig)])
    held = config.replace(
        **{field: getattr(weights.config, field) for field in stated if field != "in_chans"}
    )
    if differing_fields(held, config):
        what = describe_difference(held, name, config)
        raise CheckpointError(f"{label} is {what}: ask for the fields that it states")
    return converted


def cache_dir() -> Path:
    """Where downloads are kept: ``$VMAMBA_JAX_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("VMAMBA_JAX_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vmamba_jax"


def cached_model(url: str) -> Path:
    """The saved model behind an address, fetched and converted unless it was before.

    Processes that ask for it at once wait for the first one.

    Args:
        url: of a checkpoint, with or without ``#sha256=DIGITS``.

    Returns:
        A folder for `load_model`.

    Raises:
        CheckpointError: it can't be fetched, has another hash than stated or recorded, or is no
            VMamba checkpoint.
        OSError: it can't be kept, because the disk is full for one.
    """
    address, _, fragment = url.partition("#")
    stated = fragment.removeprefix("sha256=").lower() if fragment else None
    if stated is not None and not re.fullmatch(r"[0-9a-f]{64}", stated):
        raise CheckpointError(f"{url}: what follows # must be sha256= and 64 hexadecimal digits")
    stated = stated or pinned_sha256(address)
    # Two addresses may end in one file name.
    label = hashlib.sha256(address.encode()).hexdigest()[:8]
    file_name = urllib.parse.unquote(address.rsplit("/", 1)[-1]) or "checkpoint"
    file_name = re.sub(r"[^\w.-]", "_", file_name)
    folder = cache_dir() / f"{Path(file_name).stem}-{label}"
    folder.mkdir(parents=True, exist_ok=True)
    file, record, model = folder / file_name, folder / "sha256", folder / "model"
    with FileLock(folder / "lock"):
        recorded = record.read_text().strip() if record.exists() else None
        if stated and recorded and stated != recorded:
            raise CheckpointError(
                f"{address}: the copy in {folder} has SHA-256 {recorded} and not {stated}. "
                "Delete that folder to fetch it anew"
            )
        if recorded and model.exists():
            return model
        if not file.exists():
            _download(address, file.with_name(file.name + ".part"))
            file.with_name(file.name + ".part").replace(file)
        found = sha256(file)
        if found != (expected := stated or recorded or found):
            file.unlink()
            raise CheckpointError(
                f"{address}: damaged or replaced: its SHA-256 is {found} and should be {expected}. "
                "It was deleted; run the same command again to fetch it anew"
            )
        try:
            weights = read_weights(file)
        except CheckpointError as error:
            file.unlink()
            raise CheckpointError(f"{address}: {error} (deleted from the cache)") from error
        if stated is None:
            console = Console(stderr=True)
            console.print(f"{address}: first seen, not pinned: SHA-256 {found}", soft_wrap=True)
        record.write_text(found + "\n")
        shutil.rmtree(model, ignore_errors=True)
        trust = "first seen, not pinned" if stated is None else "as stated"
        provenance = {**weights.provenance, "url": address, "sha256_is": trust}
        save_model(model, weights.variables(), weights.config, provenance, weights.class_names)
        return model


def _download(url: str, part: Path) -> None:
    """Fetches into `part`, from where an earlier attempt stopped."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(part.name.removesuffix(".part"), total=None)
        for attempt in range(_ATTEMPTS):
            try:
                _fetch_rest(url, part, progress, task)
                return
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                    part.unlink()  # longer than what is there now: not the same file any more
                elif error.code < 500 and error.code not in (408, 429):
                    raise CheckpointError(
                        f"{url}: the server answers {error.code} {error.reason}. Check the address"
                    ) from error
                fault: Exception = error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.filename is not None:
                    raise  # of our own file, not of the connection
                fault = error
            if attempt + 1 == _ATTEMPTS:
                raise CheckpointError(
                    f"{url}: can't be fetched ({fault}). What arrived is kept: the same command "
                    "goes on from there. Without a network, download it elsewhere and give its path"
                ) from fault
            time.sleep(_PAUSE * 2**attempt)


def _fetch_rest(url: str, part: Path, progress: Progress, task: TaskID) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "vmamba_jax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0  # the server can't resume and sends the whole
        length = response.headers["Content-Length"]
        total = None if length is None else have + int(length)
        with part.open("ab" if have else "wb") as file:
            progress.update(task, completed=have, total=total)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have)
    if total is not None and have != total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")
