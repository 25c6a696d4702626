"""RouterBank: the routers of one model, what exited states go through, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tide_compile.errors import ConfigError, RouterFileError
from tide_compile.files import user_path
from tide_compile.model.norm import Norm
from tide_compile.routers.metadata import CERTIFICATE, SCREEN, Metadata
from tide_compile.routers.networks import Projection, TokenRouter
from tide_compile.routers.router_file import is_tide_inference, read_router_file, read_tide_inference, write_router_file


@dataclass(slots=True, eq=False)
class RouterBank:
    """Routers, exit projections and what is known of the model they were made for.

    Attributes:
        routers: layer -> router of the checkpoint after that layer.
        norm: what the routers read the state through.
        thresholds: layer -> the score above which a token leaves there, chosen with the routers; layers that are not
            named are no checkpoints then. Empty: nothing was chosen. They are used where the config gives no
            ``exit_threshold``.
        projections: layer -> what an exited state goes through; empty for identity.
        shortcuts: layer -> what leads the state of a token that has left past that layer, for the keys and values
            behind it; one for each layer behind the first checkpoint but the last, or none at all.
        num_layers: layers of the model.
        fingerprint: of the model's weights; None accepts any model of that size.
        metadata: how the routers were made and how good they are.
    """

    routers: dict[int, TokenRouter]
    norm: Norm
    num_layers: int
    projections: dict[int, Projection] = field(default_factory=dict)
    fingerprint: str | None = None
    thresholds: dict[int, float] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=dict)
    shortcuts: dict[int, Projection] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Layers with a router, ascending."""
        return sorted(self.routers)

    def keep(self, layers: Iterable[int]) -> RouterBank:
        """The bank with the checkpoints after these layers only; what its metadata says of all of them together,
        the sweep and the certificate, is left out.

        Raises:
            ConfigError: there is no router after one of these layers.
        """
        layers = set(layers)
        if missing := sorted(layers - set(self.routers)):
            raise ConfigError(f"there are no routers after layers {missing}: give some of {self.layers}.")

        def of(parts: Mapping[int, object]) -> dict[int, object]:
            return {n: part for n, part in parts.items() if n in layers}

        shortcuts = {n: shortcut for n, shortcut in self.shortcuts.items() if n > min(layers, default=self.num_layers)}
        metadata = {n: value for n, value in self.metadata.items() if n not in (SCREEN, CERTIFICATE)}
        if "table" in metadata:
            metadata["table"] = [row for row in metadata["table"] if row["layer"] in layers]
        if "reliability" in metadata:
            metadata["reliability"] = {n: r for n, r in metadata["reliability"].items() if int(n) in layers}
        return replace(
            self, routers=of(self.routers), projections=of(self.projections), thresholds=of(self.thresholds),
            shortcuts=shortcuts, metadata=metadata,
        )  # fmt: skip

    @property
    def exit_strategy(self) -> str:
        """Of the projections: ``"identity"`` (there are none), ``"affine"`` or ``"low_rank"``."""
        if not self.projections:
            return "identity"
        return "affine" if any(len(p) < 3 or p[2] is None for p in self.projections.values()) else "low_rank"

    @property
    def hidden_dim(self) -> int:
        """H, of the model's hidden states."""
        return self.norm.weight.numel()

    @classmethod
    def untrained(
        cls,
        hidden_dim: int,
        num_layers: int,
        *,
        layers: Iterable[int] | None = None,
        bottleneck_dim: int = 128,
        seed: int = 0,
    ) -> RouterBank:
        """Routers with random weights, after the given layers or all but the last: for measuring (with a threshold of
        0 every token leaves at the first checkpoint) and for tests."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            routers = {
                i: TokenRouter(hidden_dim, bottleneck_dim)
                for i in (range(num_layers - 1) if layers is None else layers)
            }
        return cls(routers, Norm(torch.ones(hidden_dim, dtype=torch.float32)), num_layers)

    def save(self, path: str | Path) -> Path:
        """Write the bank as safetensors, atomically: an interrupted save leaves the old file.

        Args:
            path: of any name, and with ``~`` for the home folder; ``load`` knows its files by their bytes.

        Raises:
            OutputFileError: the file cannot be written.
        """
        tensors = {"norm.weight": self.norm.weight}
        if self.norm.bias is not None:
            tensors["norm.bias"] = self.norm.bias
        for kind, parts in self._parts().items():
            tensors |= {f"{kind}.{layer}.{n}": t for layer, part in parts.items() for n, t in part.tensors.items()}
        header = {
            "num_layers": self.num_layers,
            "fingerprint": self.fingerprint,
            "thresholds": {str(layer): value for layer, value in self.thresholds.items()},
            "norm": {"eps": self.norm.eps, "layer_norm": self.norm.layer_norm},
            **self.metadata,
        }
        return write_router_file(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> RouterBank:
        """Read a bank written by ``save``, or a ``router.pt`` of tide-inference (with ``weights_only=True``).

        Args:
            path: the file.
            model: needed for a ``router.pt`` only: it lacks the norm and the number of layers.

        Raises:
            RouterFileError: no such file, corrupt, of another format, or a ``router.pt`` without a model.
        """
        path = user_path(path)
        if is_tide_inference(path):
            routers, norm, num_layers, mark = read_tide_inference(path, model)
            return cls(routers, norm, num_layers, fingerprint=mark)
        tensors, header = read_router_file(path)
        try:
            return cls._from_tensors(tensors, header)
        except Exception as error:  # whatever a file of the right format but the wrong content leads to
            raise RouterFileError(
                f"{str(path)!r} lacks a part or has one of the wrong shape ({error}). Calibrate again."
            ) from error

    def _parts(self) -> dict[str, dict[int, TokenRouter | Projection]]:
        """What there is for layers, by the names of router files."""
        projections = {layer: Projection(*projection) for layer, projection in self.projections.items()}
        return {"router": self.routers, "projection": projections, "shortcut": self.shortcuts}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], header: dict[str, object]) -> RouterBank:
        parts: dict[str, dict[int, dict[str, Tensor]]] = {"router": {}, "projection": {}, "shortcut": {}}
        for name, tensor in tensors.items():
            kind, *rest = name.split(".")
            if kind in parts:
                parts[kind].setdefault(int(rest[0]), {})[rest[1]] = tensor
        return cls(
            {layer: TokenRouter.from_tensors(found) for layer, found in parts["router"].items()},
            Norm(tensors["norm.weight"], tensors.get("norm.bias"), **header.pop("norm")),
            header.pop("num_layers"),
            {layer: Projection(**found) for layer, found in parts["projection"].items()},
            header.pop("fingerprint"),
            {int(layer): value for layer, value in header.pop("thresholds", {}).items()},
            header,
            {layer: Projection(**found) for layer, found in parts["shortcut"].items()},
        )
