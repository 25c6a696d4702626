"""table_quality: what exits do to the text: convergence per layer, exits of given text, generation.

Shapes: B batch, S sequence, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from bench.support.page import Table
from tide_compile import ExitStats, RouterBank, TIDEConfig, eager_reference
from tide_compile.errors import ConfigError
from tide_compile.model.decoder import Decoder, find_decoder
from tide_compile.text.sources import calibration_texts
from tide_compile.thresholds.agreement import Generation, measure_agreement

TEXTS = 20_000  # of a data set that has more
SAMPLE = 30  # tokens of a text that is shown
GRAM = 3  # tokens that are looked for again in the same text


def text_rows(tokenizer: object, data: str, count: int, length: int) -> list[list[int]]:
    """``count`` rows of ``length`` tokens of running text, evenly from all of the data, or as many as there are."""
    text = "\n\n".join(islice(calibration_texts(data, TEXTS), TEXTS))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _evenly([ids[i : i + length] for i in range(0, len(ids) - length + 1, length)], count, data)


def beginnings(tokenizer: object, data: str, count: int, length: int) -> list[list[int]]:
    """The first ``length`` tokens of ``count`` texts, evenly from all texts that are longer."""
    texts = list(islice(calibration_texts(data, TEXTS), TEXTS))
    rows = tokenizer(texts, truncation=True, max_length=length + 1)["input_ids"]
    return _evenly([row[:length] for row in rows if len(row) > length], count, data)


def _evenly(rows: list[list[int]], count: int, data: str) -> list[list[int]]:
    if not rows:
        raise ConfigError(f"{data!r} has no text of that length: choose a shorter one.")
    return rows[:: max(1, len(rows) // count)][:count]


def at_threshold(bank: RouterBank, threshold: float | None) -> RouterBank:
    """Every router of the bank is a checkpoint, with this threshold; None: the bank with its own. For a config without
    ``exit_threshold``."""
    return bank if threshold is None else replace(bank, thresholds=dict.fromkeys(bank.layers, threshold))


@torch.no_grad()
def convergence(model: nn.Module, rows: Sequence[Sequence[int]], threshold: float) -> Table:
    """Per layer, what the reference's label and ours say of the tokens of ``rows``."""
    decoder = find_decoder(model)
    sums = torch.zeros(len(decoder.layers), 3, dtype=torch.float64)  # above the threshold, same token, cosine
    for row in rows:
        states = _states(decoder, row)
        wanted = decoder.logits(states[-1]).argmax(-1)
        for layer, state in enumerate(states):
            cosine = nn.functional.cosine_similarity(state.float(), states[-1].float(), dim=-1)
            same = wanted if layer == len(states) - 1 else decoder.logits(state).argmax(-1)
            sums[layer] += torch.stack([(cosine > threshold).sum(), (same == wanted).sum(), cosine.sum()]).cpu()
    means = (sums / sum(map(len, rows))).tolist()
    return Table(
        "Convergence per layer",
        f"Share of tokens whose state behind a layer (counted from 0) has a cosine above {threshold} with the state "
        "behind the last one (the reference's label), and share whose next token, by the model's final norm and head "
        "without a learned map, is the one that the full model chooses (what routers learn here).",
        f"{_size(rows)}.",
        ["layer", f"cosine above {threshold}", "mean cosine", "same next token"],
        [[str(i), _percent(above), f"{cosine:.2f}", _percent(same)] for i, (above, same, cosine) in enumerate(means)],
    )


def _states(decoder: Decoder, row: Sequence[int]) -> list[Tensor]:
    """Behind every layer, [S, H]."""
    states: list[Tensor] = []
    with decoder.on_layers(lambda _, entered, left: states.append(left[0])):
        decoder.model.forward(input_ids=torch.tensor([row], device=decoder.device), use_cache=False)
    return states


