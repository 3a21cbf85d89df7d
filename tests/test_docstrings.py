"""The API's pages: every public name has a docstring, and `make docs` shows it."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[ModuleType]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "spidr_hf").rglob("*.py"))
    names = (".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__")
    return [importlib.import_module(name) for name in sorted(names)]


def public(module: ModuleType) -> list[str]:
    """Functions and classes of `__all__` that are defined in the module."""
    values = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return [
        name
        for name, value in values.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
    ]


def test_every_module_and_every_public_name_has_a_docstring():
    without = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name in public(module)
        if not getattr(module, name).__doc__
    ]
    assert not without + [module.__name__ for module in modules() if not module.__doc__]


@pytest.mark.slow
def test_make_docs_shows_them_all(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    lines = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line for line in lines.splitlines() if "pdoc" in line)
    command = command.replace(".venv/bin/python", sys.executable).replace("directory docs", f"directory {tmp_path}")
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for module in modules():
        page = (tmp_path / (module.__name__.replace(".", "/") + ".html")).read_text(encoding="utf-8")
        assert not [name for name in public(module) if f'id="{name}"' not in page]
