"""Names of modules of before."""

import importlib
import importlib.util
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_import(monkeypatch):
    """Catches names that only ``import`` of the whole module finds."""
    monkeypatch.delitem(sys.modules, "tide_compile.networks", raising=False)
    from tide_compile.networks import Projection

    assert Projection is tide_compile.routers.networks.Projection
