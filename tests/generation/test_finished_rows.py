"""Sequences that have ended are padding, and nobody waits to hear of it."""

import pytest
import torch
from transformers import StoppingCriteria

from tests.support.host_reads import Waits
from tests.support.models import FEW, GENERATE, HIDDEN, LAYERS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.generation.finished_rows import FinishedRows


class _EndsAfter(StoppingCriteria):
    """Sequence i ends when it is ``lengths[i]`` tokens long."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("name", [pytest.param("rmsnorm-rope-gqa", marks=pytest.mark.slow), "sliding-window"])
def test_finished_sequences_do_not_count(name):
    """A sequence that has ended is padding: it neither holds the others at full depth nor changes their text."""
    model = tiny(name)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    chosen = {"exit_threshold": 0.0, "min_layers": 2, "checkpoint_interval": 1, "lowering": "eager"}
    engine = TIDE(model, bank, TIDEConfig(**chosen))
    ids, mask = prompt(3, 6)
    asked = {**GENERATE, "eos_token_id": 9_999, "max_new_tokens": 8, "attention_mask": mask}
    whole = engine.generate(ids, **asked)
    everything = engine.last_stats.total_tokens
    ended = engine.generate(ids, **asked, stopping_criteria=[_EndsAfter([8, 99, 99])])
    assert everything == mask.sum() + 3 * 7
    assert engine.last_stats.total_tokens == mask.sum() + 2 * 7 + 1  # the first sequence ran its first new token only
    assert torch.equal(ended[1:], whole[1:])
    again = engine.generate(ids, **asked)
    assert torch.equal(again, whole)


def test_finished_sequences_are_not_read():
    """``generate`` asks at every token which sequences have ended; the answer stays on the device."""
    rows, mask = FinishedRows(), torch.ones(3, 4, dtype=torch.long)

    def seen():
        return rows.hidden({"attention_mask": mask})["attention_mask"]

    with Waits() as waits:
        rows.note(torch.tensor([False, False, False]))
        untouched = seen()
        rows.note(torch.tensor([False, True, False]))
        hidden = seen()
        rows.note(torch.tensor([True, True, True]))
        everyone = seen()
    assert waits.found == []
    assert torch.equal(untouched, mask) and torch.equal(everyone, mask)
    assert hidden.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_forwards_of_callbacks(name):
    """They have another cache, or none. Catches rows of theirs that are hidden because others have ended."""
    rows, mask, cache = FinishedRows(), torch.ones(2, 4, dtype=torch.long), object()

    def last(**kwargs):
        return rows.hidden({"attention_mask": mask, **kwargs})["attention_mask"][:, -1].tolist()

    assert last(**{name: cache}) == [1, 1]
    rows.note(torch.tensor([False, True]))
    assert last(**{name: cache}) == [1, 0] and last() == last(**{name: object()}) == [1, 1]


def test_without_an_end_token_rows_go_on():
    """transformers gives tokens to rows that are done where nothing is an end token. Catches padding in their place."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    ids, mask = prompt(3, 6)
    asked = {**GENERATE, "eos_token_id": None, "attention_mask": mask, "stopping_criteria": [_EndsAfter([8, 99, 9])]}
    engine = TIDE(model, config=TIDEConfig(exit_threshold=1.0, lowering="eager"))
    assert torch.equal(engine.generate(ids, **asked), model.generate(ids, **asked))
