"""One host read per checkpoint: counted on the CPU, and run on meta tensors, which cannot be read at all."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.support.graphs import decode_graph, passes, settings
from tests.support.models import HIDDEN, LAYERS, logits_of, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.generation.finished_rows import FinishedRows
from tide_compile.lowering import compile_piece as compiled
from tide_compile.lowering import lower as lowering
from tide_compile.lowering.machine import Device
from tide_compile.passes.run import run
from tide_compile.routers.settings import settings_of_bank
from tide_compile.runtime import executor
from tide_compile.runtime.compaction_policy import CompactionPolicy
from tide_compile.runtime.executor import Executor
from tide_compile.runtime.host_read import CountsReader

aten, META = torch.ops.aten, torch.device("meta")
CHOSEN = {"min_layers": 1, "checkpoint_interval": 1, "compaction": "always", "compaction_threshold": 0.0}
# what makes a host wait for a device: reading a number, and sizes that depend on data
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim)


class Waits(TorchDispatchMode):
    """Collects operators that read data on the host. ``tolist`` of a tensor on the CPU is none of them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def program_of(model, batch, **changes):
    """The Dynamo graph's arguments and an uncompiled executor for a prompt."""
    seen = []

    def backend(gm, example_inputs):
        seen.append((gm, list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(prompt(batch)[0], use_cache=False)
    ((gm, arguments),) = seen
    config = TIDEConfig(**CHOSEN, lowering="eager", **changes)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    bank.projections = {layer: (torch.eye(HIDDEN), torch.zeros(HIDDEN)) for layer in bank.layers}
    chosen = settings_of_bank(bank, config, torch.device("cpu"), torch.float32)
    program, plan = run(gm, lambda: chosen)
    return program, plan, arguments, config, chosen


def executor_of(program, plan, arguments, config, chosen):
    runnables = {name: piece.graph for name, piece in program.pieces.items()}
    policy = CompactionPolicy(program, plan, config)
    return Executor(program, plan, runnables, policy, arguments, lambda _: chosen, lambda: None)


@pytest.fixture
def reads(monkeypatch):
    """Host reads of decisions, as they happen."""
    found = []
    original = CountsReader.__call__
    monkeypatch.setattr(CountsReader, "__call__", lambda self, c: (found.append(c.shape), original(self, c))[1])
    monkeypatch.setattr("tide_compile.runtime.compaction_policy.measure_machine", lambda *_: Device(1e9, 1e9, 0.0))
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.999])
def test_one_read_per_checkpoint(reads, batch, threshold):
    """All, some or no tokens leave, rows are left out: as many reads as checkpoints passed, and no other. Catches an
    ``int(...)``, ``.item()`` or a comparison of tensors that slips in."""
    parts = program_of(tiny("rmsnorm-rope-gqa"), batch, exit_threshold=threshold)
    run_ = executor_of(*parts)
    with Waits() as waits, torch.no_grad():
        run_(*parts[2])
    assert waits.found == []
    assert len(reads) == (1 if threshold == 0 else LAYERS - 1) and set(reads) == {(3,)}


@pytest.mark.parametrize(("batch", "decisions"), [(2, [(3, 15, 9), (5, 10, 6), (0, 10, 6)]), (1, [(9, 0, 0)])])
def test_nothing_else_can_be_read(monkeypatch, batch, decisions):
    """The executor on meta tensors, of which no number can be read: decisions come from a script. Catches a read that
    no operator shows, and a decision that is asked for once too often."""
    monkeypatch.setattr("tide_compile.runtime.compaction_policy.measure_machine", lambda *_: Device(1e9, 1e9, 0.0))
    script = iter(decisions)
    monkeypatch.setattr(executor, "CountsReader", lambda size: lambda counts: next(script))
    program, plan, arguments, config, chosen = program_of(tiny("rmsnorm-rope-gqa"), batch, exit_threshold=0.5)
    for piece in program.pieces.values():
        for node in piece.graph.graph.nodes:
            node.args, node.kwargs = tree_map_only(torch.device, lambda _: META, (node.args, node.kwargs))
        piece.graph.recompile()
    arguments = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
    program.constants.update({n: t.to("meta") for n, t in program.constants.items()})
    with torch.no_grad():
        (logits, *_) = executor_of(program, plan, arguments, config, chosen)(*arguments)
    assert logits.device.type == "meta" and logits.shape[:2] == (batch, 9)
    assert next(script, None) is None


def test_finished_sequences_are_not_read():
    """``generate`` asks at every token which sequences have ended; the answer stays on the device."""
    model = tiny("rmsnorm-rope-gqa")
    rows = FinishedRows(model, lambda **kwargs: kwargs["attention_mask"])
    mask = torch.ones(3, 4, dtype=torch.long)
    with Waits() as waits:
        rows.note(torch.tensor([False, False, False]))
        untouched = rows(attention_mask=mask)
        rows.note(torch.tensor([False, True, False]))
        hidden = rows(attention_mask=mask)
        rows.note(torch.tensor([True, True, True]))
        everyone = rows(attention_mask=mask)
    assert waits.found == []
    assert torch.equal(untouched, mask) and torch.equal(everyone, mask)
    assert hidden.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_mode_reaches_inductor(monkeypatch, bank, model):
    """``mode="reduce-overhead"`` asks Inductor for CUDA graphs in every piece."""
    asked = []
    for module in (lowering, compiled):
        monkeypatch.setattr(module, "compile_piece", lambda piece, patches: (asked.append(patches), piece.graph)[1])
    options = {"router": bank, "exit_threshold": 0.5, "min_layers": 2, "checkpoint_interval": 1}
    call = torch.compile(model, backend="tide", options={**options, "mode": "reduce-overhead"})
    logits_of(model, call, "static", 1, steps=1)
    assert len(asked) >= 4 and all(patches["triton.cudagraphs"] for patches in asked)


def test_inductor_knows_what_stays_where_it_is(monkeypatch):
    """Weights and caches. Catches weights that would be copied before every replay of a CUDA graph, and writes to a
    cache that would forbid graphs."""
    seen = []

    def inner(gm, example_inputs, static_input_idxs=(), **kwargs):
        seen.append((set(static_input_idxs), [tuple(getattr(x, "shape", ())) for x in example_inputs]))
        raise RuntimeError("seen enough")

    monkeypatch.setattr(compiled, "compile_fx", functools.partial(compiled.compile_fx, inner_compile=inner))
    program, _ = passes(decode_graph(1), settings((1,), min_layers=2))
    shapes = {"weight": (96, HIDDEN), "cache": (1, 2, 16, 16), "state": (1, 1, HIDDEN)}
    found = dict.fromkeys(shapes, 0)
    for name, piece in program.pieces.items():
        uncached = torch._inductor.config.patch(force_disable_caches=True)
        with torch.no_grad(), uncached, pytest.raises(Exception, match="seen enough"):
            compiled.compile_piece(piece, {"triton.cudagraphs": True})
        static, inputs = seen[-1]
        for i, shape in enumerate(inputs):
            for kind in (k for k, s in shapes.items() if s == shape):
                assert (i in static) == (kind != "state"), (name, kind)
                found[kind] += 1
    assert all(found.values())
