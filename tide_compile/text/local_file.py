"""local_file: the texts in a file: paragraphs, or what is called ``text`` in JSON."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tide_compile.errors import CalibrationDataError

_LONGEST_LINE = 200  # characters of a line of wrapped text
_JSON = (".jsonl", ".json")
_MARKS = (  # the byte order marks; that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def texts_of_file(path: Path) -> Iterator[str]:
    """The texts, stripped, one at a time: the ``text`` of each object in a ``.jsonl`` or ``.json`` file (an object per
    line, or one array of them), else paragraphs. In UTF-8, or with a byte order mark in UTF-16 or UTF-32.

    Raises:
        CalibrationDataError: the file cannot be read, or is no such text; says where.
    """
    return _texts_of_rows(path) if path.suffix.lower() in _JSON else _paragraphs(path)


def _paragraphs(path: Path) -> Iterator[str]:
    """What stands between blank lines (of spaces, in WikiText), and each line that is too long to be part of a wrapped
    text."""
    lines: list[str] = []
    for line in itertools.chain(_lines(path), [""]):
        if line.strip() and len(line) <= _LONGEST_LINE:
            lines.append(line)
            continue
        yield "".join(lines).strip()
        yield line.strip()
        lines = []


def _texts_of_rows(path: Path) -> Iterator[str]:
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise CalibrationDataError(f"{where} of {str(path)!r} is no object with a 'text'.")
        if "text" not in row:
            raise CalibrationDataError(f"{where} of {str(path)!r} has {sorted(row)}, and none is called 'text'.")
        if not isinstance(row["text"], str | None):
            raise CalibrationDataError(f"{where} of {str(path)!r} has a 'text' that is no string.")
        yield (row["text"] or "").strip()


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Every object, and where it stands."""
    lines = enumerate(_lines(path), 1)
    number, first = next(((n, line) for n, line in lines if line.strip()), (1, ""))
    try:
        if first.lstrip().startswith("["):
            rows = json.loads("".join([first, *(line for _, line in lines)]))
            yield from ((f"object {n}", row) for n, row in enumerate(rows, 1))
            return
        for number, line in itertools.chain([(number, first)], lines):  # noqa: B020 (the error says which)
            if line.strip():
                yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationDataError(
            f"{str(path)!r} is not JSON with an object in each line, or with one array of objects: line "
            f"{number + error.lineno - 1}: {error.msg}."
        ) from error


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            head = file.read(1 << 12)
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
        if encoding == "utf-8" and b"\0" in head:
            raise CalibrationDataError(
                f"{str(path)!r} is not a text: it holds null bytes. Give text in UTF-8, or in UTF-16 with a byte order "
                "mark."
            )
        with path.open(encoding=encoding) as file:
            yield from file
    except UnicodeError as error:
        where = (
            f"byte {error.object[error.start]:#04x}: {error.reason}" if isinstance(error, UnicodeDecodeError) else error
        )
        raise CalibrationDataError(
            f"{str(path)!r} is not in {encoding.removesuffix('-sig').upper()} ({where}). Save it in UTF-8, for example "
            "with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    except OSError as error:
        raise CalibrationDataError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
