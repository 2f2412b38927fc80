"""The notebooks run, cell by cell."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_committed(path, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    mpl.use("Agg")
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
    assert len(sources) > 3
