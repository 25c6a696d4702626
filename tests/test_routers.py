"""Router files, and which routers a model gets."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import tide_compile
from tests.models import HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import NoRouterError, RouterFileError, RouterMismatchError
from tide_compile.files import router_cache
from tide_compile.fingerprint import fingerprint
from tide_compile.registry import find_bank
from tide_compile.routers import Norm


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
    header = {"format": "tide-routers-1", "num_layers": 4, "fingerprint": None, "norm": {"eps": 0, "layer_norm": False}}
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


def test_attachment_goes_with_the_model():
    model = tiny("rmsnorm-rope-gqa")
    tide_compile.attach(model, RouterBank.untrained(HIDDEN, LAYERS))
    assert find_bank(None, model.parameters())
    from tide_compile.registry import _attached

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
