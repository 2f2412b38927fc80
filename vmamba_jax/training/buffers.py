"""What lies in a device's memory where a compiled program needs most of it.

Read from the text of the program, whose instructions XLA has put in order: an array is there from
the instruction that makes it to the last one that reads it, in the layout that is written beside
it, padding included. JAX names the layer and the operation that each instruction comes from.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_MOVES = {"bitcast", "reshape", "copy", "transpose", "convert", "slice", "get-tuple-element"}
"""Instructions whose result is an operand in other words."""

_NAMES = {"tuple", "get-tuple-element", "bitcast"}
"""Instructions that read nothing."""

_NO_LAYER = re.compile(
    r"\w*\(.*\)|while|body|cond|branch_\d+_fun|closed_call|checkpoint|shard_map|.*<locals>.*|.*\._.*"
)
"""Of a path such as ``jit(step)/jvp(VSSM)/while/body/checkpoint/mlp/fc1/mul``, what is no layer."""

_MOVED = re.compile(r".*(dynamic_update_slice|dynamic_slice|broadcast_in_dim|while|squeeze)|")
"""Paths that don't tell what the array holds."""


class Held(NamedTuple):
    """Arrays of one layer and kind that are held at the peak.

    Attributes:
        layer: path of the module that made them, as far as the program knows it.
        kind: ``argument``, or the phase (``forward``, ``recomputed``, ``backward``) and operation.
        array: dtype and shape, such as ``bf16[64,56,56,96]``.
        number: how many there are.
        size: bytes of all of them, as they are laid out.
    """

    layer: str
    kind: str
    array: str
    number: int
    size: int


