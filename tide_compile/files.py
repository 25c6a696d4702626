"""Files: where they lie, whether they can be written, and that they are written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tide_compile.errors import OutputFileError

_NAME = 40  # characters of a file's name in the name of its temporary file, which may not be too long either


def user_path(path: str | Path) -> Path:
    """A path as users write them: ``~`` is a home folder, and stays as it is where there is none."""
    return Path(os.path.expanduser(path))


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file atomically: into a temporary file in the same folder, then renamed over ``path``.

    Raises:
        OutputFileError: it cannot be written.
    """
    path = user_path(path)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 whatever the locale. Raises OutputFileError."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", errors="backslashreplace")  # halves of a surrogate pair


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """The name of a temporary file in the same folder, which is renamed over ``path`` when the block is done. Where
    ``path`` is a link, what it leads to is replaced.

    Raises:
        OutputFileError: ``path`` cannot be written, or is something other than a file.
    """
    temporary = None
    try:
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:_NAME]}.{secrets.token_hex(4)}")
        temporary.open("xb").close()
        mode = (target if target.exists() else temporary).stat().st_mode  # for a new file, what the user's umask gives
        yield str(temporary)
        temporary.chmod(stat.S_IMODE(mode))  # safetensors writes files that nobody else may read
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, getattr(error, "strerror", None) or str(error)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, size: int = 1) -> None:
    """Find out whether a file of ``size`` bytes could be written, as far as that can be known before it is there.

    Raises:
        OutputFileError: it could not; says why.
    """
    try:
        target = _target(path)
        if os.fspath(path).endswith(os.sep):
            raise _unwritable(path, "it is the name of a folder; name a file in it")
        if target.exists() and not os.access(target, os.W_OK):
            raise _unwritable(path, "it is write-protected")
        folder = next(parent for parent in target.parents if parent.exists())
        if not folder.is_dir():
            raise _unwritable(path, f"{str(folder)!r} is not a folder")
        for part in target.parts[len(folder.parts) :]:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(folder / part)  # fails for a name that is too long
        with tempfile.TemporaryFile(dir=folder):
            pass
        disk = shutil.disk_usage(folder)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    if disk.total and disk.free < size:
        raise _unwritable(path, f"it takes up to {size:,} bytes, and {disk.free:,} are free in {str(folder)!r}")


def _target(path: str | Path) -> Path:
    """What is to be replaced by a file, at the end of all links. Raises OutputFileError if that is no file."""
    if "\0" in os.fspath(path):
        raise _unwritable(path, "there is a null character in its name")
    target = Path(os.path.realpath(user_path(path)))
    if target.is_dir():
        raise _unwritable(path, "it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise _unwritable(path, "it is a device, a pipe or a socket; name a file")
    return target


def _unwritable(path: str | Path, reason: str) -> OutputFileError:
    return OutputFileError(f"{str(path)!r} cannot be written: {reason}.")


def cache_folder() -> Path:
    """``$TIDE_CACHE``, else ``tide_compile`` in the user's cache folder; for a user without a home, in the folder of
    temporary files. It need not be there, and it need not be writable."""
    if base := os.environ.get("TIDE_CACHE"):
        return user_path(base)
    folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return folder / "tide_compile" if folder.is_absolute() else _homeless_cache(os.getuid())


@functools.cache
def _homeless_cache(user: int) -> Path:
    """A folder that is this user's own: another one's files are not trusted."""
    folder = Path(tempfile.gettempdir()) / f"tide_compile_{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_dir() and folder.lstat().st_uid == user:
            return folder
    return Path(tempfile.mkdtemp(prefix="tide_compile_"))


def router_cache() -> Path:
    """The folder of routers by model fingerprint."""
    return cache_folder() / "routers"


def calibration_cache() -> Path:
    """The folder of what interrupted calibrations have done."""
    return cache_folder() / "calibrations"
