"""One host read per checkpoint: counted on the CPU, and run on meta tensors, which cannot be read at all."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.support.host_reads import Waits
from tests.support.models import COMPACT, HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.lowering.machine import Device
from tide_compile.passes.run import run
from tide_compile.routers.settings import settings_of_bank
from tide_compile.runtime import executor
from tide_compile.runtime.bindings import RouterBindings
from tide_compile.runtime.compaction_policy import CompactionPolicy
from tide_compile.runtime.executor import Executor
from tide_compile.runtime.host_read import CountsReader

META = torch.device("meta")


def program_of(model, batch, **changes):
    """The Dynamo graph's arguments and an uncompiled executor for a prompt."""
    seen = []

    def backend(gm, example_inputs):
        seen.append((gm, list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(prompt(batch)[0], use_cache=False)
    ((gm, arguments),) = seen
    config = TIDEConfig(**COMPACT, lowering="eager", **changes)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    bank.projections = {layer: (torch.eye(HIDDEN), torch.zeros(HIDDEN)) for layer in bank.layers}
    chosen = settings_of_bank(bank, config, torch.device("cpu"), torch.float32)
    program, plan = run(gm, lambda: chosen)
    return program, plan, arguments, config, chosen


def executor_of(program, plan, arguments, config, chosen):
    runnables = {piece: piece.graph for piece in program.pieces()}
    policy = CompactionPolicy(program, plan, config)
    bindings = RouterBindings(program.constants, plan, arguments, lambda _: chosen, lambda: None)
    return Executor(program, plan, runnables, policy, bindings)


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
    for piece in program.pieces():
        for node in piece.graph.graph.nodes:
            node.args, node.kwargs = tree_map_only(torch.device, lambda _: META, (node.args, node.kwargs))
        piece.graph.recompile()
    arguments = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
    program.constants.update({n: t.to("meta") for n, t in program.constants.items()})
    with torch.no_grad():
        (logits, *_) = executor_of(program, plan, arguments, config, chosen)(*arguments)
    assert logits.device.type == "meta" and logits.shape[:2] == (batch, 9)
    assert next(script, None) is None


@pytest.mark.gpu
def test_decisions_come_through_pinned_memory(on_gpu):
    reader = CountsReader(size=3)
    assert reader(torch.tensor([1, 2, 3])) == [1, 2, 3]
    assert reader(torch.tensor([4, 5, 6])) == [4, 5, 6]
    assert reader._local.buffer.is_pinned()
