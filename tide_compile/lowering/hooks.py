"""inductor_code: which files hold the code that Inductor runs for a piece, what is done when it is loaded, and when
Inductor waits for its compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.cache_dir_utils import cache_dir

from tide_compile.lowering.buffer_reuse import reuse_buffers

_files: ContextVar[list[str] | None] = ContextVar("tide_inductor_files", default=None)
_keeping: ContextVar[bool] = ContextVar("tide_keeping", default=False)
_started: ContextVar[list[tuple[AsyncCompile, dict[str, object]]] | None] = ContextVar("tide_started", default=None)


@contextmanager
def note_code_files() -> Iterator[list[str]]:
    """Collect the paths of the modules that Inductor loads inside the block, newly written or from its cache."""
    _wrap(PyCodeCache, "load_by_key_path", _loading)
    files: list[str] = []
    token = _files.set(files)
    try:
        yield files
    finally:
        _files.reset(token)


@contextmanager
def reusing_buffers() -> Iterator[None]:
    """What Inductor compiles, or takes from its cache, inside the block allocates its small temporaries once."""
    _wrap(PyCodeCache, "load_by_key_path", _loading)
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)


@contextmanager
def compiling_together() -> Iterator[None]:
    """Inside the block, C++ compilers are started and not waited for, so that the code of the next piece is generated
    meanwhile; none of the pieces can run before the end of the block. Other threads wait as ever.
    """
    _wrap(AsyncCompile, "wait", _deferring)
    started: list[tuple[AsyncCompile, dict[str, object]]] = []
    token = _started.set(started)
    try:
        yield
    finally:
        _started.reset(token)
    for compiler, scope in started:
        compiler.wait(scope)


def _loading(load: Callable[..., ModuleType]) -> Callable[..., ModuleType]:
    def loading(key: str, path: str, *args: object, **kwargs: object) -> ModuleType:
        files = _files.get()
        if files is not None and path not in files:
            files.append(path)
        module = load(key, path, *args, **kwargs)
        return reuse_buffers(module) if _keeping.get() else module

    return loading


def _deferring(wait: Callable[[AsyncCompile, dict[str, object]], None]) -> Callable[..., None]:
    def deferring(compiler: AsyncCompile, scope: dict[str, object]) -> None:
        started = _started.get()
        if started is None:
            wait(compiler, scope)
        else:
            started.append((compiler, scope))

    return deferring


def _wrap(owner: type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Once for all."""
    original = getattr(owner, name)
    if not getattr(original, "_tide", False):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped._tide = True
        setattr(owner, name, wrapped)


def code_cache() -> Path:
    """The folder in which Inductor keeps its code."""
    return Path(cache_dir())
