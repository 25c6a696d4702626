"""Router files: ours, and those of tide-inference."""

import json

import pytest
import torch
from safetensors.torch import save_file

import tide_compile
from tests.support.models import HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import RouterFileError
from tide_compile.model.norm import Norm


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
    with pytest.raises(RouterFileError, match="not a readable router file"):
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


def test_a_file_that_runs_code(tmp_path):
    """It is not run, and nobody is advised to. Catches torch's text, which names the unsafe way."""
    torch.save({"router_layers": print}, tmp_path / "router.pt")
    with pytest.raises(RouterFileError) as raised:
        RouterBank.load(tmp_path / "router.pt", model=tiny("rmsnorm-rope-gqa"))
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
