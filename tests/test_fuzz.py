"""Ten thousand damaged checkpoints: each is read or refused in one line, soon and in bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


CASES = {
    "zip": 2500,
    "pickle": 2500,
    "tar": 1500,
    "safetensors": 1500,
    "index": 1000,
    "distcp": 1000,
}


@pytest.mark.parametrize(
    ("container", "cases"),
    [
        *((container, cases // 4) for container, cases in CASES.items()),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in CASES.items()),
    ],
)
def test_damaged_files_are_read_or_refused_within_bounds(container, cases, tmp_path):
    folder, elsewhere = tmp_path / "files", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    output = subprocess.run(
        [sys.executable, TESTS / "fuzz.py", container, str(cases), folder],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    report = json.loads(output)
    assert report["read"] + report["refused"] == cases
    assert report["refused"] > 0
    # Of a shard nothing can be read.
    assert report["read"] > 0 or container == "distcp"
    assert report["slowest"] < 2.5  # seconds; the largest file has 0.4 MB
    assert report["memory"] < 200 << 20
    assert not list(elsewhere.iterdir())  # nothing in a file was run
