"""self_text: text that a model writes itself: what its exits will see, and no data is needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tide_compile.text.padding import left_padded
from tide_compile.text.written import write

QUESTION = 64  # tokens that a user's message sampled from the model has at most
_MARK = "\u241e"


@torch.no_grad()
def continue_prompts(
    model: nn.Module, prompts: list[list[int]], length: int, *, sample: bool, seed: int = 0
) -> list[list[int]]:
    """Let a model write up to ``length`` tokens after each prompt, greedily or by sampling from its own distribution.

    Args:
        model: uncompiled. prompts: token ids, not empty. seed: of sampling.

    Returns:
        Token ids of prompts with what follows, up to and with the end of the sequence.
    """
    ends = end_tokens(model)
    pad = int(ends[0]) if len(ends) else 0
    ids, mask = left_padded(prompts, pad, next(model.parameters()).device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = write(model, ids, mask, length, pad, sample=sample).cpu()
    new = text[:, ids.shape[1] :]
    return [[*p, *row[: written_length(row, ends)].tolist()] for p, row in zip(prompts, new, strict=True)]


def openings(model: nn.Module, tokenizer: object, count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` beginnings of up to ``length`` tokens, sampled from the start of a sequence."""
    known = (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id, 0)
    start = next(token for token in known if token is not None)
    return continue_prompts(model, [[start]] * count, length, sample=True, seed=seed)


def questions(model: nn.Module, tokenizer: object, count: int, seed: int) -> list[str]:
    """Messages of a user as the model imagines them: it goes on from the beginning of a user's turn.

    Xu et al. (2024), "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing".
    """
    turn = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False).split(_MARK)[0]
    ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
    written = continue_prompts(model, [ids] * count, QUESTION, sample=True, seed=seed)
    return [tokenizer.decode(row[len(ids) :], skip_special_tokens=True).strip() or "Hello." for row in written]


def end_tokens(model: nn.Module) -> Tensor:
    """Ids of the tokens that end a sequence, [E] int64."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long).view(-1)


def written_length(written: Tensor, ends: Tensor) -> int:
    """Tokens up to and with the first that ends the sequence."""
    ended = torch.isin(written, ends).nonzero()
    return int(ended[0]) + 1 if len(ended) else len(written)
