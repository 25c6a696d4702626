"""Temporaries that compiled code keeps between its calls."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch._inductor.codecache import PyCodeCache
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.lowering.buffer_reuse import _Kept, reuse_buffers
from tide_compile.lowering.compile_piece import compile_graph


def compiled(f, *examples):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in examples]
    graph = make_fx(f)(*fakes)
    run = compile_graph(graph, fakes)
    return run, PyCodeCache.modules[-1]


def layer(x, weight):
    """Sums that are temporaries, one of them seen again as a view; outputs of their own memory and of a part of it."""
    middle = torch.softmax(x @ weight, -1)
    parts = torch.cat([middle, middle.flip(-1)], 1)
    return parts, parts[:, :8], (middle @ weight).sum(-1)


WEIGHT = torch.arange(256.0).view(16, 16) / 100


def test_results_are_not_written_again():
    """A temporary that is returned, also as a view, must be new in each call."""
    run, _ = compiled(layer, torch.ones(4, 16), WEIGHT)
    inputs = [torch.randn(4, 16) for _ in range(3)]
    results = [run(x, WEIGHT) for x in inputs]
    for x, found in zip(inputs, results, strict=True):
        torch.testing.assert_close(list(found), list(layer(x, WEIGHT)))


def test_only_results_are_allocated(monkeypatch):
    run, module = compiled(layer, torch.ones(4, 16), WEIGHT)
    run(torch.ones(4, 16), WEIGHT)
    made, allocate = [], module.empty_strided_cpu
    monkeypatch.setattr(module, "empty_strided_cpu", lambda *a: made.append(a[0]) or allocate(*a))
    run(torch.ones(4, 16), WEIGHT)
    assert sorted(made) == [(4, 1), (4, 32)]


def test_threads_have_their_own():
    """Two threads run the same code: with shared temporaries one would read what the other has written."""
    run, _ = compiled(layer, torch.ones(4, 16), WEIGHT)

    def often(value):
        x = torch.full((4, 16), value)
        return all(torch.allclose(run(x, WEIGHT)[2], layer(x, WEIGHT)[2]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, [0.1, 0.2, 0.3, 0.4]))


def test_made_in_inference_mode():
    """What is made there as it comes cannot be written outside of it, and products are written in place."""
    run, _ = compiled(layer, torch.ones(4, 16), WEIGHT)
    with torch.inference_mode():
        run(torch.ones(4, 16), WEIGHT)
        assert not _Kept(lambda: (torch.ones(1),)).buffers[0].is_inference()
    x = torch.randn(4, 16)
    torch.testing.assert_close(list(run(x, WEIGHT)), list(layer(x, WEIGHT)))


def test_large_ones_are_not_kept(monkeypatch):
    run, module = compiled(lambda x: (torch.softmax(x * 2, 0).sum(1),), torch.ones(400, 64))
    run(torch.ones(400, 64))
    made, allocate = [], module.empty_strided_cpu
    monkeypatch.setattr(module, "empty_strided_cpu", lambda *a: made.append(a[0]) or allocate(*a))
    run(torch.ones(400, 64))
    assert (400, 64) in made


CODE = """
import torch
def empty_strided_cpu(shape, stride, dtype):
    return torch.empty_strided(shape, stride, dtype=dtype)
def reinterpret_tensor(x, shape, stride, offset):
    return x.as_strided(shape, stride, offset)
def call(args):
    x, = args
    args.clear()
    buf0 = empty_strided_cpu((8, ), (1, ), torch.float32)
    torch.add(x, 1, out=buf0)
    buf1 = buf0; del buf0  # reuse
    buf2 = reinterpret_tensor(buf1, (4, ), (1, ), 4)  # alias
    buf3 = empty_strided_cpu((4, ), (1, ), torch.float32)
    buf4 = buf3; del buf3  # reuse
    torch.mul(buf2, 2, out=buf4)
    buf5 = empty_strided_cpu((8, ), (1, ), torch.float32)
    torch.add(x, 2, out=buf5)
    buf6 = buf5.view(2, 4)
    return (buf4, buf6, )
"""


def test_other_names(tmp_path):
    """Memory that is used again gets another name, of which there are views. Catches names without a value, and results
    that are kept under their first name, or though another function may have made a view of them."""
    module = ModuleType("code")
    module.__file__ = str(tmp_path / "code.py")
    Path(module.__file__).write_text(CODE)
    exec(CODE, vars(module))
    kept = reuse_buffers(module)
    first = kept.call([torch.zeros(8)])
    kept.call([torch.ones(8)])
    assert kept.call is not module.call
    assert first[0].tolist() == [2.0] * 4 and first[1].tolist() == [[2.0] * 4] * 2
