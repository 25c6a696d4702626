"""The three ways to get the package, each in its own interpreter, beside a PyPI package named ``kernels``.

The sources are copied first, so that nothing is built in the checkout. A development install of this package
is out of reach of the subprocesses: they see the site-packages of pytest's interpreter, not its .pth files.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tide_compile": "tide_compile", "passes": "tide_compile/passes", "kernels": "tide_compile/kernels"}

# Stands for PyPI's `kernels`: has every name and a version that transformers accepts, so that it gets used.
STUB = """
import sys
from unittest.mock import MagicMock
MARK = "stub"
def __getattr__(name):
    if name == "__version__":
        return sys.modules["transformers.utils.import_utils"].KERNELS_MIN_VERSION
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""

CHECK = """
import importlib.metadata, importlib.util, sys
from pathlib import Path
kind, stub, env, *homes = sys.argv[1:]  # homes: where tide_compile, its passes and its kernels must come from

for place in (0, 1 + sys.path.index(env)):  # before, then after our install or checkout; there it stays
    sys.path[:] = [p for p in sys.path if p != stub]
    sys.path.insert(place, stub)
    import kernels
    assert getattr(kernels, "MARK", None) == "stub", f"the stub at sys.path[{place}] is shadowed by {kernels}"
    del sys.modules["kernels"]

import torch
if kind != "bare":  # the entry point, before anything of ours is imported
    found = Path(importlib.metadata.distribution("tide-compile").locate_file("")).resolve()
    assert found.is_relative_to(env), f"metadata of another install: {found}"
    assert importlib.util.find_spec("passes") is None, "passes is importable as a top-level package"
    assert "tide" in torch._dynamo.list_backends(), "no entry point"
    assert "tide_compile" not in sys.modules
    torch.compile(torch.nn.Linear(2, 2), backend="tide")
    assert "tide_compile.backend" in sys.modules

import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
assert transformers.utils.is_kernels_available() and sys.modules["kernels"].MARK == "stub"
assert isinstance(hub_kernels.LayerRepository, kernels.MagicMock)

import tide_compile, tide_compile.passes.run, tide_compile.kernels.route
loaded = tide_compile, tide_compile.passes.run, tide_compile.kernels.route
assert [str(Path(m.__file__).resolve().parent) for m in loaded] == homes, loaded
"""


def checkout(folder: Path) -> Path:
    """A copy of the sources, with the folders beside them that must not be packaged."""
    folder = folder.resolve() / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("README.md", "tests/__init__.py", "bench/__init__.py", "examples/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def call(*args: str | Path, cwd: Path, path: Path | str = "") -> None:
    env = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def pip(python: Path | str, command: str, *args: str | Path, cwd: Path) -> None:
    """pip of this interpreter, working on ``python``; builds with the setuptools here if it is new enough."""
    pytest.importorskip("pip")
    here = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
    flags = ["-q", "--no-deps", *["--no-build-isolation"] * bool(here)]
    flags += ["--ignore-installed"] * (command == "install")  # never uninstall the developer's own
    call(sys.executable, "-m", "pip", "--python", python, command, *flags, *args, cwd=cwd)


@pytest.fixture
def env(tmp_path):
    """(python, site-packages) of an empty environment that falls back on this interpreter's site-packages."""
    where = dict.fromkeys(("base", "platbase"), str(tmp_path.resolve() / "env"))
    venv.create(where["base"], symlinks=os.name != "nt")
    scripts, site = (Path(sysconfig.get_path(key, "venv", where)) for key in ("scripts", "purelib"))
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return scripts / "python", site


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "-w", folder, checkout(folder), cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_has_every_module_and_the_licence_and_nothing_else(wheel):
    """Catches: a subpackage or the templates missing; tests/, bench/ or a top-level `kernels` packaged."""
    copy, packed = wheel.parent / "checkout", zipfile.ZipFile(wheel).namelist()
    kinds = ("*.py", "*.html")
    sources = {p.relative_to(copy).as_posix() for name in FOLDERS for k in kinds for p in (copy / name).rglob(k)}
    expected = {n if n.startswith("tide_compile/") else f"tide_compile/{n}" for n in sources}
    assert {n for n in packed if ".dist-info/" not in n} == expected
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in packed)


def test_entry_point_without_import():
    """Catches an entry point that is missing, or registered twice (duplicate name)."""
    code = "import torch; torch.compile(torch.nn.Linear(2, 2), backend='tide'); import tide_compile"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["wheel", "bare", pytest.param("editable", marks=pytest.mark.slow)])
def test_imports_without_shadowing_kernels(kind, env, tmp_path, request):
    """Catches: a wrong package-dir or `__path__`, a lost entry point, an `__init__.py` in kernels/."""
    python, site = env
    copy, stub, away = checkout(tmp_path), tmp_path / "stub", tmp_path / "away"
    if kind != "bare":
        what = [request.getfixturevalue("wheel")] if kind == "wheel" else ["-e", copy]
        pip(python, "install", *what, cwd=tmp_path)
    homes = [site / to for to in FOLDERS.values()] if kind == "wheel" else [copy / name for name in FOLDERS]
    away.mkdir()
    (stub / "kernels").mkdir(parents=True)
    (stub / "kernels" / "__init__.py").write_text(STUB)
    call(python, "-c", CHECK, kind, stub, site, *homes, cwd=away, path=copy if kind == "bare" else "")
