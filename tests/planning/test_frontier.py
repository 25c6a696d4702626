"""Tuning: costs, candidates, what is measured, and the recommendation."""

import math

import pytest
import torch

import tide_compile.backend
from tests.support.models import HIDDEN, LAYERS, SETTINGS, prompt
from tide_compile import TIDEConfig
from tide_compile.planning.choose_checkpoints import checkpoint_sets, choose, read_scores
from tide_compile.planning.frontier import Point, find_frontier, measure_point, perplexity, recommend
from tide_compile.planning.token_costs import TokenCosts, measure_costs, time_decoding
from tide_compile.reference import eager_reference
from tide_compile.routers.networks import Projection

PROMPTS = prompt(8, padding=0)[0].tolist()
CONFIG = TIDEConfig(compaction="never", **SETTINGS)
COSTS = TokenCosts(off=4.0, checkpoint=0.1, leaving={0: 1.5, 1: 2.0, 2: 3.0})


def test_costs_add_up():
    """A token pays for the checkpoints it passes. Catches one that pays for those behind its exit, or for none."""
    assert COSTS.seconds({}) == 4
    assert COSTS.seconds({0: 0.0, 2: 0.0}) == pytest.approx(4.2)
    mixed = 0.25 * (1.5 + 0.1) + 0.5 * (3.0 + 0.2) + 0.25 * (4.0 + 0.2)
    assert COSTS.seconds({0: 0.25, 2: 0.5}) == pytest.approx(mixed)
    assert COSTS.speedup({0: 1.0}) == pytest.approx(4 / 1.6)


def test_costs_are_those_of_the_engine(model, bank, monkeypatch):
    """Each contender's tokens leave where its name says, under two compilations. Catches thresholds that are not those
    of the contender, and a first call that counts."""
    compiled, left = [], {}
    run = tide_compile.backend.run
    monkeypatch.setattr("tide_compile.backend.run", lambda *a: compiled.append(1) or run(*a))

    def time(contenders, ids, **kwargs):
        for name, (engine, threshold) in contenders.items():
            found = time_decoding({name: (engine, threshold)}, ids, rounds=1, tokens=3)
            assert len(found[name]) == 3
            left[name] = engine.last_stats
        return {"off": [4.0], "all": [4.6], **{n: [n + 1.0] for n in contenders if isinstance(n, int)}}

    monkeypatch.setattr("tide_compile.planning.token_costs.time_decoding", time)
    costs = measure_costs(model, bank, CONFIG, PROMPTS[0])
    for layer in bank.layers:
        assert left[layer].exit_rate == 1 and set(left[layer].exits_per_layer) == {layer}
    assert left["off"].exit_rate == left["all"].exit_rate == 0
    assert len(compiled) == 4  # a prompt and decoding, for two engines
    assert costs.off == 4 and costs.checkpoint == pytest.approx(0.2)
    assert costs.leaving == {layer: pytest.approx(layer + 1 - 0.2 * (layer + 1)) for layer in bank.layers}


def test_scores_are_those_of_the_reference(model, bank):
    """Of tokens that the full model writes. Catches an offset by one token, and labels of another projection."""
    torch.manual_seed(0)
    bank.projections = {n: Projection(torch.randn(HIDDEN, HIDDEN) / 8, torch.zeros(HIDDEN)) for n in bank.layers}
    scores, correct = read_scores(model, bank, TIDEConfig(), PROMPTS[:2], max_new_tokens=5)
    assert scores.shape == correct.shape == (10, len(bank.layers))
    text = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    for index, layer in enumerate(bank.layers):
        one = TIDEConfig(exit_threshold=0.0, min_layers=layer + 1, checkpoint_interval=layer + 1)
        with torch.no_grad(), eager_reference(model, bank, one) as reference:
            logits = model(text).logits[0, -6:-1]
        torch.testing.assert_close(reference.scores[0][layer][0, -6:-1], scores[:5, index])
        assert (logits.argmax(-1) == text[0, -5:]).tolist() == correct[:5, index].tolist()


def test_checkpoints_that_do_not_pay_are_dropped():
    """Layer 0 is right as often as layer 1 and costs less, layer 2 adds nothing. Catches a choice by layers saved."""
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(400, 1, generator=generator) < 0.5
    scores = torch.where(sure, 0.999, 0.001).expand(400, 3)
    found = choose(scores, sure.expand(400, 3), [0, 1, 2], LAYERS, COSTS, levels=(0.01, 0.02))
    assert [set(thresholds) for thresholds in found] == [{0}]
    dear = TokenCosts(off=4.0, checkpoint=3.0, leaving=COSTS.leaving)
    assert choose(scores, sure.expand(400, 3), [0, 1, 2], LAYERS, dear, levels=(0.01,)) == []


def test_sets_of_checkpoints():
    assert len(checkpoint_sets([3, 7, 11])) == 7
    many = checkpoint_sets(list(range(30)))
    assert tuple(range(5, 30)) in many and tuple(range(5, 30, 4)) in many and len(many) < 900


def test_a_point_is_measured_as_it_is_used(model, bank):
    thresholds = {1: 0.5}
    texts = [PROMPTS[0], PROMPTS[1][:5]]
    full = perplexity(model, texts)
    with torch.no_grad():
        losses = [model(torch.tensor([t]), labels=torch.tensor([t])).loss.item() * (len(t) - 1) for t in texts]
    assert full == pytest.approx(math.exp(sum(losses) / 12), rel=1e-4)
    point = measure_point(model, bank, thresholds, CONFIG, PROMPTS, costs=COSTS, texts=texts, full_perplexity=full,
                          max_new_tokens=5)  # fmt: skip
    assert set(point.exits) == {1} and 0 < point.exits[1] < 1
    assert point.layers_saved == pytest.approx(point.exits[1] * 2 / LAYERS)
    assert point.speedup == pytest.approx(COSTS.speedup(point.exits)) and point.perplexity != 1
    never = measure_point(model, bank, {1: 1.0}, CONFIG, PROMPTS, texts=texts, full_perplexity=full, max_new_tokens=3)
    assert (
        never.disagreement == never.layers_saved == 0 and never.perplexity == pytest.approx(1) and never.speedup is None
    )


def test_frontier(model, bank):
    """Catches prompts that both choose and measure: all are different, and half are measured."""
    seen = []
    measure = tide_compile.planning.frontier.measure_agreement

    def noted(model, bank, config, prompts, **kwargs):
        seen.append(prompts)
        return measure(model, bank, config, prompts, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tide_compile.planning.frontier.measure_agreement", noted)
        points = find_frontier(model, bank, CONFIG, PROMPTS, COSTS, levels=(0.5, 1.0), max_new_tokens=4, progress=False)
    assert points and all(prompts == PROMPTS[1::2] for prompts in seen)
    assert [p.disagreement for p in points] == sorted(p.disagreement for p in points)


def test_recommendation():
    points = [Point({1: 0.9}, d, 0.1, {1: 0.2}, s) for d, s in ((0.01, 1.02), (0.03, 1.2), (0.04, 1.1), (0.09, 1.5))]
    assert recommend(points, max_disagreement=0.05) is points[1]
    assert recommend(points, min_speedup=1.05) is points[1]
    assert recommend(points, max_disagreement=0.1, min_speedup=1.3) is points[3]
    assert recommend(points) is points[0]
    assert recommend(points, max_disagreement=0.001) is recommend(points, 0.02, 1.3) is None
