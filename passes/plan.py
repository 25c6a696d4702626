"""plan: the settings that come in, and the frozen plan that the analyses find.

Shapes: B batch, S sequence, H hidden, N layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


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
        return self.router_constants(layer) | self.projection_constants(layer)

    def router_constants(self, layer: int) -> dict[str, torch.Tensor]:
        """Those of its router and of the norm in front of it."""
        named = {f"router.{layer}.{n}": t for n, t in self.routers[layer].items()}
        named |= {"router.norm_weight": self.norm_weight, "router.norm_bias": self.norm_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def projection_constants(self, layer: int) -> dict[str, torch.Tensor]:
        """Those of its exit projection, in the order in which ``tide::project`` takes them; empty for identity."""
        tensors = {} if self.projections is None else self.projections[layer]
        return {f"projection.{layer}.{n}": tensors[n] for n in ("weight", "bias", "down") if n in tensors}

    def threshold_name(self, layer: int) -> str:
        """The environment name of the threshold of a router."""
        return f"router.{layer}.threshold"

    def shortcut(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors ``down``, ``weight``, ``bias`` of a layer's shortcut by environment name; empty where none is."""
        tensors = self.shortcuts.get(layer, {})
        return {f"shortcut.{layer}.{n}": tensors[n] for n in ("down", "weight", "bias") if tensors}

    def shortcut_constants(self) -> dict[str, torch.Tensor]:
        """The tensors of all shortcuts by environment name."""
        return {name: tensor for layer in self.shortcuts for name, tensor in self.shortcut(layer).items()}


PADDING = -1  # in the place of the layer that a token left after


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
