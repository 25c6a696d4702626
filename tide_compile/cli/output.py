"""output: what every command prints with. Results go to stdout, what happens meanwhile to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


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


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
