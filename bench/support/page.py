"""page: pages of documentation made of tables, of which some can be written anew and the others stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from tide_compile.files import write_text


@dataclass(frozen=True, slots=True)
class Table:
    """``title`` is the section's; ``about`` says what is measured, ``on`` with which data; ``after`` follows the
    table."""

    title: str
    about: str
    on: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    after: str = ""

    def section(self, setting: str) -> str:
        """The section in Markdown; ``setting``: the machine, the model and the command."""
        table = markdown_table(self.rows, self.headers)
        parts = [f"## {self.title}", self.about, f"{self.on} {setting}", table, self.after]
        return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(rows: Sequence[Sequence[object]], headers: Sequence[str], align_numbers: bool = False) -> str:
    """Cells as they are, or numbers with their points below each other."""
    return tabulate(rows, headers, "github", disable_numparse=not align_numbers)


def page(title: str, *blocks: str) -> str:
    """A whole page in Markdown."""
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def update_page(path: Path, heading: str, sections: dict[str, str], order: Sequence[str]) -> None:
    """Put ``sections`` (title -> Markdown) into a page, atomically. Sections of other titles stay as they are, and so
    does what stands before the first; a page that is not there yet begins with ``heading``.

    Args:
        order: titles in the order in which they are to stand; those that it does not name come last.
    """
    before, *found = (path.read_text() if path.is_file() else f"{heading}\n").split("\n## ")
    known = {text.split("\n", 1)[0]: f"## {text.rstrip()}\n" for text in found} | sections
    titles = [title for title in order if title in known] + [title for title in known if title not in order]
    write_text(path, "\n".join([f"{before.rstrip()}\n", *(known[title] for title in titles)]))
