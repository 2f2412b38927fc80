"""A training step compiled by TPU's own compiler for chips that are not here."""

import json
import math
from pathlib import Path

import pytest
from tiny import CONFIG

from vmamba_jax.registry import register_model
from vmamba_jax.training.chips import SLICES, TopologyError, describe, memory_of
from vmamba_jax.training.cli import main
from vmamba_jax.training.config import DataConfig, ModelConfig
from vmamba_jax.training.sharding import MeshConfig, make_mesh
from vmamba_jax.training.topology import CompileConfig, compile_for_topology

register_model("tiny_for_tpu", CONFIG)

GIB = 2**30


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other workers compile too


@pytest.mark.tpu
def test_the_report_says_what_a_device_needs(tmp_path: Path, libtpu: None) -> None:
    output = tmp_path / "fit.json"
    config = CompileConfig(
        topology="v5e:2x2",
        model=ModelConfig("tiny_for_tpu", dtype="bfloat16", scan_blocks=True),
        data=DataConfig(batch_size=16),
        num_classes=10,
        output=output,
        explain=True,
    )
    report = compile_for_topology(config)
    assert json.loads(output.read_text()) == report
    assert report["devices"] == report["chips"] == 4
    assert report["images_per_device"] == 4
    assert report["fits"]
    assert report["bytes_per_device"]["arguments"] > 4 * report["parameters"]
    assert report["collectives"]["all-reduce"] >= 1  # the gradients'
    assert report["recompute"] == "activations"  # it fits as it is
    held = report["held_at_peak"]
    needs = report["bytes_per_device"]
    # The compiler's own sum has gaps between arrays, and room for its own.
    most = needs["arguments"] + needs["temporaries"]
    assert needs["arguments"] < sum(entry["size"] for entry in held) < most
    assert {entry["kind"].split()[0] for entry in held} >= {"argument", "forward", "backward"}
    assert any(entry["layer"].startswith("layers_") for entry in held)
    assert report["config"]["output"] is None  # a path of the machine that compiled


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "devices"), [("v4:2x2x1", 4), ("tpu7x:2x2x1", 8)])
def test_a_step_is_compiled_for_what_the_devices_of_a_slice_are(
    topology: str, devices: int, libtpu: None
) -> None:
    config = CompileConfig(
        topology=topology,
        model=ModelConfig("tiny_for_tpu", scan_blocks=True),
        data=DataConfig(batch_size=16),
        num_classes=10,
    )
    report = compile_for_topology(config)
    assert report["chips"] == 4
    assert report["devices"] == report["mesh"]["data"] == devices
    assert report["fits"]


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("kind", "gibibytes"),
    [("v4", 30.75), ("v5e", 15.75), ("v5p", 95.74), ("v6e", 31.25), ("tpu7x", 94.75)],
)
def test_a_kind_has_the_memory_that_the_compiler_gives_a_program(
    kind: str, gibibytes: float, libtpu: None
) -> None:
    memory = memory_of(describe(next(name for name in SLICES if name.startswith(kind)))[0])
    assert memory is not None
    assert memory / GIB == pytest.approx(gibibytes, abs=0.015)  # libtpu rounds, or cuts off


@pytest.mark.tpu
def test_all_slices_of_the_list_are_described(libtpu: None) -> None:
    for name in SLICES:
        sides = name.split(":")[1].split("x")
        chips = {tuple(device.coords) for device in describe(name)}
        assert [str(1 + max(of)) for of in zip(*chips, strict=True)][: len(sides)] == sides


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "fsdp"), [("v6e:8x8", 16), ("v5e:4x4", 8)])
def test_an_axis_of_a_mesh_may_take_part_of_a_side_of_the_chips(
    topology: str, fsdp: int, libtpu: None
) -> None:
    mesh = make_mesh(MeshConfig(fsdp=fsdp), describe(topology))
    assert mesh.shape["fsdp"] == fsdp
    assert mesh.size == math.prod(map(int, topology.split(":")[1].split("x")))


def test_libtpu_that_another_process_uses_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(kind: str, shape: str):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr("vmamba_jax.training.chips._describe", taken)
    with pytest.raises(TopologyError, match="Another process uses libtpu: wait for it"):
        describe("v5e:4x4")


@pytest.mark.tpu
def test_an_impossible_arrangement_is_refused_with_those_that_exist(libtpu: None) -> None:
    with pytest.raises(TopologyError, match="such as 1x1, 2x2, 2x4"):
        describe("v5e:3x3")


@pytest.mark.parametrize("topology", ["v9x:2x2", "2x2"])
def test_an_unknown_chip_is_refused_with_those_that_are_known(topology: str) -> None:
    with pytest.raises(TopologyError, match="Accepted: v4, v5e, v5p, v6e, tpu7x"):
        compile_for_topology(CompileConfig(topology=topology))


def test_the_command_line_validates_and_completes_topologies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["compile", "digits", "--topology", "v5e:3x3"])
    assert "invalid choice 'v5e:3x3'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compile", "digits", "--tyro-print-completion", "bash"])
    assert "'v4:4x4x4', 'v4:4x4x8'" in capsys.readouterr().out
