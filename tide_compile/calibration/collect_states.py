"""collect_states: one pass of the model over a corpus, shard by shard, resumable and shared out among processes.

Shapes: B batch, S sequence, T tokens, C watched layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.calibration.partial_results import PartialResults
from tide_compile.calibration.processes import rank_and_world
from tide_compile.calibration.request import Request
from tide_compile.calibration.statistics import Collected, Gram, Reservoir
from tide_compile.errors import CalibrationDataError
from tide_compile.model.decoder import Decoder
from tide_compile.text.corpus import Row

TOKENS = 20_480  # kept for training routers and projections, a quarter as many for judging them
_BYTES = 1 << 30  # and at most this much memory for both


@torch.no_grad()
def collect_states(request: Request, batch_size: int, progress: bool) -> Collected:
    """Run the model over the texts of a calibration, ``batch_size`` rows at a time.

    Within ``torch.distributed`` each process takes every W-th shard, and all get the whole result. What is done so far
    is kept after every shard; an interrupted run goes on from there if its signature is the same.

    Raises:
        CalibrationDataError: the texts cannot be had, or are too few.
    """
    rank, world = rank_and_world()
    collected, partial = _empty(request), PartialResults.of(request.partial, request.signature(), rank, world)
    partial.resume(collected)
    bar = tqdm(
        desc="calibrate", total=request.limit, initial=collected.rows, unit="row", disable=not progress or rank != 0
    )
    for number, shard in enumerate(request.corpus.shards(request.limit)):
        if number < collected.shards or number % world != rank:
            continue
        rows = shard()
        dice = torch.Generator().manual_seed(hash((request.corpus.seed, number)))
        _take_in(rows, request.decoder, batch_size, collected, dice)
        collected.shards, collected.rows = number + 1, collected.rows + len(rows)
        bar.update(len(rows))
        partial.write(collected)
    bar.close()
    if world > 1:
        collected.merge_processes()
    if not len(collected.held_out) or not len(collected.train):
        raise CalibrationDataError(
            f"{collected.rows} texts are too few: every fifth is held out to judge the routers, so give at least five."
        )
    return collected


def _empty(request: Request) -> Collected:
    decoder, width = request.decoder, len(request.watched) + 1
    hidden, dtype = decoder.hidden_dim, decoder.dtype
    capacity = max(256, min(TOKENS, int(_BYTES / 1.25 / (width * hidden * dtype.itemsize))))
    moments = () if request.config.exit_strategy == "identity" else request.layers
    grams = {layer: Gram(hidden, decoder.device) for layer in moments}
    return Collected(request.watched, grams, *(Reservoir(n, width, hidden, dtype) for n in (capacity, capacity // 4)))


def _take_in(rows: list[Row], decoder: Decoder, batch_size: int, into: Collected, dice: torch.Generator) -> None:
    wanted, captured = (*into.layers, len(decoder.layers) - 1), {}

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
                gram.add(fitting[:, into.layers.index(layer)], fitting[:, -1])
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
