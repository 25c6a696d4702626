"""sources: texts to calibrate on: a data set by name, a local file, a list of strings, or what every Python carries."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tide_compile.errors import CalibrationDataError
from tide_compile.files import user_path
from tide_compile.text.local_file import texts_of_file

_SHORTEST = 100  # characters; the reference's limit below which a sample is a headline or empty
_PYDOC = "pydoc"
_NAMED = {"wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1")}
_ALTERNATIVES = (
    "Give a data set that is reachable, the path of a .txt or .jsonl file, a list of strings, or 'pydoc' (texts that "
    "come with Python)."
)


def sources_of(source: object) -> list[object]:
    """What a source is put together from: ``"a+b"`` are two, but a file or folder with + in its path is one."""
    if not isinstance(source, str):
        return [source]
    parts, found = source.split("+"), []
    while parts:
        joined = ("+".join(parts[:n]) for n in range(len(parts), 1, -1))
        found.append(next((path for path in joined if os.path.exists(user_path(path))), parts[0]))
        parts = parts[found[-1].count("+") + 1 :]
    return found


def calibration_texts(source: str | Path | Iterable[str], limit: int) -> Iterator[str]:
    """Yield up to ``limit`` texts, one at a time.

    Args:
        source: ``"pydoc"``, the path of a local ``.jsonl`` or ``.json`` file (column ``text``) or of any other text
            (paragraphs), the name or folder of a Hugging Face data set (streamed; ``"wikitext"`` is WikiText-103), or
            the texts themselves.
        limit: number of texts.

    Raises:
        CalibrationDataError: the source cannot be had or holds no text; says what else can be given.
    """
    try:
        kept = itertools.islice((t for t in _open(source) if t.strip()), limit)
        first = next(kept, None)
    except CalibrationDataError as error:
        raise CalibrationDataError(f"{error} {_ALTERNATIVES}") from error
    except Exception as error:  # data sets raise many kinds when offline, renamed or gated
        raise CalibrationDataError(f"calibration data {source!r} cannot be read: {error}. {_ALTERNATIVES}") from error
    if first is None:
        raise CalibrationDataError(f"calibration data {source!r} holds no text. {_ALTERNATIVES}")
    yield first
    yield from kept


def count_texts(source: str | Path | Iterable[str], limit: int) -> int | None:
    """How many texts there are, up to ``limit``; reads them all, if they lie here. None: of a data set that is
    elsewhere."""
    if isinstance(source, str | Path) and source != _PYDOC and _file_maybe(source) is None:
        return None
    return sum(1 for _ in calibration_texts(source, limit))


def _open(source: str | Path | Iterable[str]) -> Iterable[str]:
    if not isinstance(source, str | Path):
        return _strings(source)
    if source == _PYDOC:
        return _pydoc()
    path = _file_maybe(source)
    return _long_enough(_hub(str(source)) if path is None else texts_of_file(path))


def _file_maybe(source: str | Path) -> Path | None:
    """The file that a source is the path of; None: it is the name of a data set, or a folder."""
    path = user_path(source)
    if os.path.isfile(path):
        return path
    if os.path.exists(path) and not os.path.isdir(path):
        raise CalibrationDataError(f"{str(path)!r} is a device, a pipe or a socket, and texts are read more than once.")
    is_path = path.suffix.lower() in (".txt", ".jsonl", ".json") or isinstance(source, Path) or path.is_absolute()
    if is_path and not os.path.isdir(path):
        raise CalibrationDataError(f"no calibration file at {str(path)!r}.")
    return None


def _strings(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationDataError(f"text {number} is of type {type(text).__name__}.")
        yield text


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    return _long_enough(text for _, text in sorted(topics.items()))


def _hub(name: str) -> Iterator[str]:
    from datasets import load_dataset

    given = _NAMED.get(name) or (str(user_path(name)),)
    for row in load_dataset(*given, split="train", streaming=True):
        if "text" not in row:
            raise CalibrationDataError(f"the data set {name!r} has columns {sorted(row)}, and none is called 'text'.")
        yield (row["text"] or "").strip()


def _long_enough(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if len(text.strip()) > _SHORTEST)
