"""Imports point one way: folders look down only, nothing goes round in circles, nothing imports a command."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from spidr_hf.hub_spidr import HUB_FILES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spidr_hf"
FILES_IN_A_FOLDER = 15
# What each folder may import of the package, besides itself.
BELOW = {"flat": set(), "system": set()}
BELOW["data"] = {"flat", "system"}
BELOW["hub"] = {"flat", "system"}
BELOW["units"] = BELOW["evaluation"] = BELOW["data"] | {"data", "hub"}
BELOW["plots"] = BELOW["units"] | {"units", "evaluation"}
BELOW["conversion"] = {"flat", "system", "hub"}
BELOW["training"] = BELOW["plots"] | {"plots"}
BELOW["pretraining"] = BELOW["finetuning"] = BELOW["training"] | {"training"}
BELOW["examples"] = BELOW["pretraining"] | {"pretraining", "finetuning", "conversion"}
# The first registers the pipeline, the second loads a command by its name.
EXEMPT = {"spidr_hf", "spidr_hf.__main__"}
# Names that transformers calls by, which models of any kind have.
TRANSFORMERS_OWN = {"_get_feat_extract_output_lengths", "_get_feature_vector_attention_mask", "_no_split_modules"}
# Who may import the converter: where a run begins, and where a model's name is looked up.
OF_CONVERSION = {"spidr_hf.pretraining.start", "spidr_hf.hub.published"}


@cache
def modules() -> dict[str, Path]:
    """Every module by the name it is imported by."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), (ROOT / "conversion", "conversion"), (ROOT / "examples", "examples")):
        for path in folder.rglob("*.py"):
            parts = ("spidr_hf", *filter(None, [prefix]), *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, wherever in the file: in functions and under TYPE_CHECKING, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                if f"{base}.{alias.name}" in modules():
                    yield f"{base}.{alias.name}"
                elif base in modules():
                    yield base


@cache
def arrows() -> dict[str, set[str]]:
    return {name: set(imported(name, path)) - {name} for name, path in modules().items()}


def room(name: str) -> str:
    inside = name.split(".")[1:]
    return inside[0] if inside and (f"spidr_hf.{inside[0]}" in rooms()) else "flat"


@cache
def rooms() -> set[str]:
    return {name for name, path in modules().items() if path.name == "__init__.py"}


def test_every_folder_is_known_and_small():
    folders = {path for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert {folder.name for folder in folders} == set(BELOW) - {"flat", "conversion", "examples"}
    for folder in folders:
        assert len(list(folder.glob("*.py"))) - 1 <= FILES_IN_A_FOLDER, folder
        assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "") > 20, folder
    assert {path.name for path in PACKAGE.glob("*.py")} == {*HUB_FILES, "__init__.py", "__main__.py"}


@pytest.mark.parametrize("name", sorted(set(modules()) - EXEMPT))
def test_looks_down_only(name):
    here = room(name)
    up = {other for other in arrows()[name] if room(other) not in {here, *BELOW[here]} and other != "spidr_hf"}
    if name in OF_CONVERSION:
        up = {other for other in up if room(other) != "conversion"}
    assert not up
    if here in ("flat", "system"):
        assert "spidr_hf" not in arrows()[name]


def test_no_circles():
    TopologicalSorter({name: others - {"spidr_hf"} for name, others in arrows().items()}).prepare()


def test_commands_are_imported_by_nobody():
    commands = {
        name
        for name, path in modules().items()
        if name.startswith("spidr_hf.examples.") and "def main(" in path.read_text()
    }
    assert len(commands) > 15
    assert not {(name, other) for name, others in arrows().items() for other in others if other in commands}


def test_the_walk_sees_hidden_imports():
    """Of functions, and of other packages' names."""
    assert "spidr_hf.triton_spidr" in arrows()["spidr_hf.kernels_spidr"]
    assert "spidr_hf.pretraining.hf_trainer" in arrows()["spidr_hf"]


def defined(path: Path) -> Iterator[str]:
    """Names that a file gives to functions, classes, variables and attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def touched(path: Path) -> Iterator[tuple[int, str]]:
    """Names that a test takes from something else, by attribute, by import, or in a string that it patches."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr", "patch")):
            strings = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, text.rpartition(".")[2]) for text in strings if isinstance(text, str))


def test_tests_touch_nothing_private():
    """They hold what is promised; what a test must reach has a public name."""
    private = {
        name for path in modules().values() for name in defined(path) if re.match("_[^_]", name)
    } - TRANSFORMERS_OWN
    paths = [path for path in (ROOT / "tests").rglob("*.py") if "fixtures" not in path.parts]
    found = [f"{path.name}:{line}: {name}" for path in paths for line, name in touched(path) if name in private]
    assert len(paths) > 50 and len(private) > 100 and not found
