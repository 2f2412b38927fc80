"""The torch-free reader: every layout, and no file that harms, hangs or fills the memory."""

import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import recipe
import torch_writer
from torch_writer import Raw, reference

from vmamba_jax.convert import CheckpointError, Opaque, load_torch_file

FIXTURES = Path(__file__).parent / "data" / "fixtures"
HOSTILE = sorted(FIXTURES.glob("hostile_*.pth"))
READABLE = sorted(
    set(FIXTURES.glob("*.pth"))
    - set(FIXTURES.glob("bad_truncated.pth"))
    - set(FIXTURES.glob("bad_not_a_checkpoint.pth"))
)


def write_program(path: Path, *operations: bytes, **members: bytes) -> Path:
    """A checkpoint whose pickle is made of the given operations."""
    program = b"\x80\x02" + b"".join(operations)
    named = {f"data/{key.removeprefix('storage')}": value for key, value in members.items()}
    torch_writer.save_members(path, {"data.pkl": program, "byteorder": b"little", **named})
    return path


def tensor_program(shape, strides, offset=0, count=4, kind="FloatStorage", key="0") -> bytes:
    storages: list[np.ndarray] = []
    identity = ("storage", Raw(reference("torch", kind)), key, "cpu", count)
    persistent = Raw(torch_writer._operations(identity, storages) + pickle.BINPERSID)
    arguments = torch_writer._operations((persistent, offset, shape, strides, False), storages)
    return reference("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


@pytest.mark.parametrize("name", ["cls_released_v2", "bare_state_dict", "legacy_tar_format"])
def test_every_container_gives_the_saved_arrays(name):
    loaded = load_torch_file(FIXTURES / f"{name}.pth")
    state_dict = loaded if name == "bare_state_dict" else loaded["model"]
    assert len(state_dict) == 70
    for key, array in state_dict.items():
        np.testing.assert_array_equal(array, recipe.weight(key, array.shape, 7), strict=True)


def test_bfloat16_is_read_as_bfloat16():
    state_dict = load_torch_file(FIXTURES / "cls_bfloat16.pth")["model"]
    for key, array in state_dict.items():
        assert array.dtype == ml_dtypes.bfloat16
        expected = recipe.weight(key, array.shape, 7).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, expected)


def test_tensors_over_one_storage_come_back_as_its_views():
    loaded = load_torch_file(FIXTURES / "tensor_views_of_one_storage.pth")
    expected = np.load(FIXTURES / "tensor_views_of_one_storage.npz")
    for key, array in loaded.items():
        np.testing.assert_array_equal(array, expected[key])
    assert np.shares_memory(loaded["b"], loaded["c"]) or np.shares_memory(loaded["a"], loaded["b"])


def test_training_state_and_foreign_objects_are_read_without_their_classes():
    loaded = load_torch_file(FIXTURES / "cls_training_with_ema_and_yacs_config.pth")
    assert loaded["epoch"] == 262
    assert loaded["optimizer"]["param_groups"][0]["lr"] == 1e-3
    config = loaded["config"]
    assert isinstance(config, Opaque)
    assert config.name == "yacs.config.CfgNode"
    assert config.items["MODEL"].items["NUM_CLASSES"] == 10


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bfloat16"])
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_the_writer_of_these_tests_round_trips(tmp_path, dtype, byteorder):
    array = np.arange(-6, 6).reshape(3, 4).astype(np.dtype(dtype))
    value = {"a": array, "n": [1, 2.5, None, True, ("x", 10**30)], "scalar": np.array(array[0, 0])}
    torch_writer.save(tmp_path / "a.pth", value, byteorder)
    loaded = load_torch_file(tmp_path / "a.pth")
    np.testing.assert_array_equal(loaded["a"], array, strict=True)
    np.testing.assert_array_equal(loaded["scalar"], array[0, 0])
    assert loaded["n"] == value["n"]


