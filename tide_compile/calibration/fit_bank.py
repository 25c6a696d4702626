"""fit_bank: from collected states to a bank of exit projections and routers, with a table of how good they are.

Shapes: T tokens, C checkpoints, H hidden, V vocabulary, K probe vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tide_compile.calibration.fit_maps import distil, factor, fit_affine, fit_shortcut, projected
from tide_compile.calibration.quality import calibration_error, decision_quality, projection_quality, reliability
from tide_compile.calibration.statistics import Collected, Reservoir
from tide_compile.calibration.train_routers import fit_probe, train_router
from tide_compile.calibration.training import mixed_precision
from tide_compile.config import DEFAULT_THRESHOLD, TIDEConfig
from tide_compile.model.decoder import Decoder
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.networks import ProbeRouter, Projection, TokenRouter

_ROWS = 256  # rows through the head at a time


@torch.no_grad()
def fit_bank(
    decoder: Decoder, layers: tuple[int, ...], collected: Collected, config: TIDEConfig, seed: int, progress: bool
) -> RouterBank:
    """Projections and routers for the checkpoints after ``layers``, and closed-form shortcuts.

    Returns:
        The bank. ``metadata["table"]`` has a row per checkpoint, on held-out tokens, ``metadata["reliability"]`` the
        curve of its scores.
    """
    bank = RouterBank({}, decoder.final_norm(), len(decoder.layers), metadata={"table": [], "reliability": {}})
    train, held_out = collected.train, collected.held_out
    full = {part: _predictions(decoder, part.at(-1)) for part in (train, held_out)}
    seen = None if config.router_kind == "mlp" else _logits_of_frequent(decoder, train, full[train], config)
    threshold = DEFAULT_THRESHOLD if config.exit_threshold is None else config.exit_threshold
    for layer in tqdm(layers, "fit", unit="checkpoint", disable=not progress):
        projections = _projections(decoder, collected, layer, config, seed)
        projection = projections[config.exit_strategy if config.exit_strategy in projections else "affine"]
        agreement = _agreement(decoder, collected, layer, projection, full)  # [T] of 0 and 1, of each part
        labels = agreement if config.calibration_label == "agreement" else _converged(collected, layer, config)
        normed = {part: bank.norm(collected.states(part, layer)) for part in full}
        router = _router(config, normed[train], seen, seed)
        train_router(router, (normed[train], labels[train]), (normed[held_out], labels[held_out]), seed)
        score = router(normed[held_out])
        curve = reliability(score, labels[held_out])
        if projection is not None:
            bank.projections[layer] = projection
        bank.routers[layer] = router
        bank.metadata["reliability"][str(layer)] = curve
        bank.metadata["table"].append(
            {
                "layer": layer,
                **projection_quality(decoder, projections, collected.states(held_out, layer), held_out.at(-1)),
                **decision_quality(score, labels[held_out], agreement[held_out], threshold),
                "calibration error": round(calibration_error(curve), 3),
            }
        )
    bank.shortcuts = _shortcuts(collected, config)
    return bank


def _projections(
    decoder: Decoder, collected: Collected, layer: int, config: TIDEConfig, seed: int
) -> dict[str, Projection | None]:
    """By the names of ``exit_strategy``; identity is None. The one that will be used is distilled."""
    found: dict[str, Projection | None] = {"identity": None}
    if not collected.grams:
        return found
    train, held_out = ((collected.states(part, layer), part.at(-1)) for part in (collected.train, collected.held_out))
    gram = collected.grams[layer]
    affine = fit_affine(gram, *held_out)
    found["affine"], found["low_rank"] = affine, factor(affine, gram, min(config.projection_rank, decoder.hidden_dim))
    wanted = "affine" if config.exit_strategy == "auto" else config.exit_strategy
    if config.distillation_steps and wanted in found:
        found[wanted] = distil(
            found[wanted], train, held_out, _head(decoder), config.distillation_steps, seed, decoder.device
        )
    return found


def _shortcuts(collected: Collected, config: TIDEConfig) -> dict[int, Projection]:
    """For every layer behind the first checkpoint but the last."""
    if not config.calibrates_shortcuts:
        return {}
    states = [collected.states(collected.train, layer) for layer in collected.layers]
    rank = min(config.projection_rank, states[0].shape[-1])
    pairs = zip(collected.layers[1:], states, states[1:], strict=False)
    return {layer: fit_shortcut(before, behind, rank) for layer, before, behind in pairs}


def _head(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """The model's head for distillation."""

    def head(states: Tensor) -> Tensor:
        with mixed_precision(decoder.device, decoder.dtype):
            return decoder.logits(states)

    return head


def _router(config: TIDEConfig, normed: Tensor, seen: Tensor | None, seed: int) -> TokenRouter:
    """Untrained; with a probe fitted to logits ``seen`` [T, K], where there are some, from ``normed`` states [T, H]."""
    hidden_dim = normed.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if seen is None:
            return TokenRouter(hidden_dim, config.router_bottleneck_dim)
        rank = min(config.probe_rank, hidden_dim, seen.shape[-1])
        return ProbeRouter(hidden_dim, *fit_probe(normed, seen, rank, seed), config.router_bottleneck_dim)


def _logits_of_frequent(decoder: Decoder, part: Reservoir, predictions: Tensor, config: TIDEConfig) -> Tensor:
    """The full model's logits [T, K], fp32, of the tokens that it predicts most often."""
    counts = predictions.bincount()
    size = min(config.probe_vocabulary, int((counts > 0).sum()))
    frequent = counts.argsort(descending=True)[:size].to(decoder.device)
    rows = (decoder.logits(rows.to(decoder.device))[:, frequent] for rows in part.at(-1).split(_ROWS))
    return torch.cat([logits.float().cpu() for logits in rows])


def _predictions(decoder: Decoder, states: Tensor) -> Tensor:
    """The model's next token [T] for states [T, H] behind the last layer."""
    return torch.cat([decoder.logits(rows.to(decoder.device)).argmax(-1).cpu() for rows in states.split(_ROWS)])


def _agreement(
    decoder: Decoder, collected: Collected, layer: int, projection: Projection | None, full: dict[Reservoir, Tensor]
) -> dict[Reservoir, Tensor]:
    """Whether a projected state leads to the ``full`` model's token: [T] fp32 of 0 and 1, of each part."""
    exited = {part: _predictions(decoder, projected(projection, collected.states(part, layer))) for part in full}
    return {part: (exited[part] == full[part]).float() for part in full}


def _converged(collected: Collected, layer: int, config: TIDEConfig) -> dict[Reservoir, Tensor]:
    """The reference's label, as ``_agreement``: cosine with the final state above ``convergence_threshold``."""
    cosine = {
        part: torch.nn.functional.cosine_similarity(collected.states(part, layer).float(), part.at(-1).float(), dim=-1)
        for part in (collected.train, collected.held_out)
    }
    return {part: (c > config.convergence_threshold).float() for part, c in cosine.items()}
