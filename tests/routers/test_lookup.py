"""Which routers a model gets."""

import pytest
import torch

import tide_compile
from tests.support.models import HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import NoRouterError, RouterMismatchError
from tide_compile.files import router_cache
from tide_compile.model.fingerprint import fingerprint
from tide_compile.model.norm import Norm
from tide_compile.routers.lookup import find_bank


def run(model, **options):
    compiled = torch.compile(model, backend="tide", options={"lowering": "eager", "min_layers": 1, **options})
    with torch.no_grad(), tide_compile.record_exits() as stats:
        compiled(prompt(2)[0], use_cache=False)
    return stats


def test_ways_to_find_routers(tmp_path):
    model = tiny("rmsnorm-rope-gqa")
    options = {"exit_threshold": 0.0, "checkpoint_interval": 2}
    with pytest.raises(NoRouterError, match=r"tide_compile\.calibrate"):
        run(model, **options)
    bank = RouterBank.untrained(HIDDEN, LAYERS)
    bank.fingerprint = fingerprint(model.parameters())
    path = bank.save(tmp_path / "r.safetensors")
    for router in (bank, path, str(path)):
        assert run(model, router=router, **options).exit_rate == 1
    bank.save(router_cache() / f"{bank.fingerprint}.safetensors")
    assert run(model, **options).exit_rate == 1
    other = tiny("rmsnorm-rope-gqa", seed=1)
    with pytest.raises(RouterMismatchError, match="calibrated for another model"):
        run(other, router=path, **options)
    with pytest.raises(NoRouterError):
        run(other, **options)
    tide_compile.attach(other, bank)
    assert run(other, **options).exit_rate == 1


def forced(depth, seed=0):
    """Routers that let every token leave after layer ``depth``: silu of something positive, times a large weight."""
    bank = RouterBank.untrained(HIDDEN, LAYERS, layers=[0, 1, 2], seed=seed)
    bank.norm = Norm(torch.zeros(HIDDEN), torch.ones(HIDDEN))
    for layer, router in bank.routers.items():
        router.down.weight.data.abs_()
        router.up.weight.data.fill_(50.0 if layer >= depth else -50.0)
    return bank


def test_new_routers_take_effect(tmp_path):
    """Equal options make Dynamo reuse the compiled code; it must not keep the routers of before."""
    model = tiny("rmsnorm-rope-gqa")
    options = {"exit_threshold": 0.5, "checkpoint_interval": 1}
    for depth in (2, 1):
        tide_compile.attach(model, forced(depth))
        assert run(model, **options).mean_depth == depth + 1
    for depth in (2, 0):
        path = forced(depth).save(tmp_path / "r.safetensors")
        assert run(model, router=str(path), **options).mean_depth == depth + 1
    path.unlink()
    assert run(model, router=str(path), **options).mean_depth == depth + 1  # compiled code does not need the file


def test_routers_of_another_kind_are_refused():
    """The norm's eps is compiled in: a model of the same shape with another one must not run with the first."""
    options = {"exit_threshold": 0.5, "checkpoint_interval": 1}
    models = [tiny("rmsnorm-rope-gqa"), tiny("rmsnorm-rope-gqa", seed=1)]
    for model, eps in zip(models, (1e-6, 1.0), strict=True):
        bank = forced(1)
        bank.norm.eps = eps
        tide_compile.attach(model, bank)
    assert run(models[0], **options).mean_depth == 2
    with pytest.raises(RouterMismatchError, match="another size or norm"):
        run(models[1], **options)


def test_shared_parameters():
    """Two models that share a tensor cannot both own it: which routers to use must be said."""
    first, second = tiny("rmsnorm-rope-gqa"), tiny("rmsnorm-rope-gqa", seed=1)
    second.model.embed_tokens.weight = first.model.embed_tokens.weight
    tide_compile.attach(first, forced(1))
    tide_compile.attach(second, forced(2))
    with pytest.raises(RouterMismatchError, match="2 router banks"):
        run(first, exit_threshold=0.5, checkpoint_interval=1)


def test_banks_that_do_not_fit():
    model = tiny("rmsnorm-rope-gqa")
    options = {"exit_threshold": 0.5, "checkpoint_interval": 1}
    cases = {
        "hidden size 32 and this model has 64": RouterBank.untrained(32, LAYERS),
        "a model of 9 layers": RouterBank.untrained(HIDDEN, 9),
        "holds no routers": RouterBank.untrained(HIDDEN, LAYERS, layers=[]),
        r"projections of layers \[1, 2\]": forced(0),
    }
    cases[r"projections of layers \[1, 2\]"].projections = {0: (torch.eye(HIDDEN), torch.zeros(HIDDEN))}
    for message, bank in cases.items():
        with pytest.raises(tide_compile.errors.TideError, match=message):
            run(model, router=bank, **options)


def test_attachment_goes_with_the_model():
    model = tiny("rmsnorm-rope-gqa")
    tide_compile.attach(model, RouterBank.untrained(HIDDEN, LAYERS))
    assert find_bank(None, model.parameters())
    from tide_compile.routers.lookup import _attached

    before = len(_attached)
    del model
    assert len(_attached) < before


def test_affine_asked_for_but_not_there():
    with pytest.raises(tide_compile.errors.ConfigError, match="exit_strategy='affine'"):
        run(tiny("rmsnorm-rope-gqa"), router=RouterBank.untrained(HIDDEN, LAYERS), exit_strategy="affine")
    assert TIDEConfig().exit_strategy == "auto"
