"""Names of modules of before."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import tide_compile
from tide_compile.compat import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_modules_of_before(name, monkeypatch):
    """Each is the module of today and stays it. Catches a second copy, whose classes would be others."""
    today = importlib.import_module(f"tide_compile.{MOVED[name]}")
    spec = today.__spec__
    monkeypatch.delitem(sys.modules, f"tide_compile.{name}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"tide_compile.{name} is tide_compile.{MOVED[name]} now"):
        found = importlib.import_module(f"tide_compile.{name}")
    assert found is today and today.__spec__ is spec and today.__name__ == f"tide_compile.{MOVED[name]}"


def test_nothing_is_hidden():
    """No name of today is one of these, and what never was is not found."""
    folder = Path(tide_compile.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & MOVED.keys()
    assert not set(tide_compile.__all__) & MOVED.keys()
    assert importlib.util.find_spec("tide_compile.nothing") is None


def test_from_import():
    program = (
        "from tide_compile.networks import Projection; from tide_compile.serving_worker import ReplyText; print(1)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=Path(__file__).parents[2]) == "1\n"
