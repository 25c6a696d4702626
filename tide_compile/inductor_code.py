"""inductor_code: which files hold the code that Inductor runs for a piece."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.cache_dir_utils import cache_dir

_files: ContextVar[list[str] | None] = ContextVar("tide_inductor_files", default=None)


@contextmanager
def note_code_files() -> Iterator[list[str]]:
    """Collect the paths of the modules that Inductor loads inside the block, newly written or from its cache."""
    _install()
    files: list[str] = []
    token = _files.set(files)
    try:
        yield files
    finally:
        _files.reset(token)


def _install() -> None:
    load = PyCodeCache.load_by_key_path
    if getattr(load, "_tide", False):
        return

    @functools.wraps(load)
    def noting(key: str, path: str, *args: object, **kwargs: object) -> object:
        files = _files.get()
        if files is not None and path not in files:
            files.append(path)
        return load(key, path, *args, **kwargs)

    noting._tide = True
    PyCodeCache.load_by_key_path = noting


def code_cache() -> Path:
    """The folder in which Inductor keeps its code."""
    return Path(cache_dir())
