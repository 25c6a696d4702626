"""sources: texts to calibrate on: a data set by name, a local file, a list of strings, or what every Python carries."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tide_compile.errors import CalibrationDataError

_SHORTEST = 100  # characters; the reference's limit below which a sample is a headline or empty
_LONGEST_LINE = 200  # characters of a line of wrapped text
_NAMED = {"wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1")}
_ALTERNATIVES = (
    "Give a data set that is reachable, the path of a .txt or .jsonl file, a list of strings, or 'pydoc' (texts that "
    "come with Python)."
)


def sources_of(source: object) -> list[object]:
    """What a source is put together from: ``"a+b"`` are two, but a file with + in its path is one."""
    if not isinstance(source, str):
        return [source]
    parts, found = source.split("+"), []
    while parts:
        joined = ("+".join(parts[:n]) for n in range(len(parts), 1, -1))
        found.append(next((path for path in joined if Path(path).is_file()), parts[0]))
        parts = parts[found[-1].count("+") + 1 :]
    return found


def calibration_texts(source: str | Path | Iterable[str], limit: int) -> Iterator[str]:
    """Yield up to ``limit`` texts, one at a time.

    Args:
        source: ``"pydoc"``, the path of a local ``.txt`` (paragraphs) or ``.jsonl`` file (column ``text``), the name of
            a Hugging Face data set (streamed; ``"wikitext"`` is WikiText-103), or the texts themselves.
        limit: number of texts.

    Raises:
        CalibrationDataError: the source cannot be had or holds no text; says what else can be given.
    """
    try:
        kept = itertools.islice((t for t in _open(source) if t.strip()), limit)
        first = next(kept, None)
    except CalibrationDataError:
        raise
    except Exception as error:  # data sets raise many kinds when offline, renamed or gated
        raise CalibrationDataError(f"calibration data {source!r} cannot be read: {error}. {_ALTERNATIVES}") from error
    if first is None:
        raise CalibrationDataError(f"calibration data {source!r} holds no text. {_ALTERNATIVES}")
    yield first
    yield from kept


def _open(source: str | Path | Iterable[str]) -> Iterable[str]:
    if not isinstance(source, str | Path):
        return source
    if source == "pydoc":
        return _pydoc()
    path = Path(source)
    if path.is_file():
        return _local(path)
    if path.suffix in (".txt", ".jsonl", ".json") or isinstance(source, Path):
        raise CalibrationDataError(f"no calibration file at {str(path)!r}. {_ALTERNATIVES}")
    return _hub(str(source))


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (text for _, text in sorted(topics.items()) if len(text.strip()) > _SHORTEST)


def _local(path: Path) -> Iterator[str]:
    if path.suffix not in (".jsonl", ".json"):
        return _paragraphs(path)
    from datasets import load_dataset

    pattern = glob.escape(str(path))
    return _long_enough(load_dataset("json", data_files=pattern, split="train", streaming=True))


def _paragraphs(path: Path) -> Iterator[str]:
    """What stands between blank lines (of spaces, in WikiText), and each line that is too long to be part of a wrapped
    text."""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in itertools.chain(file, [""]):
            if line.strip() and len(line) <= _LONGEST_LINE:
                lines.append(line)
                continue
            for text in ("".join(lines).strip(), line.strip()):
                if len(text) > _SHORTEST:
                    yield text
            lines = []


def _hub(name: str) -> Iterator[str]:
    from datasets import load_dataset

    return _long_enough(load_dataset(*_NAMED.get(name, (name,)), split="train", streaming=True))


def _long_enough(rows: Iterable[dict[str, object]]) -> Iterator[str]:
    for row in rows:
        if "text" not in row:
            found = f"the calibration data has columns {sorted(row)}, and none is called 'text'"
            raise CalibrationDataError(f"{found}. {_ALTERNATIVES}")
        if len((row["text"] or "").strip()) > _SHORTEST:
            yield row["text"].strip()
