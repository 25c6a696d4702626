"""Shortcuts: fitted in closed form, refined by distillation, and made by calibration."""

import pytest
import torch

from tests.support.calibration import CONFIG, run, texts
from tests.support.models import HIDDEN, LAYERS, shortcuts, tiny
from tide_compile import RouterBank, TIDEConfig, eager_reference, synthetic_routers
from tide_compile.calibration.distil_shortcuts import distil_shortcuts, divergence_with_exits
from tide_compile.calibration.fit_maps import fit_shortcut
from tide_compile.errors import ConfigError
from tide_compile.model.decoder import find_decoder
from tide_compile.routers.settings import settings_of_bank
from tide_compile.text.corpus import Row


def test_a_low_rank_step_is_found():
    """Catches factors that are transposed, a bias that is off, and states without their step."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 24, generator=generator) * torch.logspace(-1, 1, 24) + 3
    step = torch.randn(24, 2, generator=generator) @ torch.randn(2, 24, generator=generator) / 8
    behind = states + states @ step.T + torch.arange(24.0)
    found = fit_shortcut(states, behind, rank=2, strength=1e-9)
    assert found.down.shape == (2, 24) and found.weight.shape == (24, 2)
    torch.testing.assert_close(found(states), behind, rtol=1e-3, atol=1e-2)
    cut = fit_shortcut(states, behind, rank=1, strength=1e-9)
    assert (found(states) - behind).norm() < (cut(states) - behind).norm() < (states - behind).norm()


def test_errors_count_relative_to_the_state():
    """A few states a thousand times larger, which all go another way, do not decide. Catches plain least squares."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1000, 8, generator=generator)
    states[:50] *= 1000
    behind = states * 1.5
    behind[:50] = states[:50] * 0.5
    found = fit_shortcut(states, behind, rank=8)
    error = (found(states[50:]) - behind[50:]).norm() / behind[50:].norm()
    assert error < 0.4  # plain least squares: 0.67


def test_refining_helps_the_tokens_that_stay():
    """On held-out rows. Catches a loss on tokens that have left, gradients for the model, a result that is worse."""
    model = tiny("rmsnorm-rope-gqa")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 120, (20, 24), generator=generator)
    bank = synthetic_routers(model, ids, {0: 0.5})
    bank.shortcuts = {n: s._replace(weight=s.weight * 0, bias=s.bias * 0) for n, s in shortcuts().items()}
    rows = [Row(row, 0, held_out=i % 5 == 4) for i, row in enumerate(ids.tolist())]
    decoder, held_out = find_decoder(model), [row.ids for row in rows if row.held_out]
    with torch.no_grad():
        before = divergence_with_exits(decoder, bank, bank.shortcuts, held_out, 0.5).item()
    found = distil_shortcuts(decoder, bank, rows, 40, seed=0)
    again = distil_shortcuts(decoder, bank, rows, 40, seed=0)
    with torch.no_grad():
        after = divergence_with_exits(decoder, bank, found, held_out, 0.5).item()
    assert 0 < after < before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(found[n].weight, again[n].weight) for n in found)
    assert distil_shortcuts(decoder, bank, rows, 0, seed=0) is bank.shortcuts


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [1, 2]),
        ({"min_layers": 2}, [2]),
        ({"kv_cache_strategy": "propagate"}, []),
        ({"exit_strategy": "identity"}, []),
    ],
)
def test_calibration_makes_them(changes, layers):
    """Behind the first checkpoint and before the last layer. Catches states of another layer in a fit."""
    model = tiny("rmsnorm-rope-gqa")
    config = TIDEConfig(**{**CONFIG.to_dict(), **changes})
    bank = run(model, texts(30), config=config)
    assert sorted(bank.shortcuts) == layers
    settings = settings_of_bank(bank, config, torch.device("cpu"), torch.float32)
    assert (
        settings.kv_cache_strategy == ("shortcut" if layers else "propagate") and sorted(settings.shortcuts) == layers
    )
    assert all(s.down.shape[1] == HIDDEN for s in bank.shortcuts.values()) and LAYERS == 4


def test_keeping_some_checkpoints():
    """Is the same as not using the others. Catches a shortcut that is dropped, and a certificate of others."""
    model = tiny("rmsnorm-rope-gqa")
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    curves = {"table": [{"layer": 0}, {"layer": 1}], "reliability": {"0": [], "1": [{}]}}
    bank.shortcuts, bank.metadata = shortcuts(), {"certificate": {}, "screen": [], **curves}
    kept = bank.keep([1])
    assert kept.layers == [1] and kept.metadata == {"table": [{"layer": 1}], "reliability": {"1": [{}]}}
    assert bank.layers == [*range(LAYERS - 1)]
    ids = torch.arange(3, 15)[None]
    found = []
    for one, thresholds in ((kept, {1: 0.5}), (bank, {n: 0.5 if n == 1 else 1.0 for n in bank.layers})):
        one.thresholds = thresholds
        with torch.no_grad(), eager_reference(model, one, TIDEConfig(exit_threshold=None)) as reference:
            found.append((model(ids, use_cache=False).logits, reference.exit_layers[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][1] == 1).any()
    with pytest.raises(ConfigError, match="no routers after layers"):
        bank.keep([1, 99])
