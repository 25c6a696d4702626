"""What flows through the passes: the settings that come in, the frozen plan, and the program that is rewritten.

Shapes: B batch, S sequence, H hidden, N layers.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Settings:
    """Values a compilation is asked for.

    ``checkpoints``: the layers behind which tokens may leave, ascending; none: the model is cut and runs in full.
    ``segment_length``: layers of a segment, see ``place_checkpoints``. ``routers`` maps each checkpoint to the tensors
    of its router.

    Router tensors: ``down`` [D, H], ``up`` [1, D] and ``threshold`` [], fp32; those of ``tide::probe``, where there is
    one. ``norm_weight`` [H] and ``norm_bias`` [H] or None belong to the normalisation in front of every router.
    ``projections`` maps a layer to the tensors of ``tide::project``. ``shortcuts`` maps a layer to the tensors ``down``
    [R, H], ``weight`` [H, R] and ``bias`` [H] of what stands in for it where it is skipped.
    """

    checkpoints: tuple[int, ...]
    kv_cache_strategy: Literal["propagate", "shortcut", "zero_pad"]
    segment_length: int | None = None
    routers: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    norm_eps: float = 1e-6
    layer_norm: bool = False
    projections: dict[int, dict[str, torch.Tensor]] | None = None
    shortcuts: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    expected_layers: int | None = None
    compaction: Literal["auto", "always", "never"] = "auto"  # which segments get a compact form

    def constants(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of the checkpoint after ``layer`` by environment name."""
        named = {f"router.{layer}.{n}": t for n, t in self.routers[layer].items()}
        named |= {"router.norm_weight": self.norm_weight, "router.norm_bias": self.norm_bias}
        if self.projections is not None:
            named |= {f"projection.{layer}.{n}": t for n, t in self.projections[layer].items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def shortcut(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors ``down``, ``weight``, ``bias`` of a layer's shortcut by environment name; empty where none is."""
        tensors = self.shortcuts.get(layer, {})
        return {f"shortcut.{layer}.{n}": tensors[n] for n in ("down", "weight", "bias") if tensors}

    def shortcut_constants(self) -> dict[str, torch.Tensor]:
        """The tensors of all shortcuts by environment name."""
        return {name: tensor for layer in self.shortcuts for name, tensor in self.shortcut(layer).items()}


@dataclass(frozen=True, slots=True)
class Layers:
    """Decoder layers of the graph: the name of their list and, per layer, its first node; ``end`` is the last
    node of the last layer."""

    prefix: str
    starts: tuple[str, ...]
    end: str

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Node names of the residual stream [B, S, H]: what enters layer 0, and what each layer hands on.

    ``entering_value`` is the fake value of the first. ``hoisted`` names nodes inside layers that depend on no hidden
    state and are shared by several layers.
    """

    entering: str
    entering_value: torch.Tensor
    leaving: tuple[str, ...]
    hoisted: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Padding:
    """The argument that says which tokens are padding, and its fake value: [B, L] of 0/1, or [B, 1, S, L]."""

    name: str
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the analyses found; the rewrites read it and change nothing in it."""

    settings: Settings | None = None
    layers: Layers | None = None
    boundaries: Boundaries | None = None
    padding: Padding | None = None
    cuts: tuple[int, ...] = ()  # a segment ends after each of these layers
    checkpoints: tuple[int, ...] = ()  # the cuts that carry a router
    single_row: bool = False  # B * S == 1: an exit needs no mask

    def segment_layers(self, segment: int) -> range:
        """Layers of a segment."""
        edges = (-1, *self.cuts, len(self.layers) - 1)
        return range(edges[segment] + 1, edges[segment + 1] + 1)

    @property
    def num_segments(self) -> int:
        """One more than there are cuts."""
        return len(self.cuts) + 1

    def checkpoint_of(self, segment: int) -> int | None:
        """The layer of the checkpoint that closes a segment, or None."""
        last = self.segment_layers(segment)[-1]
        return last if last in self.checkpoints else None

    def follows_checkpoint(self, segment: int) -> bool:
        """Whether rows can have left before this segment starts."""
        return any(c < self.segment_layers(segment)[0] for c in self.checkpoints)


@dataclass(frozen=True, slots=True)
class Piece:
    """A graph that runs as one compiled call. ``inputs`` and ``outputs`` are environment names, in the order of
    the placeholders and of the output tuple."""

    graph: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """The model cut into pieces. Keys: ``prologue``, ``segment_<i>``, ``segment_<i>.masked``,
    ``segment_<i>.compact``, ``project_<layer>``, ``fill_<layer>``, ``epilogue``. ``arguments`` and ``results`` are the
    environment names of what the Dynamo graph took and returned (a result may also be a constant). ``constants`` are
    the tensors the rewrites bound (routers, projections)."""

    pieces: dict[str, Piece]
    arguments: tuple[str, ...]
    results: tuple[object, ...]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def node_count(self) -> int:
        """Nodes of all pieces."""
        return sum(len(p.graph.graph.nodes) for p in self.pieces.values())