@torch.no_grad()
def exits(
    model: nn.Module, bank: RouterBank, rows: Sequence[Sequence[int]], thresholds: Sequence[float | None]
) -> Table:
    """Per threshold, who leaves in text that is given, and what they say, by the eager reference."""
    decoder = find_decoder(model)
    full = torch.stack([_choices(decoder, row) for row in rows])
    cells = []
    for threshold in thresholds:
        with eager_reference(model, at_threshold(bank, threshold), TIDEConfig(), decoder) as reference:
            same = torch.stack([_choices(decoder, row) for row in rows]) == full
        layers, stats = torch.cat(reference.exit_layers).cpu(), ExitStats()
        stats.add_layers(len(decoder.layers), layers.flatten())
        left = layers < len(decoder.layers) - 1
        cells.append(
            [
                _name(threshold),
                _percent(stats.exit_rate),
                _percent(stats.layers_saved),
                _where(stats),
                _percent(same[left].double().mean().item()) if left.any() else "",
                _percent(same.double().mean().item()),
            ]
        )
    return Table(
        "Prefill exit rates",
        "The model reads given text. A token agrees if its next token is the one that the model without exits chooses "
        "behind the same text; skipped layers get keys and values of the frozen state, led on by shortcuts if the "
        "routers have some.",
        f"{_size(rows)}.",
        ["threshold", "leave early", "layers saved", "after layer", "agree, of those that leave", "agree, of all"],
        cells,
    )


def _choices(decoder: Decoder, row: Sequence[int]) -> Tensor:
    """The next token behind each, [S]."""
    ids = torch.tensor([row], device=decoder.device)
    return decoder.model.forward(input_ids=ids, use_cache=False).logits[0].argmax(-1).cpu()


def quality(
    model: nn.Module,
    tokenizer: object,
    bank: RouterBank,
    prompts: Sequence[Sequence[int]],
    thresholds: Sequence[float | None],
    new_tokens: int,
) -> Table:
    """Per threshold, what the model writes greedily after ``prompts``."""
    cells, texts = [], []
    for threshold in thresholds:
        chosen = at_threshold(bank, threshold)
        outcome = measure_agreement(model, chosen, TIDEConfig(), prompts, max_new_tokens=new_tokens)
        stats, written = outcome.stats, outcome.generations
        whole = sum(bool(g.agrees.all()) for g in written)
        cells.append(
            [
                _name(threshold),
                _percent(stats.exit_rate),
                _percent(stats.layers_saved),
                _where(stats),
                _percent(1 - outcome.disagreement),
                f"{whole} of {len(written)}",
                _percent(sum(map(distinct, written)) / len(written)),
            ]
        )
        sample = tokenizer.decode(written[0].tokens[:SAMPLE], skip_special_tokens=True)
        texts.append(f"* {_name(threshold)}: {' '.join(sample.split())}")
    opening = " ".join(tokenizer.decode(prompts[0], skip_special_tokens=True).split())
    return Table(
        "Generation quality",
        f"Greedy, up to {new_tokens} tokens after each prompt. A token agrees if the model without exits chooses it "
        "after the same prefix (mean over prompts); a text is the same if all of its tokens agree, for then the full "
        f"model writes it, too. Distinct: different sequences of {GRAM} tokens among all of a text; the lower, the "
        "more it repeats itself.",
        f"{len(prompts)} prompts, the first {len(prompts[0])} tokens of texts.",
        ["threshold", "leave early", "layers saved", "after layer", "tokens agree", "same texts", "distinct"],
        cells,
        f"What follows the first prompt (`{opening}`), {SAMPLE} tokens of it:\n\n" + "\n".join(texts),
    )


def distinct(generation: Generation) -> float:
    """Different sequences of ``GRAM`` tokens among all of a text, 0..1; 1 for a text that is too short to have any."""
    tokens = generation.tokens.tolist()
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _where(stats: ExitStats) -> str:
    total = stats.total_tokens
    return ", ".join(f"{layer}: {n / total:.1%}" for layer, n in sorted(stats.exits_per_layer.items()))


def _name(threshold: float | None) -> str:
    return "the routers' own" if threshold is None else "1 (off)" if threshold == 1 else f"{threshold:g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _size(rows: Sequence[Sequence[int]]) -> str:
    return f"{sum(map(len, rows)):,} tokens in rows of {len(rows[0])}"
