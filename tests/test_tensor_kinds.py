"""Tensors of every kind: read bit for bit, or called by their name where they can't be."""

import pickle
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import recipe
import torch_writer
from torch_writer import Raw, reference

from vmamba_jax import VMambaConfig
from vmamba_jax.convert import (
    CheckpointError,
    Opaque,
    infer_config,
    load_torch_file,
    read_weights,
    save_model,
)
from vmamba_jax.convert.export import save_safetensors, save_torch
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.convert.safetensors_file import load_safetensors

MORE = Path(__file__).parent / "data" / "fixtures" / "more"
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
SMALL = VMambaConfig(
    depths=(1, 1), dims=(16, 32), num_classes=3, ssm_d_state=1, forward_type="v05", norm_layer="bn"
)


def call(module: str, name: str, *args) -> Raw:
    return Raw(reference(module, name) + torch_writer._operations(tuple(args), []) + pickle.REDUCE)


def storage(kind: str, key: str, count: int) -> Raw:
    module, _, name = kind.rpartition(".")
    identity = ("storage", Raw(reference(module, name)), key, "cpu", count)
    return Raw(torch_writer._operations(identity, []) + pickle.BINPERSID)


def untyped(dtype: str, data: bytes, shape, strides, offset=0) -> Raw:
    kind = Raw(reference("torch", dtype))
    where = storage("torch.storage.UntypedStorage", "0", len(data))
    return call(
        *("torch._utils", "_rebuild_tensor_v3", where, offset, shape, strides, False, None, kind)
    )


def load(path: Path, value: Raw, data: bytes = b"", byteorder: str = "little"):
    program = b"\x80\x02" + value.operations + b"."
    members = {"data.pkl": program, "byteorder": byteorder.encode(), "data/0": data}
    torch_writer.save_members(path / "a.pth", members)
    return load_torch_file(path / "a.pth")


@pytest.mark.parametrize("dtype", [*FLOAT8, "uint16", "uint32", "uint64"])
def test_types_without_a_storage_of_their_own_are_read(tmp_path, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    data = bytes(range(48))
    count = 48 // kind.itemsize
    expected = np.frombuffer(data, kind)[1:].reshape(1, -1)
    value = untyped(dtype, data, (1, count - 1), (count, 1), offset=1)
    array = load(tmp_path, value, data)
    assert array.dtype == kind
    np.testing.assert_array_equal(array.view(np.uint8), expected.view(np.uint8))
    with pytest.raises(CheckpointError, match="beyond its storage"):
        load(tmp_path, untyped(dtype, data, (count + 1,), (1,)), data)


def test_a_subclass_of_a_tensor_and_a_buffer_are_the_tensor_inside(tmp_path):
    data = np.arange(4, dtype=np.float32)
    args = (storage("torch.FloatStorage", "0", 4), 0, (2, 2), (2, 1), False, None)
    plain = Raw(reference("torch._utils", "_rebuild_tensor_v2"))
    for kind in (("torch", "Tensor"), ("torch.nn.parameter", "Buffer"), ("my.own", "Tensor")):
        state = {"note": "an attribute"}
        value = call(
            *("torch._tensor", "_rebuild_from_type_v2", plain, Raw(reference(*kind)), args, state)
        )
        np.testing.assert_array_equal(load(tmp_path, value, data.tobytes()), data.reshape(2, 2))


HOOKS = Raw(pickle.NONE)
FLOAT32 = Raw(reference("torch", "float32"))
TWICE = Raw(reference("torch._tensor", "_rebuild_from_type_v2"))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (
            call(*("torch._utils", "_rebuild_meta_tensor_no_storage", FLOAT32, (2,), (1,), False)),
            "a meta tensor: it has no data",
        ),
        (
            call("torch._utils", "_rebuild_sparse_tensor", FLOAT32, (1, 2)),
            "a sparse tensor: not supported",
        ),
        (
            call("torch._utils", "_rebuild_qtensor", None, 0, (2,), (1,)),
            "a quantised tensor: not supported",
        ),
        (
            call(
                *("torch._utils", "_rebuild_tensor_v2"),
                *(storage("torch.ComplexFloatStorage", "0", 2), 0, (2,), (1,), False, HOOKS),
            ),
            "a tensor of type ComplexFloat: not supported",
        ),
        (
            call(
                "torch._tensor", "_rebuild_from_type_v2", TWICE, FLOAT32, (TWICE, FLOAT32, ()), {}
            ),
            "not supported",
        ),
        (untyped("float4_e2m1fn_x2", b"", (0,), (1,)), "torch.float4_e2m1fn_x2: not supported"),
        (call("torch._utils", "_rebuild_wrapper_subclass", 1), "not supported"),
    ],
)
def test_tensors_that_cannot_be_read_are_called_by_their_kind(tmp_path, value, fault):
    tensor = load(tmp_path, value)
    assert isinstance(tensor, Opaque)
    assert fault in tensor.fault
    weights = {
        "patch_embed.0.weight": np.zeros(3, np.float32),
        "layers.0.blocks.0.norm.weight": value,
    }
    torch_writer.save(tmp_path / "b.pth", {"model": weights})
    with pytest.raises(CheckpointError, match=r"its weight 'layers\.0\.blocks\.0.*' is ") as caught:
        read_weights(tmp_path / "b.pth")
    assert fault in str(caught.value)


