"""hooks: what is done around Inductor for the length of a block: files are noted, modules changed, compilers waited for
together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from tide_compile.torch_internals.inductor import AsyncCompile, PyCodeCache
from tide_compile.torch_internals.patching import patched

_files: ContextVar[list[str] | None] = ContextVar("tide_inductor_files", default=None)
_change: ContextVar[Callable[[ModuleType], ModuleType] | None] = ContextVar("tide_change_modules", default=None)
_started: ContextVar[list[tuple[AsyncCompile, dict[str, object]]] | None] = ContextVar("tide_started", default=None)


@contextmanager
def note_code_files() -> Iterator[list[str]]:
    """Collect the paths of the modules that Inductor loads inside the block, newly written or from its cache."""
    files: list[str] = []
    with patched(PyCodeCache, "load_by_key_path", _loading), _set(_files, files):
        yield files


@contextmanager
def changing_modules(change: Callable[[ModuleType], ModuleType]) -> Iterator[None]:
    """What Inductor compiles, or takes from its cache, inside the block runs as ``change`` of its module. The module
    itself, which belongs to Inductor's cache, has to stay as it is."""
    with patched(PyCodeCache, "load_by_key_path", _loading), _set(_change, change):
        yield


@contextmanager
def compiling_together() -> Iterator[None]:
    """Inside the block, C++ compilers are started and not waited for, so that the code of the next piece is generated
    meanwhile; none of the pieces can run before the end of the block. Other threads wait as ever.
    """
    started: list[tuple[AsyncCompile, dict[str, object]]] = []
    with patched(AsyncCompile, "wait", _deferring), _set(_started, started):
        yield
    for compiler, scope in started:
        compiler.wait(scope)


def _loading(load: Callable[..., ModuleType]) -> Callable[..., ModuleType]:
    def loading(cls: type, key: str, path: str, *args: object, **kwargs: object) -> ModuleType:
        files, change = _files.get(), _change.get()
        if files is not None and path not in files:
            files.append(path)
        module = load(cls, key, path, *args, **kwargs)
        return module if change is None else change(module)

    return loading


def _deferring(wait: Callable[[AsyncCompile, dict[str, object]], None]) -> Callable[..., None]:
    def deferring(compiler: AsyncCompile, scope: dict[str, object]) -> None:
        started = _started.get()
        if started is None:
            wait(compiler, scope)
        else:
            started.append((compiler, scope))

    return deferring


@contextmanager
def _set(variable: ContextVar, value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
