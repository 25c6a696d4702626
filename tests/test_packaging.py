"""The three ways to get the package, each in its own interpreter, beside a PyPI package named ``kernels``.

The sources are copied first, so that nothing is built in the checkout; a development install of this package in the
interpreter that runs pytest is out of reach of the subprocesses (they see its site-packages, not its .pth files).
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

# Stands for PyPI's `kernels`: has every name, and a version that transformers accepts, so that transformers uses it.
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
import importlib.metadata, sys
from pathlib import Path
kind, stub, env, *homes = sys.argv[1:]  # homes: where tide_compile, its passes and its kernels must come from

for place in (0, len(sys.path)):  # before everything, then after everything; there it stays
    sys.path.insert(place, stub)
    import kernels
    assert getattr(kernels, "MARK", None) == "stub", f"`kernels` at sys.path[{place}] is shadowed by {kernels}"
    del sys.modules["kernels"]
    if place == 0:
        sys.path.remove(stub)

import torch
if kind != "bare":  # the entry point, before anything of ours is imported
    found = Path(importlib.metadata.distribution("tide-compile").locate_file("")).resolve()
    assert found.is_relative_to(env), f"metadata of another install: {found}"
    assert "tide" in torch._dynamo.list_backends()
    assert "tide_compile" not in sys.modules
    torch.compile(torch.nn.Linear(2, 2), backend="tide")
    assert "tide_compile.backend" in sys.modules

import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
assert is_kernels_available() and sys.modules["kernels"].MARK == "stub"
assert hub_kernels.LayerRepository._extract_mock_name() == "LayerRepository"

import tide_compile, tide_compile.passes.run, tide_compile.kernels.route
loaded = tide_compile, tide_compile.passes.run, tide_compile.kernels.route
assert [str(Path(m.__file__).resolve().parent) for m in loaded] == homes, loaded
assert "passes" not in sys.modules and sys.modules["kernels"].MARK == "stub"
"""

ABSENT = """
import importlib.util
from transformers.utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
assert spec.origin or not is_kernels_available(), "transformers takes our folder for the PyPI package"
import transformers.integrations.hub_kernels
from transformers import AutoModelForCausalLM
import tide_compile.kernels.route
"""


def checkout(folder: Path) -> Path:
    """A copy of the sources, with the folders beside them that must not be packaged."""
    folder = folder.resolve() / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("# tide-compile\n")
    for name in ("tests", "bench", "examples"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def call(*args: str | Path, cwd: Path, pythonpath: Path | str = "") -> None:
    env = {**os.environ, "PYTHONPATH": str(pythonpath), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def pip(python: Path | str, command: str, *args: str | Path, cwd: Path) -> None:
    """pip of this interpreter, working on ``python``; builds with the setuptools here if it is new enough."""
    pytest.importorskip("pip")
    here = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
    flags = ["--no-deps", *(["--no-build-isolation"] if here else [])]
    flags += ["--ignore-installed"] if command == "install" else []  # never uninstall the developer's own
    call(sys.executable, "-m", "pip", "--python", python, command, "-q", *flags, *args, cwd=cwd)


@pytest.fixture
def env(tmp_path):
    """(python, site-packages) of an empty environment that falls back on the site-packages of this interpreter."""
    where = {"base": str(tmp_path.resolve() / "env"), "platbase": str(tmp_path.resolve() / "env")}
    venv.create(where["base"], symlinks=os.name != "nt")
    scripts, site = (Path(sysconfig.get_path(key, "venv", where)) for key in ("scripts", "purelib"))
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return scripts / "python", site


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "-w", folder, checkout(folder), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_every_module_and_the_licence_and_nothing_else(wheel):
    """Catches: a subpackage missing from `packages`, tests/ or bench/ packaged, a top-level `kernels` or `passes`."""
    copy, packed = wheel.parent / "checkout", zipfile.ZipFile(wheel).namelist()
    expected = {
        f"{to}/{p.relative_to(copy / name).as_posix()}"
        for name, to in FOLDERS.items()
        for p in (copy / name).rglob("*.py")
    }
    assert {n for n in packed if ".dist-info/" not in n} == expected
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in packed)


@pytest.mark.parametrize("kind", ["wheel", "editable", "bare"])
def test_imports_without_shadowing_kernels(kind, env, tmp_path, request):
    """Catches: a wrong package-dir or `__path__`, a lost entry point, an `__init__.py` in kernels/."""
    python, site = env
    copy = checkout(tmp_path)
    if kind == "wheel":
        pip(python, "install", request.getfixturevalue("wheel"), cwd=tmp_path)
    elif kind == "editable":
        pip(python, "install", "-e", copy, cwd=tmp_path)
    homes = [site / to for to in FOLDERS.values()] if kind == "wheel" else [copy / name for name in FOLDERS]
    stub, elsewhere = tmp_path / "stub", tmp_path / "elsewhere"
    (stub / "kernels").mkdir(parents=True)
    (stub / "kernels" / "__init__.py").write_text(STUB)
    elsewhere.mkdir()
    pythonpath = copy if kind == "bare" else ""
    call(python, "-c", CHECK, kind, stub, site.resolve(), *homes, cwd=elsewhere, pythonpath=pythonpath)


def test_bare_checkout_is_not_taken_for_kernels(env, tmp_path):
    """Catches: transformers, with no `kernels` installed, believing that our folder of that name is it."""
    call(env[0], "-c", ABSENT, cwd=tmp_path, pythonpath=checkout(tmp_path))
