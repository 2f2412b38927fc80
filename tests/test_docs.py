"""What README and guides show: their examples run, their commands parse, their names exist.

A Python block that needs something that is not here says so in its first line, ``# needs: ...``,
and is left out by that alone.
"""

import dataclasses
import functools
import importlib
import re
import runpy
import shlex
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vmamba_jax import cli as package_cli
from vmamba_jax import model_config, registry
from vmamba_jax.convert import save_model
from vmamba_jax.data import sources
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.training import cli as training_cli
from vmamba_jax.training.config import RunConfig
from vmamba_jax.training.segmentation_config import SegmentationConfig

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "index.md", *GUIDES]
PLAIN = re.compile(r"```.*?```", re.S)

SMALLER = {
    "224, 224": "16, 16",
    "512, 512": "16, 16",
    "300, 400": "15, 16",
    "(1024, 512)": "(16, 16)",
    "(8, 16, 16, 3)": "(1, 16, 16, 3)",
    "(0, 1, 2, 3)": "(0, 1)",
    "num_classes=150": "num_classes=5, channels=8",
    "variables, photograph)": "variables, photograph, Inference(scale=(16, 16)))",
    "(8, 32, 32, 3)": "(8, 8, 8, 3)",
}
"""Smaller sizes in place of a page's; the calls are the same. Models are small under every name."""
SLOW = ("segmentation", "transformations")  # gradients compile for long


def blocks(page: Path, *languages: str) -> list[str]:
    fence = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return re.findall(fence, page.read_text(), re.S | re.M)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runnable(page: Path) -> list[str]:
    return [code for code in blocks(page, "python") if not code.startswith("# needs: ")]


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture in half as many stages, each a narrow block without MLP."""
    for name, config in list(registry._registry.items()):
        stages = max(1, len(config.depths) // 2)
        small = config.replace(depths=(1,) * stages, dims=8, mlp_ratio=0.0, patchembed_version="v1")
        monkeypatch.setitem(registry._registry, name, small)


@pytest.fixture
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_models: None) -> None:
    """What pages name and a test can make: a photograph, and a model where a run would be."""
    monkeypatch.setattr(sources, "_own", {})
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "photo.jpg")
    _, variables = registry.create_model("vmamba_digits")
    names = [str(digit) for digit in range(10)]
    save_model(
        tmp_path / "runs" / "digits", variables, model_config("vmamba_digits"),
        class_names=names, preprocessing=Preprocessing(32, crop=1.0),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.exhaustive if p.stem in SLOW else ())
        for p in PAGES
        if runnable(p)
    ],
)
@pytest.mark.usefixtures("_files")
def test_the_python_examples_run(page):
    code = "\n".join(runnable(page))
    for size, smaller in SMALLER.items():
        code = code.replace(size, smaller)
    names: dict = {}
    exec(compile(code, name_of(page), "exec"), names)
    names.pop("__builtins__")
    trees = [value for value in names.values() if isinstance(value, (jax.Array, dict, list))]
    arrays = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
    assert all(np.isfinite(x).all() for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))


def test_no_smaller_size_is_left_over():
    text = "\n".join(code for page in PAGES for code in runnable(page))
    for size, smaller in SMALLER.items():
        assert size in text, size
        text = text.replace(size, smaller)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a shell script; variables are numbers."""
    for line in re.sub(r"\$\{?\w+\}?", "1", text.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&;|>"):
                yield words
                words = []
            elif " " in word:
                yield from commands(word)
            else:
                words.append(word)


def named(words: list[str]) -> str:
    return shlex.join(words)


PROGRAMS = {"vmamba-jax", "train.py"}
OURS = {
    named(words): words
    for block in [package_cli.EXAMPLES, *(code for page in PAGES for code in blocks(page, "bash"))]
    for words in commands(block)
    if not PROGRAMS.isdisjoint(words)
}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands' functions are replaced: what would have run is noted here."""
    ran: list[str] = []

    def replace(module: ModuleType, name: str) -> None:
        @functools.wraps(getattr(module, name))
        def instead(*_args: object, **_options: object) -> int | None:
            ran.append(name)
            return 0 if module is package_cli else None

        monkeypatch.setattr(module, name, instead)

    for name in re.findall(
        r'^ {16}"[\w-]+": (\w+),$', Path(package_cli.__file__).read_text(), re.M
    ):
        replace(package_cli, name)
    for name in ("train", "evaluate_classifier", "evaluate_segmenter", "measure_throughput",
                 "compile_for_topology", "join_processes"):  # fmt: skip
        replace(training_cli, name)
    return ran


@pytest.mark.parametrize("words", OURS.values(), ids=OURS)
def test_a_command_parses(words, parsed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    program = next(word for word in words if word in PROGRAMS)
    monkeypatch.setattr("sys.argv", words[words.index(program) :])
    with pytest.raises(SystemExit) as ended:
        sys.exit(package_cli.main() if program == "vmamba-jax" else training_cli.main())
    assert ended.value.code == 0
    assert "--help" in words or set(parsed) - {"join_processes"}


def test_the_extras_that_are_installed_exist_and_are_explained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    explained = (ROOT / "docs" / "guides" / "install.md").read_text()
    assert [name for name in extras if f"`{name}`" not in explained] == []
    for page in PAGES:
        for group in re.findall(r'pip install -e "\.\[(.*?)\]"', page.read_text()):
            assert set(group.split(",")) <= extras.keys(), page


def options_of(config: type, prefix: str = "--") -> Iterator[str]:
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            yield from options_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}".replace("_", "-")
            yield f"{prefix}no_{name}".replace("_", "-")


def test_the_options_of_a_run_that_are_named_exist():
    known = {*options_of(RunConfig), *options_of(SegmentationConfig)}
    for page in PAGES:
        text = PLAIN.sub("", page.read_text())
        named = set(re.findall(r"`(--(?:model|data|optimizer|mesh)\.[a-z-]+)", text))
        assert named - known == set(), page


def test_the_parts_of_the_package_that_are_named_exist():
    for page in PAGES:
        text = PLAIN.sub("", page.read_text())
        for file in re.findall(r"`((?:vmamba_jax|benchmarks|tests|docs|examples)/[\w/.]*)`", text):
            assert (ROOT / file).exists(), (page, file)
        for name in re.findall(r"`(vmamba_jax(?:\.\w+)+)", text):
            parent, _, last = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(parent), last), (page, name)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./-]+)\)", PLAIN.sub("", page.read_text())):
            assert (page.parent / target).exists(), (page, target)


def test_the_routes_are_drawn_as_they_are_scanned():
    drawing = runpy.run_path(str(ROOT / "docs" / "routes.py"))
    assert (ROOT / "docs" / "routes.svg").read_text() == drawing["svg"]()
    down_the_columns = [[r, c] for c in range(4) for r in range(3)]
    assert drawing["routes"]("cross2d")[1].tolist() == down_the_columns
