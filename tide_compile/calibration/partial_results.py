"""partial_results: what a calibration has done so far, in the cache folder, so that an interrupted one can go on."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tide_compile.calibration.statistics import Collected
from tide_compile.errors import OutputFileError
from tide_compile.files import write_tensors

log = logging.getLogger("tide_compile")

_DAYS = 30  # after which nobody is going to go on


@dataclass(slots=True)
class PartialResults:
    """The file of one process.

    Attributes:
        path: of the file; None: nothing is kept.
        signature: what has to be the same for a calibration to go on.
    """

    path: Path | None
    signature: dict[str, object]

    @classmethod
    def of(cls, name: Path | None, signature: dict[str, object], rank: int, world: int) -> PartialResults:
        """Of process ``rank`` among ``world``; old ones of all calibrations are deleted. ``name``: the beginning of
        the path, or None."""
        if name is None:
            return cls(None, signature)
        for path in name.parent.glob("*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _DAYS * 86_400:
                    path.unlink()
        path = name.with_name(f"{name.name}.{rank}-of-{world}")
        log.info("partial results are kept in %s until the routers are saved", path)
        return cls(path, signature)

    def resume(self, collected: Collected) -> None:
        """Take over what an interrupted calibration with the same signature has left; anything else is deleted."""
        if self.path is None or not self.path.is_file():
            return
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads(file.metadata()["tide"])
                if state["signature"] != json.loads(json.dumps(self.signature)):
                    log.warning("%s is of a calibration with other data or settings, and is started anew", self.path)
                    self._delete()
                    return
                collected.load({n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as error:
            log.warning("%s cannot be read (%s), so the calibration starts anew", self.path, error)
            self._delete()
            return
        collected.shards, collected.rows = state["shards"], state["rows"]
        log.info("going on after %d rows of an interrupted calibration", collected.rows)

    def write(self, collected: Collected) -> None:
        """Keep what there is so far; where that cannot be written it is logged once, and nothing is kept."""
        if self.path is None:
            return
        state = {"signature": self.signature, "shards": collected.shards, "rows": collected.rows}
        try:
            write_tensors(self.path, collected.tensors(), {"tide": json.dumps(state)})
        except OutputFileError as error:
            log.warning("an interrupted calibration will not go on where it was: %s", error)
            self._delete()
            self.path = None

    def _delete(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def tell_kept(name: Path | None) -> None:
    """Log what an interrupted calibration leaves, and where."""
    for path in _files(name):
        log.warning(
            "interrupted: the same calibration goes on from %s (%.1f MB), which is deleted when it is done, or after "
            "%d days", path, path.stat().st_size / 1e6, _DAYS,
        )  # fmt: skip


def forget(name: Path | None) -> None:
    """Delete what a calibration has kept, when its result is in safety."""
    for path in _files(name):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _files(name: Path | None) -> list[Path]:
    """Of all processes."""
    return [] if name is None else sorted(name.parent.glob(f"{name.name}.*-of-*"))