def test_an_untyped_storage_of_another_byte_order_is_not_guessed(tmp_path):
    data = bytes(range(8))
    tensor = load(tmp_path, untyped("uint16", data, (4,), (1,)), data, "big")
    assert isinstance(tensor, Opaque)
    assert "byte order" in tensor.fault
    array = load(tmp_path, untyped("float8_e5m2", data, (8,), (1,)), data, "big")
    assert array.tobytes() == data


def test_a_float8_weight_is_widened_and_kept_in_its_own_type():
    read = read_weights(MORE / "float8_tensor.pth")
    key = "layers.0.blocks.0.op.Ds"
    assert read.state_dict[key].dtype == ml_dtypes.float8_e4m3fn
    exact = recipe.weight(key, (128,), 7).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ds = read.variables()["params"]["layers_0_blocks_0"]["op"]["Ds"]
    np.testing.assert_array_equal(ds.reshape(-1), exact)


def test_plain_objects_of_pickle_protocol_5_lie_beside_the_weights():
    read = read_weights(MORE / "protocol5_plain_objects.pth")
    for key, array in read.state_dict.items():
        np.testing.assert_array_equal(array, recipe.weight(key, array.shape, 7))
    left_out = {change.source for change in read.changes if change.action == "left out"}
    assert left_out == {"ids", "blob", "when"}


@pytest.mark.parametrize("name", ["", ".metadata", "__0_0.distcp", "renamed.pth"])
def test_a_distributed_checkpoint_names_the_command_that_makes_a_file_of_it(tmp_path, name):
    path = MORE / "distributed_checkpoint" / name
    if name == "renamed.pth":
        path = tmp_path / name
        shutil.copy(MORE / "distributed_checkpoint" / "__0_0.distcp", path)
    with pytest.raises(CheckpointError, match="format_utils dcp_to_torch DIR FILE"):
        read_weights(path)


def test_one_tensor_is_no_state_dict(tmp_path):
    torch_writer.save(tmp_path / "a.pth", np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match="one tensor"):
        read_weights(tmp_path / "a.pth")


