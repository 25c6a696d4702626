"""Thresholds per checkpoint, for one call, and the scores that they are compared with."""

import pytest
import torch

import tide_compile
import tide_compile.backend
from tests.support.models import HIDDEN, LAYERS, SETTINGS, prompt
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import CheckpointError, ConfigError
from tide_compile.routers.settings import settings_of_bank

IDS, MASK = prompt(2)
EAGER = {"lowering": "eager"}


def exits(model, bank, **options):
    compiled = torch.compile(model, backend="tide", options={"router": bank, **EAGER, **options})
    with torch.no_grad(), tide_compile.record_exits(per_token=True) as stats:
        compiled(IDS, attention_mask=MASK)
    return stats


@pytest.mark.parametrize(("thresholds", "layers"), [({1: 0.5, 2: 0.4}, {1, 2}), ({2: 0.0}, {2}), ({1: 1.0}, set())])
def test_a_bank_brings_its_own(model, bank, thresholds, layers, tmp_path):
    """Also from a file. Catches a threshold used at another checkpoint, and checkpoints that nobody chose."""
    bank.thresholds = thresholds
    again = RouterBank.load(bank.save(tmp_path / "r.safetensors"))
    assert again.thresholds == thresholds
    stats = exits(model, again)
    with torch.no_grad(), tide_compile.eager_reference(model, bank, TIDEConfig()) as reference:
        model(IDS, attention_mask=MASK)
    assert torch.equal(stats.exit_layers[0], reference.exit_layers[0])
    assert set(stats.exits_per_layer) == layers


def test_checkpoints_of_the_calibration():
    """Routers are used where they were calibrated. Catches one that is left out because nobody repeats the interval."""

    def places(**options):
        settings = settings_of_bank(bank, TIDEConfig(**options), torch.device("cpu"), torch.float32)
        assert set(settings.routers) == set(settings.checkpoints)
        return settings.checkpoints

    bank = RouterBank.untrained(HIDDEN, 13, bottleneck_dim=16)
    assert places() == (7, 11)
    bank.metadata["config"] = TIDEConfig(checkpoint_interval=2, min_layers=3).to_dict()
    assert places() == (3, 5, 7, 9, 11)
    assert places(checkpoint_interval=1) == tuple(range(2, 12))
    assert places(checkpoint_interval=1, min_layers=8) == tuple(range(7, 12))


def test_thresholds_behind_the_last_layer_are_for_nobody():
    """Nothing is left to skip there. Catches a checkpoint that the routers name and the model cannot have."""
    bank = RouterBank.untrained(HIDDEN, LAYERS)
    device = torch.device("cpu")
    bank.thresholds = {0: 0.5, LAYERS - 1: 0.5, LAYERS + 1: 0.5}
    assert settings_of_bank(bank, TIDEConfig(), device, torch.float32).checkpoints == (0,)
    bank.thresholds = {LAYERS - 1: 0.5}
    with pytest.raises(CheckpointError, match="exits are possible after layers 0 to"):
        settings_of_bank(bank, TIDEConfig(), device, torch.float32)


def test_a_threshold_that_is_given_wins(model, bank):
    bank.thresholds = {1: 0.0}
    assert exits(model, bank, exit_threshold=1.0).total_exited == 0
    assert set(exits(model, bank, **SETTINGS, exit_threshold=0.0).exits_per_layer) == {0}


def test_another_threshold_for_a_call(model, bank, monkeypatch):
    """Catches one that stays behind after the call, or compiles again."""
    compiled = torch.compile(model, backend="tide", options={"router": bank, "exit_threshold": 0.0, **SETTINGS})
    rates = []
    for override in (None, 1.0, 0.5, None):
        with torch.no_grad(), tide_compile.record_exits() as stats:
            if override is None:
                compiled(IDS)
            else:
                with tide_compile.exit_threshold(override):
                    compiled(IDS)
        rates.append(stats.exit_rate)
        monkeypatch.setattr("tide_compile.backend.run", lambda *_: pytest.fail("compiled again"))
    assert rates[0] == rates[3] == 1 and rates[1] == 0 and 0 < rates[2] < 1
    with pytest.raises(ConfigError, match="from 0 to 1"), tide_compile.exit_threshold(1.5):
        pass


def test_scores_are_recorded(model, bank):
    """Of the checkpoint a token left at, or of the last one. Catches a score of a layer that came later."""
    stats = exits(model, bank, **SETTINGS, exit_threshold=0.5)
    with torch.no_grad(), tide_compile.eager_reference(model, bank, TIDEConfig(**SETTINGS, exit_threshold=0.5)) as ref:
        model(IDS, attention_mask=MASK)
    layers, scores = stats.exit_layers[0], stats.scores[0]
    last = LAYERS - 2  # no checkpoint behind the last layer
    assert torch.isnan(scores[layers == -1]).all()
    for at, score in zip(layers[layers >= 0], scores[layers >= 0], strict=True):
        assert any(torch.isclose(score, s) for s in ref.scores[0][min(int(at), last)].flatten())
    assert (scores[(layers >= 0) & (layers <= last)] > 0.5).all()


def test_other_thresholds_by_layer(model, bank):
    """For one call. Catches thresholds that go to another checkpoint, and ones that stay."""
    ids = prompt(1)[0]
    options = {"router": bank, "exit_threshold": 0.0, **SETTINGS}
    compiled = torch.compile(model, backend="tide", options=options)
    for override, layer in (({2: 0.0}, 2), ({1: 0.0, 2: 0.0}, 1), ({}, None), (None, 0)):
        with torch.no_grad(), tide_compile.record_exits() as stats:
            if override is None:
                compiled(ids)
            else:
                with tide_compile.exit_threshold(override):
                    compiled(ids)
        assert set(stats.exits_per_layer) == ({layer} - {None})
    with pytest.raises(tide_compile.errors.ConfigError, match="from 0 to 1"), tide_compile.exit_threshold({1: 2}):
        pass
