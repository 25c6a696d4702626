"""``tide doctor``: what is installed, what is there to run on, what is cached, and what would happen to a model."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from tide_compile.cli.check_inputs import check_dtype
from tide_compile.cli.model_inputs import encode, find_bank_maybe
from tide_compile.cli.output import console, print_json, size_of, working
from tide_compile.errors import TideError
from tide_compile.files import cache_folder, router_cache
from tide_compile.inspection.explain import explain
from tide_compile.lowering.machine_name import cpu_name
from tide_compile.model.loading import find_dtype, load_model, load_tokenizer
from tide_compile.routers.bank import RouterBank
from tide_compile.torch_internals.inductor import code_cache

_NEEDED = ("tide-compile", "torch", "transformers", "triton", "safetensors", "datasets")
_EXTRAS = ("gguf", "accelerate", "peft", "torchao", "matplotlib")


def examine(name: str | None, dtype: str, as_json: bool) -> bool:
    """Print the findings; False if something keeps models from being compiled here, and that is said first."""
    if name is not None:
        check_dtype(dtype)
    problems = list(_problems())
    found = {
        "problems": problems,
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in (*_NEEDED, *_EXTRAS)}},
        "devices": list(_devices()),
        "caches": [_cache("tide_compile", cache_folder()), _cache("Inductor", code_cache())],
        "routers": list(_routers()),
    }
    if name is not None:
        found["model"] = _verdict(name, dtype)
    if as_json:
        print_json(found)
    else:
        _show(found)
    return not problems


def _problems() -> Iterator[str]:
    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and not any(map(shutil.which, (compiler, "clang++"))):
        yield "no C++ compiler: Inductor needs one on a CPU. Install g++, or set CXX to yours."
    if "tide" not in torch.compiler.list_backends(exclude_tags=()):
        yield "torch does not know the backend 'tide' in a new process: install the package (pip install -e .)."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[dict[str, object]]:
    yield {"device": "cpu", "name": cpu_name(), "threads": torch.get_num_threads(),
           "vectors": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield {"device": f"cuda:{index}", "name": card.name, "memory": size_of(card.total_memory),
               "compute capability": f"{card.major}.{card.minor}"}  # fmt: skip


def _cache(name: str, folder: Path) -> dict[str, object]:
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    return {"cache": name, "folder": str(folder), "files": len(files), "bytes": sum(p.stat().st_size for p in files)}


def _routers() -> Iterator[dict[str, object]]:
    for path in sorted(router_cache().glob("*.safetensors")):
        try:
            bank = RouterBank.load(path)
        except TideError as error:
            yield {"file": str(path), "error": str(error)}
            continue
        yield {"file": str(path), "fingerprint": bank.fingerprint, "num_layers": bank.num_layers,
               "checkpoints": bank.layers, "made": bank.metadata.get("date")}  # fmt: skip


def _verdict(name: str, dtype: str) -> dict[str, object]:
    with working(f"loading {name}"):
        model, tokenizer = load_model(name, find_dtype(dtype)), load_tokenizer(name)
    bank = find_bank_maybe(None, model)
    inputs = encode(tokenizer, ["What happens to this model?"], chat=False)
    graph = explain(model, **inputs, options={"router": bank}).main
    lines = [
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} million parameters, {dtype} on {model.device}"
    ]
    if graph.error is not None:
        lines.append(f"it is refused: {graph.error}")
        lines.append("options={'fallback': 'inductor'} compiles it without exits")
    else:
        lines.append(f"it is cut into {len(graph.pieces)} pieces at {graph.num_layers} layers")
        masked = [s.masked for s in graph.segments if s.masked is not None]
        compact = [s.compact for s in graph.segments if s.compact is not None]
        if masked:
            lines.append(
                "in prompts and batches, rows that have left are left out of later layers where that pays"
                if compact
                else "in prompts and batches, rows that have left are masked: a layer has an operator that mixes rows"
            )
        static = getattr(model, "_can_compile_fullgraph", False)
        lines.append(f"generate uses a {'static' if static else 'dynamic'} cache")
        lines.append(
            f"its routers are in the cache: exits after layers {', '.join(map(str, graph.checkpoints))}"
            if bank is not None
            else f"it has no routers yet, so no token leaves early: run `tide calibrate {name}`"
        )
    return {"name": name, "verdict": lines, "checkpoints": graph.checkpoints, "routers": bank is not None,
            "error": graph.error}  # fmt: skip


def _show(found: dict[str, object]) -> None:
    screen = console()
    for problem in found["problems"]:
        screen.print(f"problem: {problem}", style="bold red", markup=False, soft_wrap=True)
    versions = Table("package", "version", title="versions")
    for name, value in found["versions"].items():
        versions.add_row(name, value or "not installed (optional)")
    screen.print(versions)
    for device in found["devices"]:
        screen.print(", ".join(f"{n} {v}" if n not in ("device", "name") else str(v) for n, v in device.items()))
    for cache in found["caches"]:
        line = f"{cache['cache']} cache: {cache['folder']}, {cache['files']} files, {size_of(cache['bytes'])}"
        screen.print(line, markup=False, soft_wrap=True)
    if not found["routers"]:
        screen.print("no routers in the cache yet: `tide calibrate MODEL` makes some", markup=False)
    for router in found["routers"]:
        about = router.get("error") or f"{router['num_layers']} layers, checkpoints {router['checkpoints']}"
        screen.print(f"routers: {router['file']}: {about}", markup=False, soft_wrap=True)
    for line in found.get("model", {}).get("verdict", ()):
        screen.print(line, markup=False, soft_wrap=True)