def small_state_dict() -> dict[str, np.ndarray]:
    shapes = {weight.key: weight.shape for weight in weight_table(SMALL)}
    state_dict = recipe.state_dict(shapes, 7)
    for i, key in enumerate(list(state_dict)):
        if key.endswith("running_var"):
            counter = key.replace("running_var", "num_batches_tracked")
            state_dict[counter] = np.asarray(1000 + i, np.int64)
    return state_dict


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_types_shapes_and_counters_come_back_through_a_saved_model(tmp_path, form):
    state_dict = small_state_dict()
    for key, dtype in (
        ("patch_embed.0.weight", np.float16),
        ("layers.0.blocks.0.op.Ds", ml_dtypes.bfloat16),
    ):
        state_dict[key] = state_dict[key].astype(dtype)
    path = tmp_path / f"a.{form}"
    if form == "pth":
        torch_writer.save(path, state_dict)
    else:
        save_safetensors(path, state_dict)
    read = read_weights(path)
    save_model(tmp_path / "model", read.variables(), read.config, read.provenance)
    save_safetensors(tmp_path / "b.safetensors", read_weights(tmp_path / "model").state_dict)
    back = load_safetensors(tmp_path / "b.safetensors")
    assert back.keys() == state_dict.keys()
    for key, array in back.items():
        assert isinstance(array, np.ndarray)
        assert array.shape == state_dict[key].shape  # () of a counter too
        np.testing.assert_array_equal(array, state_dict[key], strict=True)


def test_a_new_head_of_a_half_precision_model_keeps_its_own_type(tmp_path):
    half = {k: a.astype(np.float16) for k, a in small_state_dict().items() if a.ndim}
    torch_writer.save(tmp_path / "a.pth", half)
    read = read_weights(tmp_path / "a.pth", num_classes=5)
    save_model(tmp_path / "model", read.variables(), read.config, read.provenance)
    again = read_weights(tmp_path / "model").state_dict
    head = "classifier.head.weight"
    np.testing.assert_array_equal(again[head], read.state_dict[head], strict=True)
    assert again["patch_embed.0.weight"].dtype == np.float16


def test_a_model_saved_with_one_type_for_all_gives_it_back(tmp_path):
    half = {k: a.astype(np.float16) for k, a in small_state_dict().items() if a.ndim}
    torch_writer.save(tmp_path / "a.pth", half)
    read = read_weights(tmp_path / "a.pth")
    save_model(tmp_path / "model", read.variables(), read.config, {"dtype": "float16"})
    again = read_weights(tmp_path / "model").state_dict
    for key, array in half.items():
        np.testing.assert_array_equal(again[key], array, strict=True)


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_kind_of_tensor_is_what_pytorch_saved(tmp_path, protocol):
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    names = (*FLOAT8, "uint16", "uint32", "uint64", "bfloat16", "float16", "bool", "int8")
    tensors = {
        name: torch.arange(8).to(torch.float32).reshape(2, 4).T.to(getattr(torch, name))
        for name in names
    }
    tensors["counter"] = torch.tensor(7)
    tensors["buffer"] = torch.nn.Buffer(torch.ones(3))
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    vars(tensors["parameter"])["note"] = "an attribute"
    faults = {
        "meta": (torch.empty(2, device="meta"), "no data"),
        "sparse": (torch.eye(2).to_sparse(), "a sparse tensor"),
        "complex": (torch.ones(2, dtype=torch.complex64), "ComplexFloat"),
    }
    unreadable = {name: tensor for name, (tensor, _) in faults.items()}
    torch.save({**tensors, **unreadable}, tmp_path / "a.pth", pickle_protocol=protocol)
    loaded = load_torch_file(tmp_path / "a.pth")
    for name, tensor in tensors.items():
        assert loaded[name].shape == tuple(tensor.shape)
        assert name not in names or loaded[name].dtype.name == name
        np.testing.assert_array_equal(
            loaded[name].astype(np.float32), tensor.detach().float().numpy()
        )
    for name, (_, fault) in faults.items():
        assert fault in loaded[name].fault
    save_torch(tmp_path / "b.pth", {name: loaded[name] for name in tensors})
    back = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name].float(), tensor.detach().float())


