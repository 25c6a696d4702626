"""What is public is described, and descriptions lead somewhere."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import tide_compile
from tide_compile import passes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PASSES = [m.name for m in pkgutil.walk_packages(passes.__path__, f"{passes.__name__}.")]


def undocumented(name, thing):
    """Names without a docstring of their own: the thing, and a class's methods and properties."""
    found = [] if (thing.__doc__ or "").strip() else [name]
    for attribute, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not attribute.startswith("_") and inspect.isfunction(function) and not function.__doc__:
            found.append(f"{name}.{attribute}")
    return found


def test_public_names():
    """Catches a name without a docstring, and a dataclass whose docstring is its generated signature."""
    for name in tide_compile.__all__:
        thing = getattr(tide_compile, name)
        assert undocumented(name, thing) == []
        assert not thing.__doc__.startswith(f"{name}("), name


@pytest.mark.parametrize("module", PASSES)
def test_passes(module):
    """Modules, functions, classes and their methods."""
    imported = importlib.import_module(module)
    own = {
        name: thing for name, thing in vars(imported).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module
        and (inspect.isfunction(thing) or inspect.isclass(thing))
    }  # fmt: skip
    assert imported.__doc__ and [n for name, thing in own.items() for n in undocumented(name, thing)] == []


def test_order_of_passes():
    """The pages of a pass say what it does before and after, or raises."""
    for function in (*passes.ANALYSES, *passes.PLACEMENT, *passes.REWRITES):
        assert function.__doc__.strip(), function.__name__
    for function in passes.REWRITES:
        assert "Before:" in function.__doc__ or "Add " in function.__doc__, function.__name__
        assert "Safe because" in function.__doc__, function.__name__


def anchors(page):
    """As GitHub makes them: lower case, words joined by hyphens, other signs left out."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Catches a page, a file or a section that has moved away from under a link."""
    for target in re.findall(r"\]\((?!https?:|#?\))([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
