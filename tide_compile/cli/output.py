"""output: what every command prints with. Results go to stdout, what happens meanwhile to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from tide_compile.runtime.exit_stats import ExitStats


def console() -> Console:
    """For results."""
    return Console(highlight=False)


def notes() -> Console:
    """For everything else."""
    return Console(stderr=True, highlight=False)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes long, with a spinner where there is a terminal."""
    screen = notes()
    if not screen.is_terminal:
        screen.print(f"{what} ...", style="dim", markup=False)
        yield
        return
    with screen.status(what):
        yield


def print_json(record: object) -> None:
    """A record as JSON on stdout, whatever the terminal."""
    sys.stdout.write(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")


def record_of(stats: ExitStats) -> dict[str, object]:
    """Statistics as plain values."""
    return {
        "tokens": stats.total_tokens,
        "exit_rate": stats.exit_rate,
        "mean_depth": stats.mean_depth,
        "num_layers": stats.num_layers,
        "layers_saved": stats.layers_saved,
        "exits_per_layer": {str(layer): n for layer, n in sorted(stats.exits_per_layer.items())},
    }


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
