"""Imports run one way, down the floors of the house, and never round in a circle."""

import ast
from pathlib import Path, PurePosixPath

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("tide_compile", "passes", "kernels")
FOLDERS = (*PRODUCT, "bench", "examples", "tests")
HALL = {"__init__.py", "backend.py", "config.py", "errors.py", "files.py", "lm_eval_model.py", "reference.py"}

# From the ground up. A file may import from its own room and from those before it; of places that hold each other the
# inner one counts. Imports inside functions and for types count as all others do.
ROOMS = (
    ("tide_compile/torch_internals",),
    ("kernels/cpu", "kernels/gpu"),
    ("kernels",),
    ("passes/graph",),
    ("passes/aten",),
    ("passes",),
    ("tide_compile/errors.py", "tide_compile/config.py", "tide_compile/files.py"),
    ("tide_compile/model",),
    ("tide_compile/routers",),
    ("tide_compile/reference.py",),
    ("tide_compile/lowering",),
    ("tide_compile/runtime",),
    ("tide_compile/inspection",),
    ("tide_compile/backend.py",),
    ("tide_compile/text",),
    ("tide_compile/thresholds",),
    ("tide_compile/calibration",),
    ("tide_compile/generation",),
    ("tide_compile/planning",),
    ("tide_compile/metrics",),
    ("tide_compile/serving",),
    ("tide_compile/lm_eval_model.py",),
    ("tide_compile/cli",),
    ("tide_compile/compat",),
    ("tide_compile/__init__.py",),
    ("bench",),
    ("examples",),
    ("tests",),
)


def module_name(path):
    """``passes`` and ``kernels`` lie beside ``tide_compile`` and are imported as parts of it."""
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("tide_compile", *parts) if parts[0] in PRODUCT[1:] else parts)


def names_imported(path, source):
    """``from a import b`` asks for ``a.b``, whether that is a module or something in one."""
    package = module_name(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join(filter(None, (*above, node.module, alias.name))) for alias in node.names)


def graph_of(sources):
    """Which file imports which, from sources by path. What is no module of ours is a name in the one that holds it:
    ``tide_compile.TIDE`` is ``tide_compile/__init__.py``. A folder without such a file stands for itself."""
    files = {module_name(path): path for path in sources}
    for folder in {str(folder) for path in sources for folder in PurePosixPath(path).parents} - {"."}:
        files.setdefault(module_name(folder), folder)
    graph = nx.DiGraph()
    graph.add_nodes_from(sources)
    for path, source in sources.items():
        for name in names_imported(path, source):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and files[name] != path:
                graph.add_edge(path, files[name])
    return graph


def height(path):
    """The number of its room. ValueError: no room is named for it."""
    places = {place: number for number, room in enumerate(ROOMS) for place in room}
    inside = [place for place in places if f"{path}/".startswith(f"{place}/")]
    if not inside:
        raise ValueError(f"{path} is in no room")
    return places[max(inside, key=len)]


def upward(graph):
    heights = {path: height(path) for path in graph}
    return sorted(f"{one} imports {other}" for one, other in graph.edges if heights[one] < heights[other])


def circles(graph):
    return sorted(sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1)


@pytest.fixture(scope="module")
def sources():
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


@pytest.fixture(scope="module")
def graph(sources):
    return graph_of(sources)


def test_imports_go_down(graph):
    assert upward(graph) == []


def test_no_circles(graph):
    assert circles(graph) == []


def test_nobody_needs_a_test(graph):
    """What tests share lies in tests.support, in tests.families and in fixtures."""
    assert [pair for pair in graph.edges if PurePosixPath(pair[1]).name.startswith("test_")] == []


def test_files_are_short(sources):
    product = {path: text for path, text in sources.items() if path.split("/")[0] in PRODUCT}
    assert {path: lines for path, text in product.items() if (lines := len(text.splitlines())) > 300} == {}


def test_only_what_has_no_room_lies_in_the_hall():
    assert {path.name for path in (ROOT / "tide_compile").glob("*.py")} == HALL


def test_kernels_are_no_package():
    """One of that name is on PyPI, and whoever has both would get ours."""
    assert [*(ROOT / "kernels").rglob("__init__.py")] == []


@pytest.mark.parametrize(
    ("path", "source", "other"),
    [
        ("passes/run.py", "from tide_compile.runtime.executor import Executor", "tide_compile/runtime/executor.py"),
        ("passes/run.py", "import tide_compile.runtime.executor as e", "tide_compile/runtime/executor.py"),
        ("passes/graph/cost.py", "from .. import run", "passes/run.py"),
        ("kernels/route.py", "def f():\n    from tide_compile import passes", "passes/__init__.py"),
        ("passes/run.py", "if TYPE_CHECKING:\n    import tide_compile.backend", "tide_compile/backend.py"),
        ("tide_compile/cli/main.py", "import tide_compile", "tide_compile/__init__.py"),
        ("tide_compile/cli/main.py", "from tide_compile import TIDE", "tide_compile/__init__.py"),
        ("bench/families.py", "from tests.families import matrix", "tests/families/matrix.py"),
        ("kernels/gpu/rows.py", "import tide_compile.kernels.few_rows", "kernels/few_rows.py"),
        ("tide_compile/backend.py", "from tide_compile import *", "tide_compile/__init__.py"),
    ],
)
def test_what_goes_up_is_seen(path, source, other):
    """Every way of writing it. The other way round it is none."""
    house = {path: source, other: f"import {module_name(path)}"}
    assert upward(graph_of(house)) == [f"{path} imports {other}"]
    assert upward(graph_of({**house, path: "import torch.passes, kernels"})) == []


def test_circles_are_seen():
    """Of files of one room, through a third one. Catches one that only goes round on the way up."""
    house = {
        "passes/run.py": "from tide_compile.passes.plan import Plan",
        "passes/plan.py": "def f():\n    from tide_compile.passes import verify",
        "passes/verify.py": "from .run import run",
        "passes/mask_rows.py": "from tide_compile.passes import run",
    }
    assert circles(graph_of(house)) == [["passes/plan.py", "passes/run.py", "passes/verify.py"]]
    assert upward(graph_of(house)) == []
    assert circles(graph_of({**house, "passes/plan.py": ""})) == []


def test_a_folder_stands_for_itself():
    """Catches an import of ``kernels``, which has no file of its own, that is taken for one of ``tide_compile``."""
    house = {"kernels/route.py": "", "tide_compile/__init__.py": "", "passes/run.py": "import tide_compile.kernels"}
    assert [*graph_of(house).edges] == [("passes/run.py", "kernels")] and upward(graph_of(house)) == []
    house["tide_compile/torch_internals/fx.py"] = house["passes/run.py"]
    assert upward(graph_of(house)) == ["tide_compile/torch_internals/fx.py imports kernels"]


@pytest.mark.parametrize("path", ["tide_compile/helpers.py", "tide_compile/attic/old.py", "scripts/one.py"])
def test_files_without_a_room_are_seen(path):
    with pytest.raises(ValueError, match="in no room"):
        upward(graph_of({path: ""}))
