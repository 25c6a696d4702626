"""``tide kernels``: every Triton kernel built for every GPU, as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tide_compile.errors import ConfigError
from tide_compile.kernels.build import DTYPES, Launch, Sizes, build, launches
from tide_compile.kernels.gpu.cards import CAPABILITIES, CardError, card_of


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel, dtype, number of rows, configuration and compute capability. ``card``: the one of that capability
    whose bandwidth ``roofline_seconds`` is reckoned with. ``error``: why there is no machine code; then there are no
    figures. Bytes; registers and spilled bytes per thread, shared memory per program."""

    kernel: str
    dtype: str
    rows: int
    configuration: str
    capability: float
    card: str | None
    cubin: int | None
    registers: int | None
    shared: int | None
    spilled: int | None
    bytes_moved: int
    roofline_seconds: float | None
    error: str | None = None


def show_kernels(
    capabilities: Sequence[float] | None,
    dtypes: Sequence[str] | None,
    rows: Sequence[int],
    sizes: dict[str, int],
    every: bool,
    as_json: bool,
) -> bool:
    """Build and print. A dtype that a card lacks is a line of the table, unless only such ones were asked for.

    Args:
        capabilities: compute capabilities such as 8.0; None for all. dtypes: keys of ``DTYPES``; None for all.
        rows: tokens of a call. sizes: fields of ``Sizes``. every: all configurations that tuning tries.

    Returns:
        Whether nothing spills.

    Raises:
        ConfigError: an unknown dtype or capability, or a size below 1.
        CardError: nothing that was asked for is possible.
    """
    chosen = [round(10 * c) for c in capabilities] if capabilities else list(CAPABILITIES)
    _check("--cc", [c / 10 for c in chosen], [c / 10 for c in CAPABILITIES])
    _check("--dtype", dtypes or (), list(DTYPES))
    if min(*rows, *sizes.values()) < 1:
        raise ConfigError("rows and sizes are whole numbers of at least 1.")
    asked = [
        (launch, capability)
        for dtype in dtypes or DTYPES
        for count in rows
        for launch in launches(Sizes(**sizes), dtype, count, every)
        for capability in chosen
    ]
    found = list(_built(asked))
    failed = [row.error for row in found if row.error]
    if len(failed) == len(found):
        raise CardError(failed[0])
    if as_json:
        json.dump({"sizes": sizes, "kernels": [asdict(row) for row in found]}, sys.stdout, indent=1)
        print()
    else:
        console = Console(width=None if sys.stdout.isatty() else 150)
        console.print(_table(found, sizes))
        for error in dict.fromkeys(failed):
            console.print(f"none: {error}", highlight=False)
    spilled = [row for row in found if row.spilled]
    summary = f"{len(found) - len(failed)} builds, {len(failed)} not possible, {len(spilled)} that spill registers"
    Console(stderr=True).print(summary, highlight=False)
    return not spilled


def _check(option: str, given: Sequence[object], known: Sequence[object]) -> None:
    for value in given:
        if value not in known:
            raise ConfigError(f"{option} {value} is not known: choose from {', '.join(map(str, known))}.")


def _built(asked: list[tuple[Launch, int]]) -> Iterator[Row]:
    console = Console(stderr=True)
    for launch, capability in track(asked, "compiling", console=console, disable=not console.is_terminal):
        card = card_of(capability)
        seconds = launch.bytes_moved / card.bandwidth if card else None
        about = (launch.name, launch.dtype, launch.rows, launch.settings, capability / 10, card.name if card else None)
        try:
            built = build(launch, capability)
        except CardError as error:
            yield Row(*about, None, None, None, None, launch.bytes_moved, seconds, str(error))
        else:
            figures = (built.cubin, built.registers, built.shared, built.spilled)
            yield Row(*about, *figures, launch.bytes_moved, seconds)


def _table(found: list[Row], sizes: dict[str, int]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in sizes.items())
    table = Table(title=f"Triton kernels: {title}", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("kernel", "dtype", "tokens", "configuration", "cc", "card"):
        table.add_column(name, no_wrap=True)
    for name in ("cubin", "registers", "shared", "spilled", "bytes moved", "roofline"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in found:
        key = (row.kernel, row.dtype, row.rows, row.configuration)
        about = (row.kernel, row.dtype, str(row.rows), row.configuration) if key != before else ("", "", "", "")
        figures = (row.cubin, row.registers, row.shared, row.spilled)
        texts = [str(n) for n in figures] if row.error is None else ["none", "", "", ""]
        roofline = "" if row.roofline_seconds is None or row.error else f"{row.roofline_seconds * 1e6:.2f} us"
        table.add_row(*about, f"{row.capability}", row.card or "", *texts, f"{row.bytes_moved:,}", roofline)
        before = key
    return table
