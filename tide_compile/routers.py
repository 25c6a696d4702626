"""Routers: the small networks that decide, and the bank that holds those of one model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tide_compile.config import DEFAULT_THRESHOLD, TIDEConfig
from tide_compile.errors import ConfigError, NoRouterError, RouterFileError
from tide_compile.files import write_tensors
from tide_compile.fingerprint import fingerprint
from tide_compile.networks import Projection, TokenRouter
from tide_compile.passes.plan import Settings

FORMAT = "tide-routers-2"
_IN_MODEL_DTYPE = ("first", "second", "second_bias")


@dataclass(slots=True, eq=False)
class Norm:
    """The normalisation in front of every router, usually a copy of the model's final norm.

    Attributes:
        weight: [H] fp32. bias: [H] fp32 or None. eps: added to the mean square. layer_norm: subtract the mean first.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6
    layer_norm: bool = False


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
        metadata: JSON-able facts: config, data, the calibration's table.
    """

    routers: dict[int, TokenRouter]
    norm: Norm
    num_layers: int
    projections: dict[int, Projection] = field(default_factory=dict)
    fingerprint: str | None = None
    thresholds: dict[int, float] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    shortcuts: dict[int, Projection] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Layers with a router, ascending."""
        return sorted(self.routers)

    def keep(self, layers: Iterable[int]) -> RouterBank:
        """The bank with the checkpoints after these layers only; what its metadata says of scores and promises of all
        of them together is left out.

        Raises:
            ConfigError: there is no router after one of these layers.
        """
        layers = set(layers)
        if missing := sorted(layers - set(self.routers)):
            raise ConfigError(f"there are no routers after layers {missing}: give some of {self.layers}.")

        def of(parts: Mapping[int, object]) -> dict[int, object]:
            return {n: part for n, part in parts.items() if n in layers}

        shortcuts = {n: shortcut for n, shortcut in self.shortcuts.items() if n > min(layers, default=self.num_layers)}
        metadata = {n: value for n, value in self.metadata.items() if n not in ("screen", "certificate")}
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
        return cls(routers, Norm(torch.ones(hidden_dim)), num_layers)

    @classmethod
    def synthetic(
        cls,
        model: nn.Module,
        input_ids: Tensor,
        exits: Mapping[int, float],
        *,
        attention_mask: Tensor | None = None,
        exit_threshold: float = 0.85,
        seed: int = 0,
    ) -> RouterBank:
        """Routers that let a chosen share of tokens leave, by chance but reproducibly: for measuring.

        Args:
            model: the causal language model. input_ids: [B, S], the tokens that the shares refer to.
            exits: layer -> share, 0..1, of the tokens that reach its checkpoint; exact on ``input_ids``, about right on
                others.
            attention_mask: [B, S]. exit_threshold: with which the bank is to be used, above 0.5 and below 1.
            seed: of the random directions that tell tokens apart.

        Raises:
            ConfigError: a share or the threshold is not allowed.
        """
        from tide_compile.synthetic import synthetic_bank

        return synthetic_bank(model, input_ids, exits, attention_mask, exit_threshold, seed)

    def settings(self, config: TIDEConfig, device: torch.device, dtype: torch.dtype) -> Settings:
        """The bank's tensors on ``device``, with a config, as the settings that the passes take.

        ``dtype`` is the model's: projections and the probe's map are multiplied in it. The rest of a router stays in
        fp32.

        Raises:
            ConfigError: the config asks for projections or shortcuts that the bank does not have.
        """
        if config.exit_strategy not in ("auto", "identity", self.exit_strategy):
            raise ConfigError(
                f"exit_strategy={config.exit_strategy!r} needs projections of this kind, and these routers have "
                f"{self.exit_strategy!r}: calibrate with exit_strategy={config.exit_strategy!r}."
            )
        if not self.routers:
            raise NoRouterError(
                "this bank holds no routers. Calibrate, or pass exit_threshold=1.0 to run without exits."
            )
        thresholds = self._thresholds(config)
        config = config.placed(self.metadata.get("config", {}))
        if config.exit_threshold is None and self.thresholds:
            step = math.gcd(*(layer + 1 for layer in thresholds)) if thresholds else config.checkpoint_interval
            config = replace(config, checkpoint_interval=step, min_layers=1)
        affine = self.projections and config.exit_strategy != "identity"
        missing = sorted(set(thresholds) - set(self.projections)) if affine else []
        if missing:
            raise RouterFileError(f"these routers lack the exit projections of layers {missing}. Calibrate again.")
        return config.settings(
            routers={
                layer: {
                    "threshold": torch.tensor(threshold, dtype=torch.float32, device=device),
                    **{
                        n: t.to(device, dtype if n in _IN_MODEL_DTYPE else None)
                        for n, t in self.routers[layer].tensors.items()
                    },
                }
                for layer, threshold in thresholds.items()
            },
            norm_weight=self.norm.weight.to(device),
            norm_bias=None if self.norm.bias is None else self.norm.bias.to(device),
            norm_eps=self.norm.eps,
            layer_norm=self.norm.layer_norm,
            projections={
                layer: {n: t.to(device, dtype) for n, t in Projection(*projection).tensors.items()}
                for layer, projection in self.projections.items()
            }
            if affine
            else None,
            shortcuts=self._shortcuts(config, thresholds, device, dtype),
            expected_layers=self.num_layers,
        )

    def _shortcuts(
        self, config: TIDEConfig, checkpoints: Iterable[int], device: torch.device, dtype: torch.dtype
    ) -> dict[int, dict[str, Tensor]]:
        """Those that tokens which leave at these checkpoints need."""
        if config.kv_cache_strategy not in ("auto", "shortcut"):
            return {}
        if config.kv_cache_strategy == "shortcut" and not self.shortcuts:
            raise ConfigError(
                "kv_cache_strategy='shortcut' needs shortcuts, and these routers have none: calibrate again, or choose "
                "'propagate'."
            )
        needed = range(min(checkpoints, default=self.num_layers) + 1, self.num_layers - 1) if self.shortcuts else ()
        missing = sorted(set(needed) - set(self.shortcuts))
        if missing:
            raise RouterFileError(f"these routers lack the shortcuts of layers {missing}. Calibrate again.")
        return {n: {k: t.to(device, dtype) for k, t in self.shortcuts[n].tensors.items()} for n in needed}

    def _thresholds(self, config: TIDEConfig) -> dict[int, float]:
        """Layer -> threshold of the checkpoints that somebody can leave at."""
        if config.exit_threshold is None and self.thresholds:
            chosen = self.thresholds
        else:
            chosen = dict.fromkeys(
                self.layers, DEFAULT_THRESHOLD if config.exit_threshold is None else config.exit_threshold
            )
        return {layer: value for layer, value in sorted(chosen.items()) if value < 1}

    def save(self, path: str | Path) -> Path:
        """Write the bank as safetensors, atomically: an interrupted save leaves the old file."""
        tensors = {"norm.weight": self.norm.weight}
        if self.norm.bias is not None:
            tensors["norm.bias"] = self.norm.bias
        for layer, router in self.routers.items():
            tensors |= {f"router.{layer}.{n}": t for n, t in router.tensors.items()}
        for layer, projection in self.projections.items():
            tensors |= {f"projection.{layer}.{n}": t for n, t in Projection(*projection).tensors.items()}
        for layer, shortcut in self.shortcuts.items():
            tensors |= {f"shortcut.{layer}.{n}": t for n, t in shortcut.tensors.items()}
        header = {
            "format": FORMAT,
            "num_layers": self.num_layers,
            "fingerprint": self.fingerprint,
            "thresholds": {str(layer): value for layer, value in self.thresholds.items()},
            "norm": {"eps": self.norm.eps, "layer_norm": self.norm.layer_norm},
            **self.metadata,
        }
        return write_tensors(
            path, {n: t.float().cpu().contiguous() for n, t in tensors.items()}, {"tide": json.dumps(header)}
        )

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> RouterBank:
        """Read a bank written by ``save``, or a ``router.pt`` of tide-inference (with ``weights_only=True``).

        Args:
            path: the file.
            model: needed for a ``router.pt`` only: it lacks the norm and the number of layers.

        Raises:
            RouterFileError: no such file, corrupt, of another format, or a ``router.pt`` without a model.
        """
        path = Path(path)
        if not path.is_file():
            raise RouterFileError(
                f"no router file at {str(path)!r}. Make one with tide_compile.calibrate(model, tokenizer, "
                "save_path=...)."
            )
        if path.suffix in (".pt", ".pth", ".bin"):
            return _load_reference(path, model)
        try:
            with safe_open(path, "pt") as file:
                header = dict(json.loads((file.metadata() or {}).get("tide", "{}")))
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, ValueError, TypeError, OSError) as error:
            raise RouterFileError(f"{str(path)!r} is not a readable router file ({error}). Calibrate again.") from error
        if header.get("format") != FORMAT:
            raise RouterFileError(
                f"{str(path)!r} is a safetensors file, but not a router file of format {FORMAT!r} (found "
                f"{header.get('format')!r}). Calibrate again."
            )
        try:
            return cls._from_tensors(tensors, header)
        except Exception as error:  # whatever a file of the right format but the wrong content leads to
            raise RouterFileError(
                f"{str(path)!r} lacks a part or has one of the wrong shape ({error}). Calibrate again."
            ) from error

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], header: dict) -> RouterBank:
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, *rest = name.split(".")
            if kind in ("router", "projection", "shortcut"):
                parts.setdefault((kind, int(rest[0])), {})[rest[1]] = tensor
        routers = {n: TokenRouter.from_tensors(found) for (kind, n), found in parts.items() if kind == "router"}
        projections, shortcuts = (
            {n: Projection(**found) for (kind, n), found in parts.items() if kind == wanted}
            for wanted in ("projection", "shortcut")
        )
        norm = Norm(tensors["norm.weight"], tensors.get("norm.bias"), **header["norm"])
        known = ("format", "num_layers", "fingerprint", "norm", "thresholds")
        thresholds = {int(layer): value for layer, value in header.get("thresholds", {}).items()}
        metadata = {k: v for k, v in header.items() if k not in known}
        found = (projections, header["fingerprint"], thresholds, metadata, shortcuts)
        return cls(routers, norm, header["num_layers"], *found)


def _load_reference(path: Path, model: nn.Module | None) -> RouterBank:
    from tide_compile.decoder import find_decoder

    if model is None:
        raise RouterFileError(
            f"{str(path)!r} is a router file of tide-inference, which lacks the model's norm. Load it with "
            "tide_compile.TIDE(model, router_path=...), or convert it once: "
            "RouterBank.load(path, model=model).save('router.safetensors')."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        routers = {}
        for layer, weights in state["router_layers"].items():
            routers[int(layer)] = TokenRouter(state["hidden_dim"], state["bottleneck_dim"])
            routers[int(layer)].load_state_dict(weights)
    except Exception as error:  # torch.load raises many kinds for a bad file
        raise RouterFileError(f"{str(path)!r} is not a readable tide-inference router file ({error}).") from error
    decoder = find_decoder(model)
    if decoder.hidden_dim != state["hidden_dim"]:
        raise RouterFileError(
            f"{str(path)!r} is for models of hidden size {state['hidden_dim']}, this one has {decoder.hidden_dim}."
        )
    return RouterBank(routers, decoder.final_norm(), len(decoder.layers), {}, fingerprint(model.parameters()))
