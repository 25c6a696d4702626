"""program: the model cut into pieces, and when each of them is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import GraphModule

# Environment names of the values that the executor keeps between pieces.
HIDDEN = "tide_hidden"  # [B, S, H] residual stream after the latest segment
ACTIVE = "tide_active"  # [B, S] bool, rows that have neither left nor are padding
VALID = "tide_valid"  # [B, S] bool, rows that are no padding: ACTIVE as it was at first
SCORE = "tide_score"  # [B, S] fp32, what the latest checkpoint's router said
LEAVE = "tide_leave"  # [B, S] bool, rows that leave at the latest checkpoint
ROWS = "tide_rows"  # [n] or [B, n] int64, the tokens that a compact segment runs
COUNTS = "tide_counts"  # [3] int64, rows leaving now, rows still active after that, the most of them in a sequence
OUT = "tide_out"  # [B, S, H] projected states of the rows that have left
KEPT = (HIDDEN, ACTIVE, VALID, ROWS, OUT, SCORE, LEAVE, COUNTS)

Needed = Literal["at once", "after an exit"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A graph that runs as one compiled call.

    Attributes:
        name: for people to read; nothing depends on it.
        inputs, outputs: environment names, in the order of the placeholders and of the output tuple.
        needed: in every call, or only in one in which a token has left.
    """

    name: str
    graph: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    needed: Needed = "at once"


@dataclass(frozen=True, slots=True)
class Segment:
    """The layers from one cut to the next.

    Attributes:
        plain: as long as nobody has left. masked: rows that have left keep their state. compact: they are left out.
        project: what the rows that leave here go through. fill: keys and values of all later segments, when everybody
            has left here.
        checkpoint: the layer whose router closes the segment, or None.
    """

    plain: Piece
    masked: Piece | None = None
    compact: Piece | None = None
    project: Piece | None = None
    fill: Piece | None = None
    checkpoint: int | None = None

    def pieces(self) -> Iterator[Piece]:
        """Those that there are."""
        found = (self.plain, self.masked, self.compact, self.project, self.fill)
        return (piece for piece in found if piece is not None)


@dataclass(frozen=True, slots=True)
class Program:
    """The model cut into pieces.

    Attributes:
        prologue: what comes before the layers. epilogue: norm and head.
        arguments, results: environment names of what the Dynamo graph took and returned (a result may also be a
            constant).
        constants: the tensors that the rewrites bound (routers, projections, shortcuts), by environment name.
    """

    prologue: Piece
    segments: tuple[Segment, ...]
    epilogue: Piece
    arguments: tuple[str, ...]
    results: tuple[object, ...]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def pieces(self) -> Iterator[Piece]:
        """All pieces, in the order in which they may run."""
        yield self.prologue
        for segment in self.segments:
            yield from segment.pieces()
        yield self.epilogue

    def straight(self) -> Iterator[Piece]:
        """The pieces that run where nobody leaves, in order."""
        yield self.prologue
        yield from (segment.plain for segment in self.segments)
        yield self.epilogue

    def node_count(self) -> int:
        """Nodes of all pieces."""
        return sum(len(piece.graph.graph.nodes) for piece in self.pieces())


def segment_name(index: int, form: str | None = None) -> str:
    """Of the piece of a segment in one of its forms; plain: None."""
    return f"segment_{index}" if form is None else f"segment_{index}.{form}"


def project_name(layer: int) -> str:
    """Of the piece that tokens go through which leave after ``layer``."""
    return f"project_{layer}"


def fill_name(layer: int) -> str:
    """Of the piece that writes keys and values where all have left after ``layer``."""
    return f"fill_{layer}"
