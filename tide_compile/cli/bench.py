"""``tide bench``: run one of the benchmarks of a checkout."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tide_compile.cli.output import console, print_json
from tide_compile.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # of a checkout


def benchmarks() -> dict[str, Path]:
    """The modules below ``bench/`` that can be run, by name.

    Raises:
        ConfigError: this is not a checkout.
    """
    if not (ROOT / "pyproject.toml").is_file() or not (ROOT / "bench").is_dir():
        raise ConfigError(
            "the benchmarks are not part of the installed package: clone the repository and run `tide bench` after "
            "`pip install -e .` there."
        )
    files = sorted((ROOT / "bench").glob("*.py"))
    return {path.stem: path for path in files if '__name__ == "__main__"' in path.read_text()}


def list_benchmarks(as_json: bool) -> None:
    """Names and what they measure."""
    about = {n: (ast.get_docstring(ast.parse(p.read_text())) or "").split("\n")[0] for n, p in benchmarks().items()}
    if as_json:
        print_json(about)
        return
    for name, line in about.items():
        console().print(f"{name:12} {line.split(': ', 1)[-1]}", markup=False, soft_wrap=True)


def run_benchmark(name: str, arguments: Sequence[str], as_json: bool) -> int:
    """Run it in a process of its own, from the checkout; with ``as_json`` its tables go to stderr and its results to
    stdout. Returns its exit code.

    Raises:
        ConfigError: there is no such benchmark, or it writes no JSON.
    """
    known = benchmarks()
    if name not in known:
        raise ConfigError(f"no benchmark is called {name!r}: give one of {', '.join(known)}.")
    command, root = [sys.executable, "-m", f"bench.{name}", *arguments], known[name].parent.parent
    if not as_json:
        return subprocess.run(command, cwd=root).returncode
    if '"--json"' not in known[name].read_text():
        raise ConfigError(f"bench.{name} writes no JSON: leave --json out.")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result"
        done = subprocess.run([*command, "--json", str(target)], cwd=root, stdout=2)
        results = {p.name.removeprefix("result").lstrip(".") or name: json.loads(p.read_text())
                   for p in sorted(Path(folder).iterdir())}  # fmt: skip
    print_json(results)
    return done.returncode
