"""calibrate: from a model and some text to a bank of routers and exit projections, in one streaming pass.

Shapes: B batch, S sequence, T tokens, C checkpoints, H hidden, V vocabulary.
"""

from __future__ import annotations

import datetime
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.collect import Gram, Reservoir
from tide_compile.config import DEFAULT_THRESHOLD, TIDEConfig
from tide_compile.decoder import Decoder, find_decoder
from tide_compile.errors import CalibrationDataError, ConfigError
from tide_compile.files import router_cache
from tide_compile.fingerprint import fingerprint
from tide_compile.fit import fit_projection, train_router
from tide_compile.kernels.route import normalise_reference
from tide_compile.registry import attach
from tide_compile.routers import Norm, RouterBank
from tide_compile.texts import calibration_texts

log = logging.getLogger("tide_compile")

_HELD_OUT = 5  # every fifth text is kept from fitting and used to stop, to choose and to report
_TOKENS = 8192  # kept for training routers, a quarter as many for judging them
_BYTES = 1 << 30  # and at most this much memory for both
_ROWS = 256  # rows through the head at a time


def calibrate(
    model: nn.Module,
    tokenizer: object,
    config: TIDEConfig | None = None,
    save_path: str | Path | None = None,
    *,
    dataset: str | Path | Iterable[str] | None = None,
    num_samples: int | None = None,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> RouterBank:
    """Make routers (and exit projections) for a model.

    Runs the model once, uncompiled, over the texts. Memory does not grow with their number: second moments for the
    projections (ridge regression), and a uniform sample of tokens for the routers.

    Args:
        model: a causal language model; it is not changed. It stays attached: ``torch.compile(model, backend="tide")``
            finds the routers.
        tokenizer: its tokenizer.
        config: ``exit_strategy``, ``calibration_label``, ``checkpoint_interval``, ``router_bottleneck_dim``, ...
        save_path: router file to write (safetensors); None: the router cache, where the backend looks too.
        dataset: in place of ``config.calibration_dataset``; also a list of strings.
        num_samples: in place of ``config.calibration_samples``.
        max_length: tokens read of each text. batch_size: texts at a time. seed: of sampling and training.
        progress: show a progress bar.

    Returns:
        The bank; ``bank.metadata["table"]`` has a row per checkpoint, measured on held-out texts.

    Raises:
        CalibrationDataError: the texts cannot be had, or are too few.
        LayersNotFoundError: the model has no decoder layers.
    """
    config = config or TIDEConfig()
    changes = {
        "calibration_samples": num_samples,
        "calibration_dataset": dataset if isinstance(dataset, str) else None,
    }
    config = replace(config, **{n: v for n, v in changes.items() if v is not None})
    source = config.calibration_dataset if dataset is None else dataset
    decoder = find_decoder(model)
    layers = tuple(range(config.checkpoint_interval - 1, len(decoder.layers) - 1, config.checkpoint_interval))
    if not layers:
        raise ConfigError(
            f"checkpoint_interval={config.checkpoint_interval} leaves no checkpoint in a model of "
            f"{len(decoder.layers)} layers: choose a smaller one."
        )
    texts = calibration_texts(source, config.calibration_samples)
    bar = tqdm(texts, "calibrate", total=config.calibration_samples, unit="text", disable=not progress)
    states = _collect(decoder, tokenizer, layers, bar, max_length, batch_size, config.exit_strategy != "identity", seed)
    bank = _fit(decoder, layers, states, config, seed, progress)
    bank.fingerprint = fingerprint(model.parameters())
    bank.metadata |= {
        "config": config.to_dict(),
        "data": source if isinstance(source, str) else type(source).__name__,
        "texts": states.texts,
        "tokens": states.train.seen + states.held_out.seen,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }
    path = bank.save(save_path or router_cache() / f"{bank.fingerprint}.safetensors")
    attach(model, bank)
    log.info(
        "routers for %d checkpoints saved to %s\n%s",
        len(layers),
        path,
        tabulate(bank.metadata["table"], "keys"),
    )
    return bank


@dataclass(slots=True)
class _States:
    """What one pass over the texts leaves behind; ``grams`` is empty for identity exits."""

    grams: list[Gram]
    train: Reservoir
    held_out: Reservoir
    texts: int = 0


@torch.no_grad()
def _collect(
    decoder: Decoder,
    tokenizer: object,
    layers: tuple[int, ...],
    texts: Iterable[str],
    max_length: int,
    batch_size: int,
    affine: bool,
    seed: int,
) -> _States:
    device, dtype = decoder.device, decoder.dtype
    wanted = (*layers, len(decoder.layers) - 1)
    per_token = len(wanted) * decoder.hidden_dim * dtype.itemsize
    capacity = max(256, min(_TOKENS, int(_BYTES / 1.25 / per_token)))
    generator = torch.Generator().manual_seed(seed)
    grams = [Gram(decoder.hidden_dim, device) for _ in layers] if affine else []
    train, held_out = (
        Reservoir(n, len(wanted), decoder.hidden_dim, dtype, generator) for n in (capacity, capacity // 4)
    )
    result = _States(grams, train, held_out)
    captured: dict[int, Tensor] = {}

    def capture(layer: int, entered: Tensor, state: Tensor) -> None:
        if layer in wanted:
            captured[layer] = state

    with decoder.on_layers(capture):
        for ids, mask in _batches(tokenizer, texts, max_length, batch_size):
            decoder.model.forward(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            states = torch.stack([captured[layer] for layer in wanted], 2)  # [B, S, C + 1, H]
            held = (torch.arange(result.texts, result.texts + len(ids)) + 1) % _HELD_OUT == 0
            result.texts += len(ids)
            fitting = states[(mask.bool() & ~held[:, None]).to(device)]  # [T, C + 1, H]
            for index, gram in enumerate(grams):
                gram.add(fitting[:, index], fitting[:, -1])
            train.add(fitting)
            held_out.add(states[(mask.bool() & held[:, None]).to(device)])
    if not len(held_out):
        raise CalibrationDataError(
            f"{result.texts} texts are too few: every fifth is held out to judge the routers, so give at least five."
        )
    return result


def _batches(
    tokenizer: object, texts: Iterable[str], max_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask [B, S], padded on the right so that positions need no correction."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, batch_size)):
        rows = [torch.tensor(r) for r in tokenizer(batch, truncation=True, max_length=max_length)["input_ids"] if r]
        if rows:
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
            yield nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def _fit(
    decoder: Decoder, layers: tuple[int, ...], states: _States, config: TIDEConfig, seed: int, progress: bool
) -> RouterBank:
    norm = decoder.final_norm()
    bank = RouterBank({}, norm, len(decoder.layers), metadata={"table": []})
    full = {part: _predictions(decoder, part.at(-1)) for part in (states.train, states.held_out)}
    for index, layer in enumerate(tqdm(layers, "fit", unit="checkpoint", disable=not progress)):
        if states.grams:
            bank.projections[layer] = fit_projection(
                states.grams[index], states.held_out.at(index), states.held_out.at(-1)
            )
        sets, agreement = [], {}
        for part in (states.train, states.held_out):
            projected = _project(part.at(index), bank.projections.get(layer))
            agreement[part] = (_predictions(decoder, projected) == full[part]).float()
            label = agreement[part] if config.calibration_label == "agreement" else _converged(part, index, config)
            sets.append((_normed(part.at(index), norm), label))
        router = bank.routers[layer] = train_router(*sets, config.router_bottleneck_dim, seed)
        bank.metadata["table"].append(
            _row(
                layer,
                router(sets[1][0]),
                sets[1][1],
                agreement[states.held_out],
                config.exit_threshold or DEFAULT_THRESHOLD,
            )
        )
    return bank


def _row(layer: int, score: Tensor, label: Tensor, agreement: Tensor, threshold: float) -> dict[str, float]:
    leave = score > threshold
    return {
        "layer": layer,
        "top-1 agreement": round(agreement.mean().item(), 3),
        "label rate": round(label.mean().item(), 3),
        f"exits at {threshold}": round(leave.float().mean().item(), 3),
        "their agreement": round(agreement[leave].mean().item(), 3) if leave.any() else None,
    }


def _predictions(decoder: Decoder, states: Tensor) -> Tensor:
    """The model's next token [T] for states [T, H] behind the last layer."""
    return torch.cat([decoder.logits(rows.to(decoder.device)).argmax(-1).cpu() for rows in states.split(_ROWS)])


def _project(states: Tensor, projection: tuple[Tensor, Tensor] | None) -> Tensor:
    return states if projection is None else nn.functional.linear(states.float(), *projection)


def _converged(part: Reservoir, index: int, config: TIDEConfig) -> Tensor:
    cosine = nn.functional.cosine_similarity(part.at(index).float(), part.at(-1).float(), dim=-1)
    return (cosine > config.convergence_threshold).float()


def _normed(states: Tensor, norm: Norm) -> Tensor:
    return normalise_reference(states, norm.weight, norm.bias, norm.eps, norm.layer_norm)
