"""Downloads that are cut, refused, replaced or wanted twice; every byte over 127.0.0.1."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_writer

from vmamba_jax import VMambaConfig, create_model, model_config, register_model
from vmamba_jax.convert import (
    CheckpointError,
    Weights,
    load_model,
    pretrained,
    read_weights,
    releases,
)
from vmamba_jax.convert.mapping import weight_table

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "data" / "fixtures" / "cls_released_v2.pth"
CONTENT = FILE.read_bytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TINY = VMambaConfig(
    depths=(1, 2),
    dims=(16, 32),
    num_classes=10,
    ssm_d_state=1,
    ssm_dt_rank=3,
    ssm_conv_bias=False,
    forward_type="v05_noz",
    norm_layer="ln2d",
    downsample_version="v3",
    patchembed_version="v2",
)
register_model("tiny_of_the_tests", TINY)


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, with the faults it is told to have."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.faults: list[str | int] = []  # what to do to the next requests: "cut" or a status
        self.resumable = True
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/releases/%23v2cls/tiny.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        server.ranges.append(self.headers["Range"])
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        start = 0
        if server.resumable and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("VMAMBA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(pretrained, "_PAUSE", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def kept_files(tmp_path) -> set[str]:
    return {p.name for p in (tmp_path / "cache").glob("*/*")}


def test_a_checkpoint_is_fetched_and_converted_once(server, tmp_path):
    model = pretrained.cached_model(server.url)
    assert pretrained.cached_model(server.url) == model
    assert server.ranges == [None]
    assert load_model(model).provenance["sha256"] == SHA256
    assert load_model(model).provenance["url"] == server.url
    assert kept_files(tmp_path) == {"tiny.pth", "sha256", "model", "lock"}


def test_create_model_takes_an_address_a_path_and_a_saved_model(server):
    expected = read_weights(FILE).variables()
    sources = (server.url, FILE, str(FILE), pretrained.cached_model(server.url))
    for source in sources:
        _, variables = create_model("tiny_of_the_tests", pretrained=source, num_classes=10)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_another_number_of_classes_starts_a_new_head_only():
    model, variables = create_model("tiny_of_the_tests", pretrained=FILE, num_classes=3)
    assert model.config.num_classes == 3
    expected = read_weights(FILE).variables()["params"]
    assert variables["params"]["head"]["kernel"].shape == (32, 3)
    for name in expected.keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, variables["params"][name], expected[name])
    key = jax.random.key(1)
    _, other = create_model("tiny_of_the_tests", pretrained=FILE, num_classes=3, rng=key)
    assert np.any(other["params"]["head"]["kernel"] != variables["params"]["head"]["kernel"])


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(CheckpointError, match="another architecture than vmamba_digits"):
        create_model("vmamba_digits", pretrained=FILE, num_classes=10)
    with pytest.raises(CheckpointError, match="no checkpoint of 'vmamba_digits' was released"):
        create_model("vmamba_digits", pretrained=True)


def test_a_file_of_another_release_is_called_by_its_name(monkeypatch, tmp_path):
    config = model_config("vmamba_tiny_s2l5")
    shapes = {
        weight.key: np.broadcast_to(np.float32(0), weight.shape) for weight in weight_table(config)
    }
    weights = Weights(shapes, config, {}, [])
    monkeypatch.setattr(pretrained, "read_weights", lambda *_, **__: weights)
    asked = model_config("vmamba_tiny_s1l8")
    with pytest.raises(CheckpointError) as caught:
        pretrained.load_pretrained("a.pth", asked, "vmamba_tiny_s1l8")
    assert str(caught.value).startswith(
        "a.pth is vmamba_tiny_s2l5 (depths 2, 2, 5, 2, ssm_ratio 2), "
        "not vmamba_tiny_s1l8 (depths 2, 2, 8, 2, ssm_ratio 1): "
    )


@pytest.mark.parametrize(
    ("field", "key", "value"),
    [("forward_type", "SSM_FORWARDTYPE", "v051d_noz"), ("ssm_act_layer", "SSM_ACT_LAYER", "gelu")],
)
def test_what_the_file_states_and_weights_leave_open_is_compared(tmp_path, field, key, value):
    state_dict = read_weights(FILE).state_dict
    config = {"MODEL": {"VSSM": {key: value}}}
    torch_writer.save(tmp_path / "a.pth", {"model": state_dict, "config": config})
    with pytest.raises(CheckpointError, match=f"{field} {value}.*, not tiny_of_the_tests"):
        create_model("tiny_of_the_tests", pretrained=tmp_path / "a.pth", num_classes=10)
    create_model(
        "tiny_of_the_tests", pretrained=tmp_path / "a.pth", num_classes=10, **{field: value}
    )


@pytest.mark.parametrize("value", ["v05_noz", "v3_noz", "v05_noz_no32"])
def test_another_spelling_of_the_same_operator_is_no_difference(tmp_path, value):
    config = {"MODEL": {"VSSM": {"SSM_FORWARDTYPE": value}}}
    weights = {"model": read_weights(FILE).state_dict, "config": config}
    torch_writer.save(tmp_path / "a.pth", weights)
    create_model("tiny_of_the_tests", pretrained=tmp_path / "a.pth", num_classes=10)


def test_pretrained_by_name_fetches_the_release(server, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "cached_model", lambda url: asked.append(url) or FILE)
    release = releases.Release("#v2cls", "tiny.pth", 12.3)
    monkeypatch.setitem(pretrained.RELEASES, "tiny_of_the_tests", release)
    create_model("tiny_of_the_tests", pretrained=True, num_classes=10)
    base = "https://github.com/MzeroMiko/VMamba/releases/download"
    assert asked == [f"{base}/%23v2cls/tiny.pth"]


def test_a_cut_download_resumes(server, tmp_path):
    server.faults = ["cut", "cut"]
    model = pretrained.cached_model(server.url)
    half = len(CONTENT) // 2
    rest = len(CONTENT) - half
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + rest // 2}-"]
    assert load_model(model).provenance["sha256"] == SHA256


def test_a_download_resumes_in_the_next_process(server):
    server.faults = ["cut"] + [503] * 4
    with pytest.raises(CheckpointError, match="goes on from there"):
        pretrained.cached_model(server.url)
    server.ranges.clear()
    pretrained.cached_model(server.url)
    assert server.ranges == [f"bytes={len(CONTENT) // 2}-"]


def test_a_server_that_cannot_resume_sends_the_whole_again(server):
    server.resumable, server.faults = False, ["cut"]
    assert load_model(pretrained.cached_model(server.url)).provenance["sha256"] == SHA256


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    server.faults = ["cut"] + [503] * 4
    with pytest.raises(CheckpointError):
        pretrained.cached_model(server.url)
    (part,) = (tmp_path / "cache").glob("*/*.part")
    part.write_bytes(bytes(len(CONTENT) + 1))
    assert load_model(pretrained.cached_model(server.url)).provenance["sha256"] == SHA256


def test_passing_faults_of_the_server_are_retried(server):
    server.faults = [503, 429, 500]
    pretrained.cached_model(server.url)
    assert len(server.ranges) == 4


def test_a_missing_file_is_said_at_once(server):
    server.faults = [404]
    with pytest.raises(CheckpointError, match=r"tiny\.pth: the server answers 404"):
        pretrained.cached_model(server.url)
    assert len(server.ranges) == 1


def test_no_server_is_said_after_a_few_attempts(server):
    url = server.url.replace(str(server.server_port), "9")
    with pytest.raises(CheckpointError, match="can't be fetched"):
        pretrained.cached_model(url)


def test_a_stated_hash_is_checked(server, tmp_path):
    with pytest.raises(CheckpointError, match=f"SHA-256 is {SHA256} and should be {'0' * 64}"):
        pretrained.cached_model(f"{server.url}#sha256={'0' * 64}")
    assert kept_files(tmp_path) == {"lock"}
    pretrained.cached_model(f"{server.url}#sha256={SHA256}")
    with pytest.raises(CheckpointError, match="Delete that folder"):
        pretrained.cached_model(f"{server.url}#sha256={'0' * 64}")
    with pytest.raises(CheckpointError, match="64 hexadecimal digits"):
        pretrained.cached_model(f"{server.url}#md5=0")


def test_a_file_is_first_seen_until_it_is_pinned(server, monkeypatch, capfd):
    model = pretrained.cached_model(server.url)
    assert f"first seen, not pinned: SHA-256 {SHA256}" in capfd.readouterr().err
    assert load_model(model).provenance["sha256_is"] == "first seen, not pinned"
    # Pinned to other content, the copy is refused; another address of a pinned file is checked.
    monkeypatch.setattr(pretrained, "pinned_sha256", lambda url: "0" * 64)
    with pytest.raises(CheckpointError, match=f"has SHA-256 {SHA256} and not {'0' * 64}"):
        pretrained.cached_model(server.url)
    monkeypatch.setattr(pretrained, "pinned_sha256", lambda url: SHA256)
    assert pretrained.cached_model(server.url) == model
    again = pretrained.cached_model(f"{server.url}?mirror")
    assert "first seen" not in capfd.readouterr().err
    assert load_model(again).provenance["sha256_is"] == "as stated"


def test_the_table_of_hashes_is_read_as_sha256sum_writes_it(tmp_path, monkeypatch):
    release = releases.RELEASES["vmamba_tiny_s1l8"]
    (tmp_path / releases.PINNED).write_text(f"# hashes\n{SHA256}  {release.file}\n")
    monkeypatch.setattr(releases.resources, "files", lambda package: tmp_path)
    assert releases.pinned_sha256(release.url) == SHA256
    assert releases.pinned_sha256(releases.RELEASES["vmamba_tiny_s2l5"].url) is None
    assert releases.pinned_sha256("http://127.0.0.1/a.pth") is None


def test_every_pinned_hash_is_of_a_released_file():
    text = (Path(releases.__file__).parent / releases.PINNED).read_text()
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    assert {file for _, file in lines} <= {release.file for release in releases.RELEASES.values()}
    assert all(len(bytes.fromhex(digits)) == 32 for digits, _ in lines)


def test_the_recorded_hash_is_checked_when_the_file_is_read_again(server, tmp_path):
    model = pretrained.cached_model(server.url)
    file = model.parent / "tiny.pth"
    file.write_bytes(CONTENT[:-1] + b"!")
    for path in sorted(model.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    model.rmdir()
    with pytest.raises(CheckpointError, match="damaged or replaced"):
        pretrained.cached_model(server.url)
    assert not file.exists()
    assert load_model(pretrained.cached_model(server.url)).provenance["sha256"] == SHA256


def test_a_page_instead_of_a_checkpoint_is_not_kept(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        pretrained.cached_model(server.url)
    assert kept_files(tmp_path) == {"lock"}


def test_two_processes_at_once_fetch_it_once(server):
    script = (
        "import json, sys; from vmamba_jax.convert.pretrained import cached_model;"
        "from vmamba_jax.convert import load_model;"
        "print(json.dumps(load_model(cached_model(sys.argv[1])).provenance))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, server.url],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert json.loads(output)["sha256"] == SHA256
    assert server.ranges == [None]