@pytest.mark.parametrize("path", READABLE, ids=lambda path: path.stem)
def test_no_file_imports_or_runs_anything(path, tmp_path):
    watch = """
import sys
from vmamba_jax.convert.torch_file import load_torch_file
before = set(sys.modules)
load_torch_file(sys.argv[1])
load_torch_file(sys.argv[1])
new = {name.partition('.')[0] for name in set(sys.modules) - before}
assert not new - {'encodings'}, new
banned = {'torch', 'yacs', 'mmengine', 'sklearn'} & set(sys.modules)
assert not banned, banned
"""
    if path in HOSTILE or "yacs" in path.stem or "mmseg" in path.stem:
        root = Path(__file__).parents[1]
        subprocess.run(
            [sys.executable, "-c", watch, str(path)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(root), "PATH": "", "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        assert not list(tmp_path.iterdir())  # PWNED_BY_CHECKPOINT would be here
    else:
        before = set(sys.modules)
        load_torch_file(path)
        assert set(sys.modules) == before


def test_a_hostile_call_becomes_an_opaque_value():
    loaded = load_torch_file(FIXTURES / "hostile_os_system.pth")
    assert repr(loaded["config"]) == "<opaque posix.system>"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("bad_not_a_checkpoint", "not a PyTorch checkpoint"),
        ("bad_truncated", "cut short or damaged"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(name, fault):
    path = FIXTURES / f"{name}.pth"
    with pytest.raises(CheckpointError, match=fault) as caught:
        load_torch_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    content = bytearray((FIXTURES / "cls_released_v2.pth").read_bytes())
    start = content.index(recipe.weight("patch_embed.0.weight", (8, 3, 3, 3), 7).tobytes())
    content[start] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC"):
        load_torch_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_program((5,), (1,)),
        tensor_program((2, 2), (3, 1)),
        tensor_program((4,), (1,), offset=1),
        tensor_program((4,), (-1,), offset=3),
        tensor_program((4,), (1,), offset=-4),
        tensor_program((10**12,), (0,)),  # few bytes that claim to be terabytes
        tensor_program((2,) * 40, (0,) * 40),
        tensor_program((2**62, 4), (1, 1)),
        tensor_program((2.0,), (1,)),
        tensor_program((True,), (1,)),
        tensor_program((2,), (1, 1)),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, tensor):
    path = write_program(tmp_path / "a.pth", tensor, b".", storage0=bytes(16))
    with pytest.raises(CheckpointError, match="damaged"):
        load_torch_file(path)


@pytest.mark.parametrize("count", [3, 5, -1, 2**62, True, 10**400])
def test_a_storage_of_another_size_than_declared_is_refused(tmp_path, count):
    tensor = tensor_program((1,), (1,), count=count)
    path = write_program(tmp_path / "a.pth", tensor, b".", storage0=bytes(16))
    with pytest.raises(CheckpointError):
        load_torch_file(path)


@pytest.mark.parametrize("key", ["1", "../byteorder", "/etc/passwd", "x" * 10_000])
def test_a_storage_that_is_not_there_is_refused(tmp_path, key):
    tensor = tensor_program((1,), (1,), key=key)
    path = write_program(tmp_path / "a.pth", tensor, b".", storage0=bytes(16))
    with pytest.raises(CheckpointError) as caught:
        load_torch_file(path)
    assert len(str(caught.value)) < 1000


def test_an_empty_tensor_and_an_unknown_kind_of_storage_are_read(tmp_path):
    path = write_program(
        tmp_path / "a.pth",
        b"(",
        tensor_program((0, 3), (3, 1), count=0),
        tensor_program((4,), (1,), kind="ComplexFloatStorage"),
        b"t.",
        storage0=b"",
    )
    empty, unknown = load_torch_file(path)
    assert empty.shape == (0, 3)
    assert isinstance(unknown, Opaque)


SYSTEM = reference("os", "system") + b"X\x04\x00\x00\x00true\x85"


@pytest.mark.parametrize(
    "operations",
    [
        SYSTEM + b"R}b.",  # a call, then attributes
        SYSTEM + b"\x81.",  # NEWOBJ
        SYSTEM + b"}\x92.",  # NEWOBJ_EX
        b"\x8c\x02os\x8c\x06system\x93)R.",  # STACK_GLOBAL
        reference("builtins", "dict") + b")R(X\x01\x00\x00\x00aK\x01u.",
        reference("collections", "OrderedDict") + b")R}b.",
    ],
)
def test_calls_of_unknown_functions_are_inert(tmp_path, operations):
    assert isinstance(load_torch_file(write_program(tmp_path / "a.pth", operations)), Opaque | dict)


@pytest.mark.parametrize(
    "operations",
    [
        b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"(X\x04\x00\x00\x00trueios\nsystem\n.",  # INST
        b"\x82\x01.",  # EXT1
        b"Pid\n.",  # PERSID
        b"\x96" + struct.pack("<Q", 1 << 40) + b".",  # BYTEARRAY8 of a terabyte
        b"\x8d" + struct.pack("<Q", 1 << 62) + b"a.",  # BINUNICODE8 beyond the file
        b"\x8b" + struct.pack("<i", -1) + b".",  # LONG4 of a negative size
        b"K\x01}b.",  # BUILD on a number
        b"](X\x01\x00\x00\x00au.",  # SETITEMS on a list, with half an item
        b"}](K\x01eK\x01s.",  # a list as a key
        b"X\x02\x00\x00\x00os)R.",  # a call of a string
        b"h\x07.",  # an unknown memo
        b"R.",  # an empty stack
        b"t.",  # no mark
        b"}",  # no end
        b"c" + b"m" * 600 + b"\nx\n.",
        b"\xff.",
        b"I" + b"9" * 10_000 + b"\n.",
    ],
)
def test_other_operations_are_refused(tmp_path, operations):
    with pytest.raises(CheckpointError):
        load_torch_file(write_program(tmp_path / "a.pth", operations))


def test_deep_nesting_neither_overflows_nor_hangs(tmp_path):
    depth = 100_000
    nested = write_program(tmp_path / "list.pth", b"]" * depth, b"a" * (depth - 1), b".")
    assert isinstance(load_torch_file(nested), list)
    key = write_program(tmp_path / "key.pth", b"}", b")", b"\x85" * depth, b"K\x01s.")
    with pytest.raises(CheckpointError, match="dict key"):
        load_torch_file(key)


def test_a_large_memo_index_costs_no_memory(tmp_path):
    path = write_program(tmp_path / "a.pth", b"}r\xff\xff\xff\xff.")
    assert load_torch_file(path) == {}


@pytest.mark.parametrize(
    "operations",
    [
        b"}" * 1_000_000 + b".",  # a dict for every byte
        b"X" + struct.pack("<I", 9 << 20) + b"a" * (9 << 20) + b".",
        b"}\x8b" + struct.pack("<i", 1000) + b"\x01" * 1000 + b"Ns.",  # an integer of 8000 bits
        b"}\x8a\x09" + bytes(8) + b"\x01Ns.",  # 2**64 as a key
        b"}(" + b"K\x01" * 9 + b"tNs.",
        b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"\x85N" for i in range(2500)) + b"u.",
    ],
    ids=["objects", "string", "integer", "key", "long tuple", "many tuples"],
)
def test_what_costs_far_more_than_its_bytes_is_refused(tmp_path, operations):
    with pytest.raises(CheckpointError) as caught:
        load_torch_file(write_program(tmp_path / "a.pth", operations))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_program((2**64,), (0,)),
        tensor_program((1,), (2**64,)),
        tensor_program((1,), (1,), offset=2**64),
        tensor_program((1,), (1,), count=2**60),
    ],
)
def test_sizes_beyond_any_machine_s_are_malformed(tmp_path, tensor):
    path = write_program(tmp_path / "a.pth", tensor, b".", storage0=bytes(16))
    with pytest.raises(CheckpointError, match="malformed"):
        load_torch_file(path)


