#!/usr/bin/env bash
# Orbax 0.12.8: `CheckpointManager.save(step, args=..., metrics={...})` writes the metrics only if the
# options name a `best_fn`. Without one they are dropped and nothing is said: `save` returns True,
# `metrics(step)` gives None, and no folder `metrics` lies in the checkpoint. The docstring calls them
# "to be tracked along with this checkpoint", and required if `best_fn` is set. A run that begins
# without `best_fn` can't rank its checkpoints later.
#
# Seen with orbax-checkpoint 0.12.8, JAX 0.10.2, Python 3.11:
#   best_fn unset: saved True, metrics None, written: default
#   best_fn set: saved True, metrics {'accuracy': 0.5}, written: default metrics
#
# Needs Python 3.11 or newer and pip. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "orbax-checkpoint==0.12.8" "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON' | tee "$folder/output"
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

for name, best_fn in ("unset", None), ("set", lambda metrics: metrics["accuracy"]):
    root = Path(sys.argv[1]) / name
    with ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(best_fn=best_fn)) as manager:
        tree = ocp.args.StandardSave({"weights": np.zeros(3)})
        saved = manager.save(1, args=tree, metrics={"accuracy": 0.5})
        manager.wait_until_finished()
        written = sorted(item.name for item in (root / "1").iterdir() if item.is_dir())
        print(f"best_fn {name}: saved {saved}, metrics {manager.metrics(1)}, written:", *written)
PYTHON
diff "$folder/output" - <<'EXPECTED'
best_fn unset: saved True, metrics None, written: default
best_fn set: saved True, metrics {'accuracy': 0.5}, written: default metrics
EXPECTED
