"""The checkpoints of a run, saved in the background and restored onto any mesh.

A checkpoint is a folder named after its step that appears only when it is complete, so an
interrupted save or a full disk leaves the ones before it as they were. It holds what a converted
model does (`vmamba_jax.convert.artifact`: ``variables``, ``ema``, ``model``), so that it is one,
and beside it what a run goes on from:

- ``training``: optimizer state, counters and random key;
- ``data``: the position of the data iterator, good for any number of processes;
- ``meta``: the run's configuration as JSON;
- ``metrics``: what an evaluation of it found, as JSON, once there was one.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vmamba_jax.convert.artifact import only_news, weights_handler
from vmamba_jax.errors import CheckpointError
from vmamba_jax.local_path import local_path
from vmamba_jax.run_folder import best_step, complete_steps, read_metrics, write_metrics

PyTree = Any

_WEIGHTS = ("variables", "ema")


class Checkpoints:
    """The checkpoints of one run.

    Use it as a context manager: leaving it waits for the last save.

    Args:
        folder: where they are kept.
        keep: how many of the latest to keep, beside the best one.
        read_only: never write, for evaluation.
    """

    def __init__(self, folder: Path | str, *, keep: int = 3, read_only: bool = False) -> None:
        self.folder = local_path(folder).absolute()
        self._quiet = ExitStack()
        handlers: dict[str, Any] = {name: weights_handler() for name in _WEIGHTS}
        handlers["training"] = ocp.StandardCheckpointHandler()
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ("model", "data", "meta")}
        # Evaluations come after the save that they are of, so Orbax does not know of them.
        self._metrics = {
            step: read_metrics(self.folder / str(step)) for step in complete_steps(self.folder)
        }
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), _Best(self)]
                ),
                # A save that was cut short leaves a temporary folder behind.
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                save_root_metadata=not read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(only_news())
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            with suppress(Exception):  # it raises again what a save has raised
                self._manager.close()
            self._quiet.close()

    @property
    def latest_step(self) -> int | None:
        """The last complete checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The evaluated checkpoint with the highest accuracy, or None."""
        return best_step({step: self.metrics(step) for step in self._manager.all_steps()})

    def metrics(self, step: int) -> dict[str, float]:
        """What was recorded of a checkpoint; empty before its evaluation."""
        return self._metrics.get(step, {})

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        *,
        model: dict[str, Any],
        data_iterator: Any,
        config: dict[str, Any],
    ) -> None:
        """Starts saving in the background, after the previous save has ended.

        The arrays are copied to the host before this returns, so they may be donated.

        Args:
            step: names the checkpoint; nothing is done if there is one of this step.
            items: the state by item: ``variables``, ``training`` and, if there is one, ``ema``.
            model: what else it takes to use the weights, from `describe_model`.
            data_iterator: whose position is saved: `get_state()` gives it as JSON types.
            config: the run's configuration, as JSON types.

        Raises:
            CheckpointError: if this or the previous save could not be written.
        """
        if step in self._manager.all_steps():
            return
        args: dict[str, Any] = {
            name: ocp.args.PyTreeSave(tree) if name in _WEIGHTS else ocp.args.StandardSave(tree)
            for name, tree in items.items()
        }
        args |= {
            "model": ocp.args.JsonSave(model),
            "data": ocp.args.JsonSave(data_iterator.get_state()),
            "meta": ocp.args.JsonSave(config),
        }
        self.wait()
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._write_error(error) from error

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes what an evaluation of a saved checkpoint found, once its save has ended.

        Args:
            step: the checkpoint.
            metrics: its held-out ``accuracy``, which decides which checkpoint is the best, and
                what else was measured.

        Raises:
            CheckpointError: if the checkpoint or this note could not be written.
        """
        self.wait()
        self._metrics[step] = dict(metrics)
        if jax.process_index() == 0:
            try:
                write_metrics(self.folder / str(step), metrics)
            except OSError as error:
                raise self._write_error(error) from error

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(error) from error

    def restore(
        self, items: Mapping[str, PyTree], *, data_iterator: Any = None, step: int | None = None
    ) -> dict[str, PyTree]:
        """Reads a checkpoint onto the devices that `items` names.

        Args:
            items: as saved, of `jax.ShapeDtypeStruct` with shardings; the mesh may differ from the
                one that saved.
            data_iterator: moved to the saved position by `set_state`; None leaves data alone.
            step: which checkpoint; the latest by default.

        Raises:
            CheckpointError: if there is no such checkpoint or it belongs to another model.
        """
        args: dict[str, Any] = {
            name: ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            if name in _WEIGHTS
            else ocp.args.StandardRestore(tree)
            for name, tree in items.items()
        }
        if data_iterator is not None:
            args["data"] = ocp.args.JsonRestore()
        restored = self._restore(step, args)
        if data_iterator is not None:
            data_iterator.set_state(restored["data"])
        return {name: restored[name] for name in items}

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The configuration that a checkpoint was saved with (the latest by default)."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def _restore(self, step: int | None, items: dict[str, Any]) -> Any:
        step = self.latest_step if step is None else step
        if step is None or step not in self._manager.all_steps():
            found = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(
                f"{self.folder} holds no complete checkpoint"
                + (f" of step {step}" if step is not None else "")
                + f" (found: {found})"
            )
        for item in _WEIGHTS:
            if item in items:
                self._check_same_model(step, item, items[item].item)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} can't be read for this model: {reason}. "
                "Its files are damaged or of another optimizer; choose another step or folder"
            ) from error

    def _check_same_model(self, step: int, item: str, wanted: PyTree) -> None:
        """Compares names and shapes before anything is read, for a message that names them."""
        metadata = self._manager.item_metadata(step)[item]
        if metadata is None:
            raise CheckpointError(f"checkpoint {self.folder / str(step)} has no item {item!r}")
        saved, asked = (
            {
                jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            for tree in (metadata, wanted)
        )
        problems = [
            f"{name} is {saved.get(name, 'missing')} there and {asked.get(name, 'missing')} here"
            for name in sorted(saved.keys() | asked.keys())
            if saved.get(name) != asked.get(name)
        ]
        if problems:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is of another model: "
                + "; ".join(problems[:4])
                + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
            )

    def _write_error(self, error: Exception) -> CheckpointError:
        self._manager.reload()  # it has forgotten what it meant to delete after this save
        latest = self.latest_step
        kept = "no earlier one exists" if latest is None else f"step {latest} is intact"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder} ({kept}): {reason}. "
            "If the disk is full, make room and run the same command again"
        )


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the best checkpoint, as far as they are evaluated."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        del context
        best = best_step({info.step: self._checkpoints.metrics(info.step) for info in checkpoints})
        return [info.step == best for info in checkpoints]
