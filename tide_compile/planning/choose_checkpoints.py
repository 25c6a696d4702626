"""choose_checkpoints: which checkpoints and thresholds are worth measuring, from the scores of a model's own tokens.

All sets of checkpoints are swept; exits are turned into time with the costs of a token.

Shapes: T tokens, C checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tide_compile.config import TIDEConfig
from tide_compile.model.decoder import Decoder, find_decoder
from tide_compile.planning.token_costs import TokenCosts
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.networks import Projection
from tide_compile.text.self_text import continue_prompts
from tide_compile.text.written import preferred
from tide_compile.thresholds.price import simulate_exits, thresholds_at

LEVELS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)  # of disagreement, at first sight
_PRICES = torch.logspace(-2.5, 1, 36).tolist()
_SETS = 8  # checkpoints, up to which every set of them is looked at


@torch.no_grad()
def read_scores(
    model: nn.Module,
    bank: RouterBank,
    config: TIDEConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """What each router says of each token that the full model writes after ``prompts``, and whether leaving there would
    have been right.

    Returns:
        scores [T, C] fp32 and correct [T, C] bool, checkpoints in the order of ``bank.layers``.
    """
    decoder, parts, prompts = find_decoder(model), [], [list(prompt) for prompt in prompts]
    projections = {} if config.exit_strategy == "identity" else bank.projections
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = continue_prompts(model, batch, max_new_tokens, sample=False)
        parts += [_scores_of(decoder, bank, projections, *both) for both in zip(batch, texts, strict=True)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _scores_of(
    decoder: Decoder, bank: RouterBank, projections: Mapping[int, Projection], prompt: list[int], text: list[int]
) -> tuple[Tensor, Tensor]:
    """Of the T tokens of a text that follow its prompt, [T, C] both."""
    ids, states = torch.tensor(text, device=decoder.device), {}
    with decoder.on_layers(lambda layer, _, state: states.__setitem__(layer, state[0])):
        decoder.model.forward(input_ids=ids[None], use_cache=False)
    scores, correct = [], []
    for layer in bank.layers:
        state = states[layer][len(prompt) - 1 : -1]  # what each token is predicted from
        left = projections[layer](state.cpu()) if layer in projections else state
        scores.append(bank.routers[layer](bank.norm(state.float().cpu())))
        logits = decoder.logits(left.to(decoder.device))
        choice = preferred(decoder.model, ids, torch.ones_like(ids[: len(prompt)]), logits, len(logits), 0)
        correct.append((choice == ids[len(prompt) :]).cpu())
    return torch.stack(scores, 1), torch.stack(correct, 1)


def choose(
    scores: Tensor,
    correct: Tensor,
    layers: Sequence[int],
    num_layers: int,
    costs: TokenCosts,
    levels: Sequence[float] = LEVELS,
) -> list[dict[int, float]]:
    """Thresholds worth measuring: of all sets of checkpoints, the fastest at each level of disagreement. A checkpoint
    that costs more than it saves is in none of them.

    Args:
        scores, correct: [T, C]. levels: shares of tokens, 0..1.

    Returns:
        At most one for each level, none twice, none that is slower than the model without exits.
    """
    swept = []
    for chosen in checkpoint_sets(layers):
        columns = [list(layers).index(layer) for layer in chosen]
        for price in _PRICES:
            thresholds = thresholds_at(price, chosen, num_layers)
            wrong, exits = simulate_exits(scores[:, columns], correct[:, columns], thresholds)
            swept.append((costs.seconds(exits), wrong, thresholds))
    found = []
    for level in sorted(levels):
        seconds, _, thresholds = min((s for s in swept if s[1] <= level), key=lambda s: s[0], default=(math.inf, 0, {}))
        if seconds < costs.off and thresholds not in found:
            found.append(thresholds)
    return found


def checkpoint_sets(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """All sets of up to eight checkpoints; of more, those of every ``min_layers`` and every interval."""
    if len(layers) <= _SETS:
        sizes = range(1, len(layers) + 1)
        return [chosen for size in sizes for chosen in itertools.combinations(layers, size)]
    spaced = (tuple(layers[first::step]) for first in range(len(layers)) for step in range(1, len(layers) + 1))
    return list(dict.fromkeys(spaced))
