"""gather: one pass of the model over a corpus, shard by shard, resumable and shared out among processes.

Shapes: B batch, S sequence, T tokens, C layers, H hidden.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.calibration.statistics import Collected, Gram, Reservoir
from tide_compile.errors import CalibrationDataError
from tide_compile.files import write_tensors
from tide_compile.model.decoder import Decoder
from tide_compile.text.corpus import Corpus, Row

log = logging.getLogger("tide_compile")

_TOKENS = 20_480  # kept for training routers and projections, a quarter as many for judging them
_BYTES = 1 << 30  # and at most this much memory for both


@torch.no_grad()
def collect_states(
    decoder: Decoder,
    corpus: Corpus,
    layers: tuple[int, ...],
    limit: int,
    *,
    moments: tuple[int, ...],
    batch_size: int,
    partial: Path | None,
    signature: dict[str, object],
    progress: bool,
) -> Collected:
    """Run the model over up to ``limit`` rows of the corpus.

    Within ``torch.distributed`` each process takes every W-th shard, and all get the whole result.

    Args:
        layers: the C layers whose states are kept. moments: those of them that second moments are kept of.
        batch_size: rows at a time.
        partial: file that holds what is done so far, written after every shard; an interrupted run goes on from there
            if ``signature`` is the same.

    Raises:
        CalibrationDataError: the texts cannot be had, or are too few.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    collected = _empty(decoder, layers, moments)
    if partial is not None:
        partial = partial.with_name(f"{partial.name}.{rank}-of-{world}")
        _resume(collected, partial, signature)
    bar = tqdm(desc="calibrate", total=limit, initial=collected.rows, unit="row", disable=not progress or rank != 0)
    for number, shard in enumerate(corpus.shards(limit)):
        if number < collected.shards or number % world != rank:
            continue
        rows = shard()
        _run(decoder, layers, rows, batch_size, collected, torch.Generator().manual_seed(hash((corpus.seed, number))))
        collected.shards, collected.rows = number + 1, collected.rows + len(rows)
        bar.update(len(rows))
        if partial is not None:
            state = {"signature": signature, "shards": collected.shards, "rows": collected.rows}
            write_tensors(partial, collected.tensors(), {"tide": json.dumps(state)})
    bar.close()
    if world > 1:
        collected.merge_processes()
    if not len(collected.held_out) or not len(collected.train):
        raise CalibrationDataError(
            f"{collected.rows} texts are too few: every fifth is held out to judge the routers, so give at least five."
        )
    return collected


def forget(partial: Path | None) -> None:
    """Delete what ``collect_states`` has written, when its result is in safety."""
    if partial is not None:
        for path in partial.parent.glob(f"{partial.name}.*-of-*"):
            path.unlink(missing_ok=True)


def _empty(decoder: Decoder, layers: tuple[int, ...], moments: tuple[int, ...]) -> Collected:
    width, hidden, dtype = len(layers) + 1, decoder.hidden_dim, decoder.dtype
    capacity = max(256, min(_TOKENS, int(_BYTES / 1.25 / (width * hidden * dtype.itemsize))))
    grams = {layer: Gram(hidden, decoder.device) for layer in moments}
    return Collected(layers, grams, *(Reservoir(n, width, hidden, dtype) for n in (capacity, capacity // 4)))


def _resume(collected: Collected, partial: Path, signature: dict[str, object]) -> None:
    if not partial.is_file():
        return
    try:
        with safe_open(partial, "pt") as file:
            state = json.loads(file.metadata()["tide"])
            if state["signature"] != json.loads(json.dumps(signature)):
                log.warning("%s is of a calibration with other data or settings, and is started anew", partial)
                return
            collected.load({n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        log.warning("%s cannot be read (%s), so the calibration starts anew", partial, error)
        return
    collected.shards, collected.rows = state["shards"], state["rows"]
    log.info("going on after %d rows of an interrupted calibration", collected.rows)


def _run(
    decoder: Decoder, layers: tuple[int, ...], rows: list[Row], batch_size: int, into: Collected, dice: torch.Generator
) -> None:
    wanted, captured = (*layers, len(decoder.layers) - 1), {}

    def capture(layer: int, entered: Tensor, state: Tensor) -> None:
        if layer in wanted:
            captured[layer] = state

    with decoder.on_layers(capture):
        for ids, counted, held_out in _batches(rows, batch_size):
            mask = counted >= 0
            decoder.model.forward(
                input_ids=ids.to(decoder.device), attention_mask=mask.long().to(decoder.device), use_cache=False
            )
            states = torch.stack([captured[layer] for layer in wanted], 2)  # [B, S, C + 1, H]
            fitting = states[((counted > 0) & ~held_out[:, None]).to(decoder.device)]  # [T, C + 1, H]
            for layer, gram in into.grams.items():
                gram.add(fitting[:, layers.index(layer)], fitting[:, -1])
            into.train.add(fitting, dice)
            into.held_out.add(states[((counted > 0) & held_out[:, None]).to(decoder.device)], dice)


def _batches(rows: list[Row], batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids [B, S], what they are [B, S] (1: counted, 0: context, -1: padding), and which rows are held out [B].
    Padded on the right, so that positions need no correction; rows of about equal length together."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        kinds = [(torch.arange(len(row.ids)) >= row.start).long() for row in batch]
        yield (
            nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in batch], batch_first=True),
            nn.utils.rnn.pad_sequence(kinds, batch_first=True, padding_value=-1),
            torch.tensor([row.held_out for row in batch]),
        )