def safetensors_file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_whole_safetensors_file_of_float8_is_read():
    loaded = load_safetensors(MORE / "float8_no_vmamba.safetensors")
    np.testing.assert_array_equal(loaded["x"], np.zeros(4, ml_dtypes.float8_e4m3fn), strict=True)
    with pytest.raises(CheckpointError, match="no VMamba state dict"):
        read_weights(MORE / "float8_no_vmamba.safetensors")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[]", b""),
        (b"{", b""),
        (b'{"a": 3}', b""),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', bytes(8)),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(4)),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(9)),
        (b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,-8]}}', b""),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', bytes(4)),
        (b'{"a":{"dtype":"F32","shape":[0,1e99],"data_offsets":[0,0]}}', b""),
        (b'{"a":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 10**60, b""),
        (b'{"a":{"dtype":"F32","shape":"xy","data_offsets":[0,4]}}', bytes(4)),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        (b"[" * 100_000, b""),
        (  # more dimensions than any array has
            b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % b",".join([b"1"] * 33),
            bytes(4),
        ),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),  # two names for the same bytes
    ],
)
def test_a_damaged_safetensors_file_is_said_to_be(tmp_path, header, data):
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_safetensors(safetensors_file(tmp_path / "a.safetensors", header, data))
    assert len(str(caught.value)) < 500


def test_a_safetensors_header_is_bounded(tmp_path):
    path = safetensors_file(tmp_path / "a.safetensors", b" " * (5 << 20))
    with pytest.raises(CheckpointError, match="larger than 4 MiB"):
        load_safetensors(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="cut short"):
        load_safetensors(path)
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="cut short"):
        load_safetensors(path)


def test_other_types_in_a_safetensors_file_are_called_by_their_name(tmp_path):
    header = b'{"__metadata__":{"a":"b"},"z":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}'
    loaded = load_safetensors(safetensors_file(tmp_path / "a.safetensors", header, bytes(8)))
    assert isinstance(loaded["z"], Opaque)
    assert loaded["z"].fault == "a tensor of type C64: not supported"


def of_shape(**shapes) -> dict[str, np.ndarray]:
    """A VMamba's state dict of zeros that take no memory, with some shapes changed."""
    table = {weight.key: weight.shape for weight in weight_table(SMALL)} | shapes
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in table.items()}


OP = "layers.0.blocks.0.op."


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        ({f"{OP}x_proj_weight": (4, 100_000, 32)}, "than this package builds"),
        ({f"{OP}x_proj_weight": (0, 10**15, 32)}, r"x_proj_weight has shape \(0, 10{15}, 32\)"),
        ({f"{OP}conv2d.weight": (32, 1, 1001, 1001)}, "than this package builds"),
        ({"layers.7.blocks.0.norm.weight": (8,)}, "stages I = 0"),
        ({"layers.999.blocks.999.norm.weight": (8,)}, "stages I = 0"),
        ({f"layers.{i}.blocks.0.norm.weight": (8,) for i in range(20)}, "stages I = 0"),
        ({"patch_embed.0.weight": ()}, r"patch_embed.0.weight has shape \(\)"),
        ({"layers.1.blocks.0.norm.weight": (8, 8)}, r"norm.weight has shape \(8, 8\)"),
    ],
)
def test_numbers_in_names_and_shapes_set_no_loop_s_length(shapes, fault):
    with pytest.raises(ValueError, match=fault):
        infer_config(of_shape(**shapes))


def test_a_block_s_number_is_no_count():
    config = infer_config(of_shape(**{"layers.0.blocks.999.norm.weight": (16,)}))
    assert config.depths == (2, 1)


def test_many_names_for_one_storage_are_refused(tmp_path):
    shared = np.zeros(100_000, np.float16)
    operations, storages = torch_writer._operations(shared, []), [shared]
    names = [f"layers.0.blocks.{i}.norm.weight" for i in range(50)] + ["patch_embed.0.weight"]
    program = torch_writer._operations({name: Raw(operations) for name in names}, [])
    members = {"data.pkl": b"\x80\x02" + program + b".", "byteorder": b"little"}
    members |= {f"data/{i}": array.view(np.uint8) for i, array in enumerate(storages)}
    torch_writer.save_members(tmp_path / "a.pth", members)
    with pytest.raises(CheckpointError, match="views of one another"):
        read_weights(tmp_path / "a.pth")
