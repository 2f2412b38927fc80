"""Reads mutated checkpoints of one container; run as a program, so that its memory can be measured.

    python fuzz.py CONTAINER CASES FOLDER

prints as JSON how many could be read and were refused, the longest processor time of one in
seconds, and by how much memory grew over all, in bytes.
"""

import json
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch_writer
from peak_memory import peak_memory

from vmamba_jax.convert import CheckpointError, read_weights

FIXTURES = Path(__file__).parent / "data" / "fixtures"
MORE = FIXTURES / "more"
PORT = MORE / "huggingface_folder"


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Overwrites, deletes or inserts a few bytes."""
    mutated = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(mutated))
        match draw.randrange(4):
            case 0:
                mutated[at] = draw.randrange(256)
            case 1:
                mutated[at] ^= 1 << draw.randrange(8)
            case 2:
                del mutated[at : at + draw.choice((1, 4, 20))]
            case 3:
                mutated[at:at] = draw.randbytes(draw.choice((1, 4)))
    return bytes(mutated)


def damaged(path: Path, folder: Path) -> Callable[[random.Random], Path]:
    """Mutates a file anywhere."""
    content, target = path.read_bytes(), folder / f"a{path.suffix}"

    def write(draw: random.Random) -> Path:
        target.write_bytes(mutate(content, draw))
        return target

    return write


def with_sound_checksums(path: Path, folder: Path) -> Callable[[random.Random], Path]:
    """Mutates the pickle inside an archive, which is sound around it."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    target = folder / f"a{path.suffix}"

    def write(draw: random.Random) -> Path:
        program = mutate(members["data.pkl"], draw)
        torch_writer.save_members(target, members | {"data.pkl": program})
        return target

    return write


def header(path: Path, folder: Path) -> Callable[[random.Random], Path]:
    """Mutates the header of a safetensors file."""
    content, target = path.read_bytes(), folder / "a.safetensors"
    length = 8 + int.from_bytes(content[:8], "little")

    def write(draw: random.Random) -> Path:
        target.write_bytes(mutate(content[:length], draw) + content[length:])
        return target

    return write


def beside(name: str, folder: Path) -> Callable[[random.Random], Path]:
    """Mutates the index or the config of a model in shards."""
    folder = folder / name
    shutil.copytree(PORT, folder)
    shutil.move(folder / "model.safetensors", folder / "one.safetensors")
    length = int.from_bytes((folder / "one.safetensors").read_bytes()[:8], "little")
    tensors = json.loads((folder / "one.safetensors").read_bytes()[8 : 8 + length])
    weight_map = {key: "one.safetensors" for key in tensors if key != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    content = (folder / name).read_bytes()

    def write(draw: random.Random) -> Path:
        (folder / name).write_bytes(mutate(content, draw))
        return folder

    return write


def writers(container: str, folder: Path) -> list[Callable[[random.Random], Path]]:
    match container:
        case "zip":
            files = (
                *(FIXTURES / "tensor_views_of_one_storage.pth", MORE / "lightning.ckpt"),
                FIXTURES / "mmseg_raw_with_message_hub.pth",
            )
            return [damaged(path, folder) for path in files]
        case "pickle":
            files = (
                *FIXTURES.glob("hostile_eval_inside_model.pth"),
                *FIXTURES.glob("cls_training_with_ema_and_yacs_config.pth"),
                *(MORE / "protocol5_plain_objects.pth", MORE / "float8_tensor.pth"),
            )
            return [with_sound_checksums(path, folder) for path in files]
        case "tar":
            return [damaged(FIXTURES / "legacy_tar_format.pth", folder)]
        case "safetensors":
            path = PORT / "model.safetensors"
            return [header(path, folder), damaged(path, folder)]
        case "index":
            return [
                beside(name, folder) for name in ("model.safetensors.index.json", "config.json")
            ]
        case "distcp":
            parts = MORE / "distributed_checkpoint"
            renamed = folder / "part.pth"
            shutil.copy(parts / "__0_0.distcp", renamed)
            return [damaged(renamed, folder), damaged(parts / ".metadata", folder)]
    raise ValueError(container)


def main(container: str, cases: int, folder: Path) -> None:
    read_weights(PORT)  # the first read imports and compiles what all need
    draw, write = random.Random(container), writers(container, folder)
    before, modules = peak_memory(), set(sys.modules)
    outcomes, slowest, messages = {True: 0, False: 0}, 0.0, set()
    for case in range(cases):
        path = write[case % len(write)](draw)
        start = time.process_time()
        try:
            read_weights(path)
            outcomes[True] += 1
        except CheckpointError as error:
            outcomes[False] += 1
            messages.add(str(error))
        slowest = max(slowest, time.process_time() - start)
    assert not {"torch", "yacs", "mmengine"} & (set(sys.modules) - modules)
    assert all(len(message) < 1200 and "\n" not in message for message in messages)
    report = {"read": outcomes[True], "refused": outcomes[False], "slowest": slowest}
    print(json.dumps(report | {"memory": peak_memory() - before}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
