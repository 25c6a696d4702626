"""What leans on torch's insides can be switched off by name, and the tokens stay the same."""

import logging

import pytest
import torch
from torch._inductor.codecache import PyCodeCache

from tests.support.models import FEW, GENERATE, HIDDEN, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.generation import graph_replay, guard_skipping
from tide_compile.lowering import compile_piece, lower, prewarm, self_test
from tide_compile.torch_internals.switches import TRICKS, enabled

CONFIG = {"min_layers": 1, "checkpoint_interval": 1, "exit_threshold": 0.5}


def generated(**changes):
    model, bank = tiny("rmsnorm-rope-gqa", layers=FEW), RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)
    return TIDE(model, bank, TIDEConfig(**CONFIG | changes)).generate(prompt(1)[0], **GENERATE)


@pytest.fixture
def used(monkeypatch):
    """Tricks that are in use, as they happen."""
    found = set()

    def noted(owner, name, trick):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: found.add(trick) or original(*args, **kwargs))

    noted(graph_replay._ReplayPlan, "__call__", "graph_replay")
    noted(guard_skipping.GuardSkipping, "_find", "guard_skipping")
    noted(compile_piece, "reuse_buffers", "buffer_reuse")
    noted(lower, "compiling_together", "compile_together")
    noted(lower, "find_linears", "lower_linears")
    noted(lower, "LowerAttention", "lower_attention")
    return found


CPU = {"graph_replay", "guard_skipping", "buffer_reuse", "compile_together", "lower_linears", "lower_attention"}


def test_all_off(used):
    """The same tokens with and without. Catches a switch that is read and not heeded. Nobody leaves here: what runs
    then takes longer to compile and is tested by ``make test-off``."""
    want = generated(exit_threshold=0.999)
    assert used == CPU
    used.clear()
    torch._dynamo.reset()
    assert torch.equal(generated(exit_threshold=0.999, disable="all"), want)
    assert used == set()


@pytest.mark.slow
@pytest.mark.parametrize("trick", sorted(CPU))
def test_one_off(used, trick):
    """Catches a trick that another one needs."""
    generated(disable=[trick])
    expected = CPU - {trick} - ({"graph_replay"} if trick == "guard_skipping" else set())
    assert used == expected


def test_names(monkeypatch):
    """In options and in the environment; a name that is none is an error that lists them."""
    assert TIDEConfig(disable=["prewarm", "graph_replay"]).tricks == set(TRICKS) - {"prewarm", "graph_replay"}
    assert TIDEConfig(disable="all").tricks == set() and TIDEConfig().tricks == set(TRICKS)
    for wrong in ("graph_reply", ["prewarm", "graph_reply"]):
        with pytest.raises(ConfigError, match=r"'graph_reply'.*choose from all, guard_skipping"):
            TIDEConfig(disable=wrong)
    with pytest.raises(ConfigError, match="give names"):
        TIDEConfig(disable=5)
    monkeypatch.setenv("TIDE_DISABLE", "prewarm, buffer_reuse")
    assert enabled() == set(TRICKS) - {"prewarm", "buffer_reuse"}
    assert TIDEConfig(disable=("guard_skipping",)).tricks == enabled() - {"guard_skipping"}
    monkeypatch.setenv("TIDE_DISABLE", "everything")
    with pytest.raises(ConfigError, match="TIDE_DISABLE names 'everything'"):
        TIDEConfig()


def test_prewarming_can_be_left_out(monkeypatch):
    begun = []
    monkeypatch.setattr(prewarm, "_begun", lambda: begun.append(1))
    with prewarm.only_if(False):
        prewarm.begin()
    monkeypatch.setenv("TIDE_DISABLE", "prewarm")
    prewarm.begin()
    monkeypatch.delenv("TIDE_DISABLE")
    assert not begun
    prewarm.begin()
    assert begun


@pytest.fixture
def unchecked(monkeypatch):
    """A torch of a release that nobody has checked."""
    self_test.buffers_can_be_reused.cache_clear()
    monkeypatch.setattr(self_test, "warn_if_unchecked", lambda _: False)
    yield
    self_test.buffers_can_be_reused.cache_clear()


def test_rewriting_code_of_an_unchecked_torch(unchecked, monkeypatch, caplog):
    """It passes its self-test first, or stays off. Catches a rewriter that nobody has asked, and patches that stay."""
    before = vars(PyCodeCache)["load_by_key_path"]
    assert self_test.buffers_can_be_reused()
    for broken in (lambda module: 1 / 0, _returns_temporaries):
        self_test.buffers_can_be_reused.cache_clear()
        monkeypatch.setattr(self_test, "reuse_buffers", broken)
        with caplog.at_level(logging.WARNING, "tide_compile"):
            assert not self_test.buffers_can_be_reused()
        assert "buffer_reuse stays off" in caplog.text
    assert vars(PyCodeCache)["load_by_key_path"] is before


def test_the_self_test_is_asked_before_compilers_are_waited_for_together(unchecked, caplog):
    """Catches one that runs code which is still being compiled, and stays off for the rest of the process."""
    generated()
    assert self_test.buffers_can_be_reused() and "stays off" not in caplog.text


def _returns_temporaries(module):
    """What a rewriter would do that keeps results, too: the second call writes into those of the first."""
    kept, call = {}, module.call

    def calls(*args):
        results = call(*args)
        for i, result in enumerate(results):
            kept.setdefault(i, result).copy_(result)
        return tuple(kept.values())

    module.call = calls
    return module
