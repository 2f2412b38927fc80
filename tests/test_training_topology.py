"""A training step compiled by TPU's own compiler for chips that are not here."""

import json
from pathlib import Path

import pytest
from tiny import CONFIG

from vmamba_jax.registry import register_model
from vmamba_jax.training.config import DataConfig, ModelConfig
from vmamba_jax.training.topology import CompileConfig, TopologyError, compile_for_topology

register_model("tiny_for_tpu", CONFIG)


@pytest.mark.tpu
def test_the_report_says_what_a_chip_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other workers compile too
    output = tmp_path / "fit.json"
    config = CompileConfig(
        topology="v5e:2x2",
        model=ModelConfig("tiny_for_tpu", dtype="bfloat16", scan_blocks=True),
        data=DataConfig(batch_size=16),
        num_classes=10,
        output=output,
    )
    report = compile_for_topology(config)
    assert json.loads(output.read_text()) == report
    assert report["chips"] == 4
    assert report["images_per_chip"] == 4
    assert report["fits"]
    assert report["bytes_per_chip"]["arguments"] > 4 * report["parameters"]
    assert report["collectives"]["all-reduce"] >= 1  # the gradients'
    assert report["config"]["output"] is None  # a path of the machine that compiled


@pytest.mark.parametrize("topology", ["v9x:2x2", "2x2"])
def test_an_unknown_chip_is_refused_with_those_that_are_known(topology: str) -> None:
    with pytest.raises(TopologyError, match="use one of v4, v5e, v5p, v6e"):
        compile_for_topology(CompileConfig(topology=topology))
