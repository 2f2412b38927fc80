"""What the README states about the code, checked against the code."""

import re
from pathlib import Path

import numpy as np

from vmamba_jax import list_models, model_config
from vmamba_jax.convert.mapping import weight_table

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_model_table_is_the_registry():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", README, re.M
    )
    stated = {name: tuple(int(c.replace(",", "")) for c in cells[1:]) for name, *cells in rows}
    depths = {name: tuple(map(int, cells[0].split(", "))) for name, *cells in rows}
    names = list_models("v*")  # other tests register more
    assert sorted(stated) == names
    for name in names:
        config = model_config(name)
        weights = weight_table(config)
        parameters = sum(int(np.prod(w.shape)) for w in weights if w.path[0] == "params")
        row = (config.stage_dims[0], config.ssm_d_state, int(config.ssm_ratio), parameters)
        assert stated[name] == row, name
        assert depths[name] == config.depths, name