def test_a_byte_order_is_one_word(tmp_path):
    path = tmp_path / "a.pth"
    members = {"data.pkl": b"\x80\x02}.", "byteorder": b"little" + bytes(1000)}
    torch_writer.save_members(path, members)
    with pytest.raises(CheckpointError, match="a byte order of 1006 bytes"):
        load_torch_file(path)


def test_an_archive_s_directory_is_bounded(tmp_path):
    path = tmp_path / "a.pth"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 9 << 20, 4, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(9 << 20) + end)
    with pytest.raises(CheckpointError, match="at once"):
        load_torch_file(path)


def test_an_error_stays_one_short_line(tmp_path):
    path = write_program(tmp_path / "a.pth", b"Sx" + b"x" * 100_000 + b"\n.")
    with pytest.raises(CheckpointError) as caught:
        load_torch_file(path)
    assert len(str(caught.value)) < 500
    assert len(str(caught.value).splitlines()) == 1


def test_an_old_file_s_strings_are_bounded(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.")
    with pytest.raises(CheckpointError, match="at once"):
        load_torch_file(path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}." + bytes(1 << 20))
    with pytest.raises(CheckpointError, match="compressed"):
        load_torch_file(path)


def test_an_archive_without_a_pickle_is_refused(tmp_path):
    torch_writer.save_members(tmp_path / "a.pth", {"word/document.xml": b"<xml/>"})
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        load_torch_file(tmp_path / "a.pth")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_torch_file(tmp_path / "a.pth")
