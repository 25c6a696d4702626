"""Router files, and which routers a model gets."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import tide_compile
from tests.support.models import HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import NoRouterError, RouterFileError, RouterMismatchError
from tide_compile.files import router_cache
from tide_compile.model.fingerprint import fingerprint
from tide_compile.model.norm import Norm
from tide_compile.routers.lookup import find_bank


@pytest.fixture
def bank():
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    bank.projections = {1: (torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN))}
    bank.norm = Norm(torch.rand(HIDDEN), torch.rand(HIDDEN), 1e-5, True)
    bank.metadata = {"table": [{"layer": 1}]}
    return bank


def test_round_trip(bank, tmp_path):
    """Catches a part that is not written, or read back as something else."""
    again = RouterBank.load(bank.save(tmp_path / "deep" / "r.safetensors"))
    assert again.layers == bank.layers and again.num_layers == LAYERS
    assert again.norm.eps == 1e-5 and again.norm.layer_norm and torch.equal(again.norm.bias, bank.norm.bias)
    assert torch.equal(again.routers[1].down.weight, bank.routers[1].down.weight)
    assert torch.equal(again.projections[1][0], bank.projections[1][0])
    assert again.metadata == bank.metadata


def test_interrupted_save_keeps_the_old_file(bank, tmp_path, monkeypatch):
    path = bank.save(tmp_path / "r.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        RouterBank.untrained(HIDDEN, LAYERS, seed=1).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


def test_bad_files(bank, tmp_path):
    path = bank.save(tmp_path / "r.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RouterFileError, match="not a readable router file"):
        RouterBank.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(RouterFileError, match="not a router file of format"):
        RouterBank.load(path)
    header = {"format": "tide-routers-2", "num_layers": 4, "fingerprint": None, "norm": {"eps": 0, "layer_norm": False}}
    save_file({"router.1.down.weight": torch.ones(2, 2)}, path, {"tide": json.dumps(header)})
    with pytest.raises(RouterFileError, match="lacks a part"):
        RouterBank.load(path)
    with pytest.raises(RouterFileError, match="no router file at"):
        RouterBank.load(tmp_path / "none.safetensors")


def reference_file(path, hidden_dim=HIDDEN):
    """A router.pt as tide-inference 0.2.1 writes it."""
    weights = {"down.weight": torch.randn(16, hidden_dim), "up.weight": torch.randn(1, 16)}
    torch.save({"hidden_dim": hidden_dim, "bottleneck_dim": 16, "router_layers": {1: weights}}, path)
    return path, weights


def test_reference_file(tmp_path):
    """The reference's scores are of its routers on the model's own final norm."""
    model = tiny("layernorm-learned-positions")
    path, weights = reference_file(tmp_path / "router.pt")
    bank = RouterBank.load(path, model=model)
    assert torch.equal(bank.routers[1].down.weight, weights["down.weight"]) and bank.norm.layer_norm
    with pytest.raises(RouterFileError, match="model=model"):
        RouterBank.load(path)
    with pytest.raises(RouterFileError, match=f"hidden size 32, this one has {HIDDEN}"):
        RouterBank.load(reference_file(path, 32)[0], model=model)
    path.write_bytes(b"nonsense")
    with pytest.raises(RouterFileError, match="not a readable tide-inference"):
        RouterBank.load(path, model=model)


def test_engine_reads_a_reference_file(tmp_path):
    model = tiny("rmsnorm-rope-gqa")
    path, _ = reference_file(tmp_path / "router.pt")
    config = TIDEConfig(exit_threshold=0.0, min_layers=1, checkpoint_interval=2, lowering="eager")
    engine = tide_compile.TIDE(model, path, config)
    engine(prompt(2)[0])
    assert engine.last_stats.exits_per_layer == {1: 18}


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"router_layers": Evil()}, tmp_path / "router.pt")
    with pytest.raises(RouterFileError):
        RouterBank.load(tmp_path / "router.pt", model=tiny("rmsnorm-rope-gqa"))
    assert not (tmp_path / "owned").exists()


def test_fingerprint():
    """The same for another dtype, another for other weights; and the traced graph's equals the module's."""
    model = tiny("rmsnorm-rope-gqa")
    mark = fingerprint(model.parameters())
    assert fingerprint(reversed(list(model.parameters()))) == mark
    assert fingerprint(tiny("rmsnorm-rope-gqa", seed=1).parameters()) != mark
    assert fingerprint(model.bfloat16().parameters()) == mark


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


def test_scores_are_the_routers(tmp_path):
    """The op that compiled code and reference share computes sigmoid(up(silu(down(norm(h)))))."""
    model = tiny("layernorm-learned-positions")
    bank = RouterBank.load(reference_file(tmp_path / "router.pt")[0], model=model)
    h = torch.randn(2, 3, HIDDEN)
    norm, router = bank.norm, bank.routers[1]
    score, leave = torch.ops.tide.route(
        h, torch.ones(2, 3, dtype=torch.bool), norm.weight, norm.bias, router.down.weight, router.up.weight,
        torch.tensor(0.5), norm.eps, norm.layer_norm,
    )  # fmt: skip
    with torch.no_grad():
        want = router(model.transformer.ln_f(h))
    assert torch.allclose(score, want, atol=1e-4) and torch.equal(leave, score > 0.5)


def test_attachment_goes_with_the_model():
    model = tiny("rmsnorm-rope-gqa")
    tide_compile.attach(model, RouterBank.untrained(HIDDEN, LAYERS))
    assert find_bank(None, model.parameters())
    from tide_compile.routers.lookup import _attached

    before = len(_attached)
    del model
    assert len(_attached) < before


def test_entry_point_without_import():
    """Catches an entry point that is missing, or registered twice (duplicate name)."""
    code = "import torch; torch.compile(torch.nn.Linear(2, 2), backend='tide'); import tide_compile"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_affine_asked_for_but_not_there():
    with pytest.raises(tide_compile.errors.ConfigError, match="exit_strategy='affine'"):
        run(tiny("rmsnorm-rope-gqa"), router=RouterBank.untrained(HIDDEN, LAYERS), exit_strategy="affine")
    assert TIDEConfig().exit_strategy == "auto"