def held_at_peak(program: str) -> list[Held]:
    """What a device holds at the peak of its memory, the largest first.

    Args:
        program: ``compiled.as_text()``, of a program compiled for a TPU. What lies in the vector
            memory does not count.

    Returns:
        Arrays by layer, kind, dtype and shape. Their sum is near what the compiler says, not equal:
        it may share memory in ways that the text does not tell, and can't pack without gaps.

    Raises:
        ValueError: if the text can't be read, as another compiler may write it.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    try:
        walk = _Walk(program)
        for buffer in walk.peak_of_entry():
            groups.setdefault((*walk.origin(buffer), buffer.array), []).append(buffer.size)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"this compiler writes programs in a way that is not known here ({error!r})"
        ) from error
    held = [Held(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
    return sorted(held, key=lambda held: -held.size)


class _Instruction(NamedTuple):
    name: str
    type: Any
    """(text, bytes in the device's memory) of an array, a list of a tuple."""
    operation: str
    operands: list[str]
    attributes: str

    def called(self, attribute: str) -> list[str]:
        found = re.search(rf" {attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []

    @property
    def path(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(eq=False)
class _Buffer:
    array: str
    size: int
    computation: str
    """Where it was made, or of what a loop fills in, where that is."""
    instruction: _Instruction
    start: int
    reads: list["_Buffer"] = field(default_factory=list)


@dataclass
class _Scope:
    """A computation's own buffers, from where to where they live, and those of what it calls."""

    result: Any
    own: list[_Buffer]
    last: dict[_Buffer, int]
    inside: dict[int, list[_Buffer]]

    def peak(self) -> list[_Buffer]:
        def end(buffer: _Buffer) -> int:
            return self.last.get(buffer, buffer.start)

        change: dict[int, int] = {}
        for buffer in self.own:
            # A fusion writes over what it is the last to read.
            over = any(b.size == buffer.size and end(b) == buffer.start for b in buffer.reads)
            buffer.start += over and end(buffer) > buffer.start
            change[buffer.start] = change.get(buffer.start, 0) + buffer.size
            change[end(buffer) + 1] = change.get(end(buffer) + 1, 0) - buffer.size
        best, at, alive = -1, 0, 0
        for now in sorted({*change, *self.inside}):
            alive += change.get(now, 0)
            needed = alive + sum(buffer.size for buffer in self.inside.get(now, []))
            if needed > best:
                best, at = needed, now
        own = [b for b in self.own if b.size and b.start <= at <= end(b)]
        return own + self.inside.get(at, [])


class _Walk:
    """Follows a program's instructions, and in which buffers their results are."""

    def __init__(self, program: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        for name, is_entry, instructions in _computations(program):
            self.computations[name] = instructions
            self.entry = name if is_entry else self.entry
        # Results that are written over an argument which is donated.
        aliases = re.findall(r"\{(\d+)\}: \(\d+, \{\}", program.partition("\n")[0])
        self.over_arguments = [int(result) for result in aliases]

    def peak_of_entry(self) -> list[_Buffer]:
        scope = self.scope(self.entry, None)
        arguments = [b for b in scope.own if b.instruction.operation == "parameter"]
        results = list(_leaves(scope.result))
        for argument in arguments:
            scope.last[argument] = 2**62
        for result in self.over_arguments:
            if results[result] not in arguments:
                results[result].size = 0
        return scope.peak()

    def scope(self, name: str, arguments: Sequence[Any] | None) -> _Scope:
        instructions = self.computations[name].values()
        values: dict[str, Any] = {}
        scope = _Scope([], [], {}, {})
        for at, instruction in enumerate(instructions):
            operands = [values[o] for o in instruction.operands if o in values]
            reads = [] if instruction.operation in _NAMES else list(_leaves(operands))
            scope.last.update(dict.fromkeys(reads, at))

            def make(kind: Any, *, reads: Any = reads, at: int = at, by: Any = instruction) -> Any:
                if isinstance(kind, list):
                    return [make(part) for part in kind]
                over = reads if by.operation == "fusion" else []
                array, size = kind
                scope.own.append(_Buffer(array, size, name, by, at, over))
                return scope.own[-1]

            match instruction.operation:
                case "parameter" if arguments is not None:
                    value = arguments[int(instruction.operands[0])]
                case "tuple":
                    value = operands
                case "get-tuple-element":
                    index = re.search(r"index=(\d+)", instruction.attributes)
                    value = operands[0][int(index[1])] if index else operands[0]
                case "bitcast" | "optimization-barrier" | "all-reduce-done" | "custom-call-done":
                    value = operands[0]
                case "copy-start":
                    value = [make(instruction.type[0]), operands[0]]
                case "copy-done":
                    value = operands[0][0]
                case start if start.endswith("-start") and start != "all-reduce-start":
                    value = [operands, *(make(part) for part in instruction.type[1:])]
                case done if done.endswith("-done"):
                    value = operands[0][1]
                case "while":
                    value = operands[0]
                    scope.inside[at] = self.loop(instruction.called("body")[0], value)
                case "call" | "conditional":
                    value = make(instruction.type)
                    scope.inside[at] = self.branches(instruction, operands)
                case _:
                    value = make(instruction.type)
            values[instruction.name] = value
            scope.result = value  # the root comes last
        scope.last.update(dict.fromkeys(_leaves(scope.result), len(instructions)))
        return scope

    def loop(self, body: str, carried: Any) -> list[_Buffer]:
        """What a loop needs beside what it carries; that it writes in place, where it can."""
        scope = self.scope(body, [carried])
        for old, new in zip(_leaves(carried), _leaves(scope.result), strict=True):
            if new in scope.own and scope.last.get(old, -1) <= new.start:
                if new.size:
                    old.computation, old.instruction = body, new.instruction
                new.size = 0
        return scope.peak()

    def branches(self, instruction: _Instruction, operands: list[Any]) -> list[_Buffer]:
        names = instruction.called("to_apply") + instruction.called("branch_computations")
        names += instruction.called("true_computation") + instruction.called("false_computation")
        if instruction.operation == "conditional":
            given = [[operand] for operand in operands[1:]]
        else:
            given = [operands]
        alive = [self.scope(n, g).peak() for n, g in zip(names, given, strict=True)]
        return max(alive, key=lambda buffers: sum(b.size for b in buffers), default=[])

    def origin(self, buffer: _Buffer) -> tuple[str, str]:
        """Layer and kind of what a buffer holds."""
        if buffer.instruction.operation == "parameter":
            return "", "argument"
        return _place(self.path(buffer.computation, buffer.instruction))

    def path(self, computation: str, instruction: _Instruction) -> str:
        """Where an instruction comes from; of one that moves an array, where the array does."""
        callers: list[tuple[str, _Instruction]] = []
        path = instruction.path
        for _ in range(32):
            if not _MOVED.fullmatch(instruction.path):
                return instruction.path
            path = instruction.path or path
            operand = 0
            match instruction.operation:
                case "fusion":
                    callers.append((computation, instruction))
                    (computation,) = instruction.called("calls")
                    instruction = list(self.computations[computation].values())[-1]
                    continue
                case "parameter" if callers:
                    operand = int(instruction.operands[0])
                    computation, instruction = callers.pop()
                case "dynamic-update-slice":
                    operand = 1
                case move if move not in _MOVES:
                    break
            instruction = self.computations[computation][instruction.operands[operand]]
        return path


def _computations(program: str) -> Iterator[tuple[str, bool, dict[str, _Instruction]]]:
    head = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
    line = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
    instructions: dict[str, _Instruction] = {}
    for text in program.splitlines():
        if found := head.match(text):
            instructions = {}
            yield found[2], bool(found[1]), instructions
        elif found := line.match(text):
            kind, rest = _type(re.sub(r"/\*.*?\*/", "", found[2]))
            operation, _, rest = rest.strip().partition("(")
            inside, _, attributes = rest.partition(")")
            operands = re.findall(r"%([\w.\-]+)", inside) or [inside]
            instructions[found[1]] = _Instruction(found[1], kind, operation, operands, attributes)


def _type(text: str) -> tuple[Any, str]:
    """The type that a text starts with, and the rest of the text."""
    if text.startswith("("):
        parts, text = [], text[1:]
        while not text.startswith(")"):
            part, text = _type(text.lstrip(", "))
            parts.append(part)
        return parts, text[1:]
    found = re.match(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text)
    if not found:
        raise ValueError(f"not the text of a program: {text[:80]!r} is no type")
    return (f"{found[1]}[{found[2]}]", _bytes(*found.groups())), text[found.end() :]


def _bytes(dtype: str, shape: str, layout: str | None) -> int:
    """Bytes of an array in the device's memory; 0 if its layout puts it elsewhere."""
    order, _, tiles = (layout or "").partition(":")
    if re.search(r"S\([1-9]", tiles):
        return 0
    sides = [int(side) for side in shape.split(",") if side]
    if order:
        sides = [sides[int(axis)] for axis in reversed(order.split(","))]
    if tile := re.search(r"T\(([\d,]+)\)", tiles):
        least = [int(side) for side in tile[1].split(",")][-len(sides) :] if sides else []
        for axis, side in zip(range(-len(least), 0), least, strict=True):
            sides[axis] = -(-sides[axis] // side) * side
    bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])
    return math.prod(sides) * bits // 8


def _leaves(value: Any) -> Iterator[_Buffer]:
    if isinstance(value, _Buffer):
        yield value
    elif isinstance(value, Iterable):
        for part in value:
            yield from _leaves(part)


def _place(path: str) -> tuple[str, str]:
    """Layer and kind of what a path of JAX's names says."""
    *modules, operation = path.split("/")
    phase = "backward" if "transpose(" in path else "forward"
    if "rematted_computation" in modules:
        phase = "recomputed"
        modules.remove("rematted_computation")
    layer = "/".join(m for m in modules if not _NO_LAYER.fullmatch(m))
    return layer, f"{phase} {operation}"
