"""Certificates of thresholds, and the measurements that they rest on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tide_compile
from tests.support.models import HIDDEN, LAYERS, SETTINGS, prompt
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.model.decoder import find_decoder
from tide_compile.text.corpus import Row
from tide_compile.thresholds.agreement import measure_agreement
from tide_compile.thresholds.certify import certify
from tide_compile.thresholds.price import prices_for, simulate_exits, thresholds_at
from tide_compile.thresholds.risk_control import certify_in_sequence, largest_loss, p_value, prompts_needed
from tide_compile.thresholds.sweep import sweep_prices

PROMPTS = prompt(8, padding=0)[0].tolist()


@pytest.mark.parametrize(("bound", "prompts"), [(0.1, 100), (0.02, 300)])
@pytest.mark.parametrize("most", [1.0, 0.5, 0.2])
def test_p_values_are_valid(bound, prompts, most):
    """At the bound itself a true hypothesis is rejected no more often than promised, whether prompts lose all or
    nothing, or less. Catches one that is too bold."""
    losses = torch.rand(2000, prompts, generator=torch.Generator().manual_seed(0))
    losses = most * (losses < bound / most).float()
    wrong = sum(p_value(row, bound) <= 0.05 for row in losses.tolist())
    assert wrong / 2000 <= 0.05


def test_p_values_reward_losses_that_are_alike():
    assert p_value([0.2] * 100, 0.1) == 1 and p_value([0.0] * 500, 0.02) < 1e-4
    most = largest_loss(500, 0.02, 0.95)
    assert p_value([most] * 500, 0.02) == pytest.approx(0.05) and 0.01 < most < 0.015
    assert p_value([*[0.0] * 494, *[1.0] * 6], 0.02) > 0.05  # the same mean


@pytest.mark.parametrize(("bound", "confidence", "needed"), [(0.02, 0.95, 183), (0.05, 0.9, 59)])
def test_how_many_prompts(bound, confidence, needed):
    assert prompts_needed(bound, confidence) == needed
    assert p_value([0.0] * needed, bound) <= 1 - confidence < p_value([0.0] * (needed - 1), bound)
    with pytest.raises(ConfigError, match=f"{needed} are needed"):
        certify_in_sequence([{1: 0.5}], lambda _: ([0.0], 0.1), needed - 1, bound, confidence)


def test_sequence_stops_at_the_first_that_fails():
    """Catches one that goes on and picks a later, luckier candidate."""
    losses = iter([[loss] * 500 for loss in (0.001, 0.06, 0.0)])
    trials = certify_in_sequence([{1: t} for t in (0.9, 0.8, 0.7)], lambda _: (next(losses), 0.1), 500, 0.05, 0.95)
    assert [t.certified for t in trials] == [True, False]


def test_tokens_leave_at_the_first_checkpoint_they_may():
    """Two checkpoints of four layers. Catches a token counted at a checkpoint after the one it left at."""
    scores = torch.tensor([[0.999, 0.999], [0.2, 0.999], [0.2, 0.2], [0.999, 0.2]])
    correct = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert simulate_exits(scores, correct, {0: 0.9, 1: 0.9}) == (0.25, {0: 0.5, 1: 0.25})
    assert thresholds_at(0.4, (0, 1), 4) == {0: pytest.approx(0.7), 1: pytest.approx(0.8)}
    table = [{"price": p, "disagreement": d} for p, d in ((0.1, 0.01), (0.2, 0.02), (0.3, 0.015), (0.4, 0.04))]
    assert prices_for(table, (0.005, 0.015, 0.03, 0.5)) == pytest.approx([0.1, 0.15, 0.35, 0.4])


def test_screen_reads_texts_with_exits(model, bank):
    """What was written only, without padding. Catches tokens of the prompt, and exits that leave nothing behind."""
    rows = [Row([*range(3, 12)], 4, True), Row([*range(20, 26)], 2, True), Row([*range(40, 60)], 0, True)]
    table = sweep_prices(find_decoder(model), bank, TIDEConfig(kv_cache_strategy="propagate"), rows)
    assert [r["price"] for r in table] == sorted(r["price"] for r in table) and table[0]["layers saved"] == 0
    for row in (table[0], table[-1]):
        chosen = replace(bank, thresholds=thresholds_at(row["price"], bank.layers, LAYERS))
        wrong, saved = 0, 0
        for one in rows[:2]:
            ids = torch.tensor([one.ids])
            with torch.no_grad():
                wanted = model(ids).logits.argmax(-1)
                with tide_compile.eager_reference(model, chosen, TIDEConfig()) as reference:
                    ours = model(ids).logits.argmax(-1)
            wrong += int((ours != wanted)[0, one.start :].sum())
            saved += int((LAYERS - 1 - reference.exit_layers[0])[0, one.start :].sum())
        assert row["disagreement"] == pytest.approx(wrong / 9, abs=1e-5)
        assert row["layers saved"] == pytest.approx(saved / 9 / LAYERS, abs=1e-5)
    assert table[-1]["layers saved"] > 0


def test_agreement_of_a_model_with_itself(model, bank):
    outcome = measure_agreement(model, bank, TIDEConfig(exit_threshold=1.0), PROMPTS, max_new_tokens=5)
    assert outcome.disagreement == 0 and outcome.layers_saved == 0 and len(outcome.generations) == 8


def test_agreement_is_counted_as_the_engine_writes(model, bank):
    """Exits of generated tokens are the engine's, and agreement is with the uncompiled model after the same prefix.
    Catches an offset by one token, and prompts that are counted."""
    config = TIDEConfig(exit_threshold=0.5, **SETTINGS)
    one = PROMPTS[:1]
    outcome = measure_agreement(model, bank, config, one, max_new_tokens=6)
    text = tide_compile.TIDE(model, bank, config).generate(torch.tensor(one), max_new_tokens=6, do_sample=False)
    (generation,) = outcome.generations
    assert generation.tokens.tolist() == text[0, len(one[0]) :].tolist()
    with torch.no_grad():
        wanted = model(text).logits[0, len(one[0]) - 1 : -1].argmax(-1)
    assert generation.agrees.tolist() == (wanted == generation.tokens).tolist()
    assert 0 < outcome.layers_saved < 1


def test_a_pilot_tells_how_far_the_screen_is_off(model, bank, monkeypatch):
    """Exits after the first layers do ten times the harm expected, those after the last ones three times. Catches
    candidates that are not made more careful, harmful checkpoints that are kept, and prompts that choose and test."""
    bank.metadata["screen"] = [{"price": p, "disagreement": p / 10, "layers saved": p} for p in (0.0, 1.0)]
    last, harmless, seen = bank.layers[-1], bank.layers[-2:], []

    def measured(model, trial, config, prompts, **_):
        price = (1 - trial.thresholds[last]) * LAYERS / (LAYERS - 1 - last)
        lost = SimpleNamespace(disagreement=(3 if len(trial.thresholds) <= 2 else 10) * price / 10)
        seen.append([*prompts])
        saved = price * len(trial.thresholds)
        return SimpleNamespace(generations=[lost] * len(prompts), disagreement=lost.disagreement, layers_saved=saved)

    monkeypatch.setattr("tide_compile.thresholds.certify.measure_agreement", measured)
    found = certify(model, bank, [[i] for i in range(800)], 0.05, progress=False)
    pilots, tested = seen[: len(bank.layers)], seen[len(bank.layers) :]
    assert all(p == [[i] for i in range(0, 800, 8)] for p in pilots)
    assert all(t == [[i] for i in range(800) if i % 8] for t in tested)
    assert [*bank.thresholds] == harmless
    most = largest_loss(700, 0.05, 0.95)
    losses = [trial["disagreement"] for trial in found["trials"]]
    assert losses[:4] == pytest.approx([part * most for part in (0.3, 0.6, 0.85, 1)], abs=1e-5)
    assert found["measured"] >= losses[2] and found["trials"][-1]["p"] > 0.05  # the fourth may fail by rounding


def test_certificates(model, bank, tmp_path):
    """Certified thresholds are in the file and in use; where nothing can be certified, nobody leaves."""
    bank.metadata["screen"] = [{"price": p, "disagreement": p, "layers saved": 0.1} for p in (1e-4, 2.0)]
    options = {"prompts": PROMPTS * 20, "confidence": 0.9, "max_new_tokens": 4, "progress": False}
    found = certify(model, bank, max_disagreement=0.05, **options)
    again = RouterBank.load(bank.save(tmp_path / "r.safetensors"))
    assert again.metadata["certificate"] == found and found["measured"] == 0 and found["prompts"] == 140
    most = largest_loss(140, 0.05, 0.9)  # nothing disagrees: four times as bold as the screen would be
    assert again.thresholds == pytest.approx(thresholds_at(1.2 * most / 0.25, bank.layers, LAYERS), abs=1e-5)
    bank.metadata["screen"] = [{"price": 1e3, "disagreement": 0.0, "layers saved": 0.9}]
    assert certify(model, bank, max_disagreement=0.05, **options)["measured"] is None
    compiled = torch.compile(model, backend="tide", options={"router": bank, "lowering": "eager"})
    with torch.no_grad(), tide_compile.record_exits() as stats:
        compiled(prompt(1)[0])
    assert stats.total_exited == 0 and stats.remaining_tokens == 9
    with pytest.raises(ConfigError, match="calibrate again"):
        certify(model, RouterBank.untrained(HIDDEN, LAYERS), max_disagreement=0.05, **options)
