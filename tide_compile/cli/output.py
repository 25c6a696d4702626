"""output: what every command prints with. Results go to stdout, what happens meanwhile to stderr."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

_WIDE = 1000  # columns where there is no terminal: lines of tables are not broken, and tables are as wide as they need
_OTHERS = ("transformers", "datasets", "huggingface_hub", "torchao", "torch._dynamo", "torch._inductor")


def console() -> Console:
    """For results."""
    return _fitting(Console(highlight=False))


@functools.cache
def notes() -> Console:
    """For everything else: one console, so that lines go past a spinner."""
    return _fitting(Console(stderr=True, highlight=False))


def _fitting(screen: Console) -> Console:
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = _WIDE
    return screen


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes long, with a spinner where there is a terminal."""
    screen = notes()
    if not screen.is_terminal:
        screen.print(f"{what} ...", style="dim", markup=False, soft_wrap=True)
        yield
        return
    with screen.status(what):
        yield


def begin_log(debug: bool) -> None:
    """Show what this package logs; and, but to whoever looks for a fault, no warnings of other packages."""
    log = logging.getLogger("tide_compile")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(logging.INFO))
        log.setLevel(logging.INFO)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights
    if not debug:
        for name in _OTHERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


class _Notes(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "dim" if record.levelno < logging.WARNING else "yellow"
        notes().print(record.getMessage(), style=style, markup=False, soft_wrap=True)


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
