"""The released ImageNet checkpoints: where they are, fetched once, converted once, kept."""

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
from pathlib import Path
from typing import Literal, NamedTuple

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
from vmamba_jax.convert.artifact import save_model
from vmamba_jax.convert.backbone import backbone_from_torch
from vmamba_jax.convert.identity import describe_difference, differing_fields
from vmamba_jax.convert.mapping import from_torch
from vmamba_jax.convert.source import Weights, read_backbone, read_network, read_weights, sha256
from vmamba_jax.convert.tasks import task_of
from vmamba_jax.detection.config import MaskRCNNConfig
from vmamba_jax.errors import CheckpointError
from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.typing import Variables

_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 1.0  # seconds before the second attempt, doubled each time
_CHUNK = 1 << 20

_logger = logging.getLogger(__name__)


class Release(NamedTuple):
    """A checkpoint of the VMamba authors, trained on ImageNet-1K at 224 x 224.

    Attributes:
        tag: of the GitHub release.
        file: its name there.
        top1: ImageNet top-1 accuracy as published, in per cent.
    """

    tag: str
    file: str
    top1: float

    @property
    def url(self) -> str:
        """Where it is."""
        tag = urllib.parse.quote(self.tag)
        return f"https://github.com/MzeroMiko/VMamba/releases/download/{tag}/{self.file}"


RELEASES = {
    "vanilla_vmamba_tiny": Release("#v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2),
    "vanilla_vmamba_small": Release("#v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5),
    "vanilla_vmamba_base": Release("#v0cls", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7),
    "vmamba_tiny_s2l5": Release("#v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5),
    "vmamba_small_s2l15": Release("#v2cls", "vssm_small_0229_ckpt_epoch_222.pth", 83.6),
    "vmamba_base_s2l15": Release("#v2cls", "vssm_base_0229_ckpt_epoch_237.pth", 83.9),
    "vmamba_tiny_s1l8": Release("#v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
    "vmamba_small_s1l20": Release("#v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3),
    "vmamba_base_s1l20": Release("#v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8),
}


def load_pretrained(
    source: Literal[True] | str | os.PathLike[str], config: VMambaConfig, name: str, seed: int = 0
) -> Variables:
    """Trained weights for a model.

    Args:
        source: True for the released checkpoint of `name`; or the address of a checkpoint; or a
            path to one, or to a saved model. An address may end in ``#sha256=DIGITS`` to say
            what its content must be.
        config: the architecture to fill. A head of another number of classes than the source's
            starts anew, and a position embedding of another image size is resized.
        name: the model's name.
        seed: of a new head's weights.

    Returns:
        float32 NumPy variables for ``VSSM(config).apply``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another architecture.
        OSError: it can't be read, or fetched and kept.
    """
    source, path = _resolve(source, name)
    weights = read_weights(
        path, num_classes=config.num_classes, image_size=config.imgsize, seed=seed
    )
    return _fill(source, weights, config, name, lambda: from_torch(weights.state_dict, config))


def load_backbone(
    source: Literal[True] | str | os.PathLike[str],
    config: VMambaConfig,
    name: str,
    out_indices: Sequence[int],
) -> Variables:
    """Trained weights for a backbone, from a classifier's, segmenter's or detector's checkpoint.

    Norms of the maps that the checkpoint has not start anew; a log message names them.

    Args:
        source: as `load_pretrained` takes it.
        config: the architecture to fill.
        name: the model's name.
        out_indices: the stages whose maps are asked for.

    Returns:
        float32 NumPy variables for ``VSSMBackbone(config, out_indices).apply``.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another architecture.
        OSError: it can't be read, or fetched and kept.
    """
    source, path = _resolve(source, name)
    return _backbone(source, path, config, name, out_indices)


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
        source: the address of a checkpoint, or a path to one or to a saved model; True for the
            released classifier of `name`.
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
    source, path = _resolve(source, name)
    task = task_of(config)
    weights = read_network(path, num_classes=config.num_classes, seed=seed)
    held = weights.config
    if not isinstance(held, VMambaConfig) and task_of(held) is task:
        new = [change.target for change in weights.changes if change.action == "initialised"]
        if new:
            _logger.warning("%s: other classes; %s start anew", source, ", ".join(new))
        read = Weights(weights.state_dict, held.backbone, weights.provenance, weights.changes)
        apart = {field: getattr(held, field) for field in ("backbone", *task.untraced)}
        if not differing_fields(held.backbone, config.backbone) and (
            held != config.replace(**apart)
        ):
            raise CheckpointError(f"{source}: its heads are not those asked for: {held}")
        return _fill(
            source, read, config.backbone, name, lambda: from_torch(weights.state_dict, config)
        )
    _logger.warning("%s: it has no heads of %s; they start anew", source, task.holds)
    stages = range(len(config.depths))
    backbone = _backbone(source, path, config.backbone, name, stages)
    variables = fresh()
    for collection, tree in backbone.items():
        variables[collection]["backbone"] = tree
    return variables


def _backbone(
    source: str, path: Path, config: VMambaConfig, name: str, out_indices: Sequence[int]
) -> Variables:
    weights = read_backbone(path, out_indices)
    new = sorted({c.target.partition(".")[0] for c in weights.changes if c.action == "initialised"})
    if new:
        _logger.warning("%s: it has no %s; they start anew", source, ", ".join(new))
    return _fill(
        source,
        weights,
        config,
        name,
        lambda: backbone_from_torch(weights.state_dict, config, out_indices),
    )


def _resolve(source: Literal[True] | str | os.PathLike[str], name: str) -> tuple[str, Path]:
    """The source's path or address, and where its file or folder lies here."""
    if isinstance(source, bool):
        if name not in RELEASES:
            raise CheckpointError(
                f"no checkpoint of {name!r} was released; those are: {', '.join(RELEASES)}. "
                "pretrained also takes a path or an address"
            )
        source = RELEASES[name].url
    source = os.fspath(source)
    is_url = source.startswith(("http://", "https://"))
    return source, cached_model(source) if is_url else Path(source)


def _fill(
    source: str,
    weights: Weights[VMambaConfig],
    config: VMambaConfig,
    name: str,
    convert: Callable[[], Variables],
) -> Variables:
    """The variables, or an error that says what the source holds instead of `name`."""
    stated = {
        field: getattr(weights.config, field) for field in weights.provenance.get("stated", [])
    }
    try:
        variables = convert()
    except ValueError as error:
        what = describe_difference(weights.config, name, config)
        raise CheckpointError(
            f"{source} is {what}: another architecture than {name}. {error}"
        ) from error
    # What the weights leave open and the file states is not replaced silently.
    if differing_fields(config.replace(**stated), config):
        what = describe_difference(config.replace(**stated), name, config)
        raise CheckpointError(f"{source} is {what}: ask for the file's own fields")
    return variables


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
            weights = read_network(file)
        except CheckpointError as error:
            file.unlink()
            raise CheckpointError(f"{address}: {error} (deleted from the cache)") from error
        record.write_text(found + "\n")
        shutil.rmtree(model, ignore_errors=True)
        provenance = {**weights.provenance, "url": address}
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
