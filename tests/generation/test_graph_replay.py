"""A graph that runs alone, without the code around it."""

import pytest
import torch
from torch._dynamo import eval_frame
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.models import FEW, LONG, SETTINGS, prompt, tiny
from tide_compile import TIDE, TIDEConfig
from tide_compile.generation.graph_replay import GraphReplay

OFF = TIDEConfig(exit_threshold=1.0, **SETTINGS)


def test_graphs_run_alone(monkeypatch):
    """The code around the graph runs for two tokens, and at the end to see whether it finds the same weights."""
    around = []
    original = GraphReplay._run_graph
    monkeypatch.setattr(
        GraphReplay, "_run_graph", lambda self, *a: (around.append(self._looking), original(self, *a))[1]
    )
    engine = TIDE(tiny("rmsnorm-rope-gqa", layers=FEW), config=OFF)
    engine.generate(prompt(1)[0], **LONG)
    assert around == [False, False, True]


class Made(torch.nn.Module):
    """Returns what ``make`` makes of itself and a graph's result."""

    def __init__(self, make):
        super().__init__()
        self.weight, self.make, self.kept = torch.nn.Parameter(torch.ones(3)), make, []

    def forward(self, x):
        return self.make(self, x * self.weight)


def keeps(module, y):
    module.kept.append(y)
    return CausalLMOutputWithPast(logits=y)


def becomes(module, y):
    module.latest = y
    return CausalLMOutputWithPast(logits=y)


@pytest.mark.parametrize(
    ("make", "alone"),
    [
        pytest.param(lambda module, y: CausalLMOutputWithPast(logits=y), True, id="output"),
        pytest.param(lambda module, y: y, False, id="tensor"),
        pytest.param(lambda module, y: CausalLMOutputWithPast(logits=y, hidden_states=(y,)), False, id="tuple"),
        pytest.param(keeps, False, id="list"),
        pytest.param(becomes, False, id="attribute"),
    ],
)
@torch.no_grad()
def test_what_is_replayed(make, alone):
    """Code that does more than to return one output of the graph's own results runs as a whole."""
    model = Made(make)
    torch.compile(model, backend="eager", fullgraph=True)(torch.ones(3))
    function = type(model).forward
    (entry,) = eval_frame._get_cache_entries_for_region(function.__code__, -1)
    replay = GraphReplay(entry.code, function)
    for i in range(5):
        x = torch.full((3,), float(i))
        returned = replay(model, {"x": x})
        assert torch.equal(returned if isinstance(returned, torch.Tensor) else returned.logits, x)
        assert make is not keeps or torch.equal(model.kept[-1], x)
        assert make is not becomes or torch.equal(model.latest, x)
    assert (replay._plan is not None) == alone
    assert replay.is_valid(model, {"x": x})
    model.weight = torch.nn.Parameter(torch.zeros(3))
    assert replay.is_valid(model, {"x": x}) != alone
