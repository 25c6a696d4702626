"""Many short requests from many threads, some of which end in errors: all others get their text, and nothing grows."""

import gc
import random
import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tests.support.models import FEW, HIDDEN, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference

THREADS = 8
KINDS = 6  # of requests


class Thrown(Exception):
    """By a callback."""


class Failing(LogitsProcessor, BaseStreamer):
    """Ends a request at its n-th token: as a processor, or as a streamer."""

    def __init__(self, after):
        self.left = after

    def _count(self):
        self.left -= 1
        if self.left < 0:
            raise Thrown

    def __call__(self, input_ids, scores):
        self._count()
        return scores

    def put(self, value):
        self._count()

    def end(self):
        pass


def arguments(kind):
    """Every kind has a number of rows, a length and a way to choose tokens of its own."""
    ids, mask = prompt(1 + kind % 3, length=4 + kind)
    chosen = {"max_new_tokens": 3 + kind, "pad_token_id": 0, "eos_token_id": list(range(1, 20 * (kind % 3) + 2))}
    return {"inputs": ids, "attention_mask": mask, "do_sample": False, "num_beams": 1 + (kind == 4), **chosen}


def held():
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("requests", [160, pytest.param(2000, marks=pytest.mark.slow)])
def test_soak(requests):
    """Catches a hang, a text that is another request's, what an error leaves behind, and memory that grows."""
    model, bank = tiny("rmsnorm-rope-gqa", layers=FEW), RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)
    config = TIDEConfig(exit_threshold=0.5, min_layers=1, checkpoint_interval=1, lowering="eager")
    with eager_reference(model, bank, config):
        want = [model.generate(**arguments(kind), cache_implementation="static") for kind in range(KINDS)]
    engine = TIDE(model, bank, config)
    for kind in range(KINDS):  # traced once, not in eight threads at once
        engine.generate(**arguments(kind))
    wrong, thrown, done = [], [], []

    def ask(seed):
        dice = random.Random(seed)
        for _ in range(requests // THREADS):
            kind, fate = dice.randrange(KINDS), dice.random()
            extra = {}
            if fate < 0.15:
                extra = {"logits_processor": LogitsProcessorList([Failing(dice.randrange(4))])}
            elif fate < 0.25 and arguments(kind)["num_beams"] == 1 and len(want[kind]) == 1:
                extra = {"streamer": Failing(dice.randrange(3))}
            try:
                text = engine.generate(**arguments(kind), **extra)
            except Thrown:
                thrown.append(kind)
            except Exception as error:
                wrong.append(error)
            else:
                done.append(kind)
                if not torch.equal(text, want[kind]):
                    wrong.append(kind)

    def all_ask(first):
        threads = [threading.Thread(target=ask, args=(first + n,), daemon=True) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=600)
        assert not any(thread.is_alive() for thread in threads), "hangs"

    all_ask(0)
    before = held()
    all_ask(100)
    assert not wrong and thrown and len(done) + len(thrown) == 2 * (requests // THREADS) * THREADS
    assert held() <= before + THREADS
