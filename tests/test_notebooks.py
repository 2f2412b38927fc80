"""The notebooks run, cell by cell, with small settings in place of their parameters."""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import tiny

from vmamba_jax import register_model

register_model("tiny", tiny.CONFIG)

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALL = {
    "directions": {"SIZE": 32, "ORDERS": {"rows only": "v051d_noz"}},
    "training": {"MODEL": "tiny", "EPOCHS": 2.0, "BATCH_SIZE": 472, "FINE_TUNING_EPOCHS": 2.0},
}
"""Values for the names that a notebook sets in its cell tagged "parameters"."""
SLOW = ("conversion", "directions", "tour", "training")  # they compile for half a minute
LARGEST = 300 * 1024  # bytes


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.exhaustive if path.stem in SLOW else ())
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_as_committed(path, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    mpl.use("Agg")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            small = SMALL.get(path.stem, {})
            assert small.keys() <= names.keys()
            names |= small
    assert len(cells) > 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_small_and_with_its_pictures(path):
    outputs = [out for c in json.loads(path.read_text())["cells"] for out in c.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not any(out["output_type"] == "error" or out.get("name") == "stderr" for out in outputs)
    assert path.stat().st_size < LARGEST
