"""Private names of torch: all there, and used in no other place than where they are kept."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tide_compile.torch_internals import versions
from tide_compile.torch_internals.versions import missing

ROOT = Path(__file__).resolve().parents[2]
KEPT = {
    "tide_compile.torch_internals.dynamo": "tide_compile/torch_internals/dynamo.py",
    "tide_compile.torch_internals.fx": "tide_compile/torch_internals/fx.py",
    "tide_compile.torch_internals.inductor": "tide_compile/torch_internals/inductor.py",
    "tide_compile.kernels.cpu.onednn": "kernels/cpu/onednn.py",
    "tide_compile.kernels.cpu.gemm_template": "kernels/cpu/gemm_template.py",
}
SOURCES = [
    path for folder in ("tide_compile", "passes", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))
    if path.relative_to(ROOT).as_posix() not in KEPT.values()
]  # fmt: skip
PRIVATE = re.compile(r"^torch(\.[\w?]+)*\._(?!_)\w+")
PUBLIC = re.compile(r"^torch\._(dynamo|inductor)(\.reset)?$")  # documented, in messages to users as well
OF_OTHERS = {"_orig_mod", "_torchdynamo_orig_backend", "_isolate_recompiles_id", "_param_name_to_source"}


@pytest.mark.parametrize("module", KEPT)
def test_names_are_there(module):
    """On a torch that has moved one, this says which, and the file is the one to change."""
    gone = missing(importlib.import_module(module).NAMES)
    assert not gone, f"this torch has no {', '.join(gone)}: mend {KEPT[module]}"


def test_a_name_that_is_gone_is_seen():
    assert missing(
        ["torch._inductor.compile_fx.compile_fx", "torch._inductor.compile_fx.nothing", "torch.nowhere.x"]
    ) == [
        "torch._inductor.compile_fx.nothing",
        "torch.nowhere.x",
    ]


def private_names(source):
    """Dotted private names of torch that code imports or reads, and attributes that are private to its objects."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
            found |= {f"torch.?.{node.attr}"} if node.attr in OF_OTHERS else set()
    return {name for name in found if PRIVATE.match(name) and not PUBLIC.match(name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_are_used_nowhere_else(path):
    assert private_names(path.read_text()) == set()


def test_private_names_are_seen():
    """The test above would be worth nothing if it could not fail."""
    code = (
        "import torch\nfrom torch._inductor import ir\nfrom torch.fx.graph import _x\ntorch._C._nn.linear(m._orig_mod)"
    )
    assert {"torch._inductor.ir", "torch.fx.graph._x", "torch._C._nn.linear", "torch.?._orig_mod"} <= private_names(
        code
    )


def test_a_torch_that_was_not_checked(monkeypatch, caplog):
    """Is said once for each trick, and names what to do."""
    versions.warn_if_unchecked.cache_clear()
    monkeypatch.setattr(versions.torch, "__version__", "9.9.0")
    try:
        assert not versions.warn_if_unchecked("a trick") and not versions.warn_if_unchecked("a trick")
    finally:
        versions.warn_if_unchecked.cache_clear()
    (message,) = caplog.messages
    assert "a trick was checked with torch 2.13, and this is 9.9.0" in message and "TIDE_DISABLE" in message
