"""What explain and the dumps tell of a graph is what the compiler did with it."""

import logging
import re
import runpy

import networkx as nx
import pydot
import pytest
import torch

import tide_compile
from tests.support.models import GENERATE, HIDDEN, LAYERS, SETTINGS, prompt, tiny
from tide_compile import TIDE, TIDEConfig
from tide_compile.errors import ConfigError, UnknownOptionError
from tide_compile.inspection.graph_dump import CONTENTS, INDEX
from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.passes.program import fill_name, project_name, segment_name

IDS, MASK = prompt(2)
STRAIGHT = ["prologue", *map(segment_name, range(LAYERS)), "epilogue"]


def test_explain(model, bank, monkeypatch):
    """Catches a table that is not the plan, and an explanation that compiles, or leaves something behind."""
    monkeypatch.setattr("tide_compile.backend.lower", lambda *_: pytest.fail("compiled"))
    found = tide_compile.explain(model, IDS, attention_mask=MASK, options={"router": bank, **SETTINGS})
    graph = found.main
    assert [(r.layer, r.segment) for r in graph.layers] == [(i, i) for i in range(LAYERS)]
    assert [r.threshold for r in graph.layers] == pytest.approx([0.85, 0.85, 0.85, None])
    assert [r.twin_of for r in graph.layers] == [None, 0, 0, None]
    first, *others = graph.layers
    assert first.kv_nodes is None and all(0 < r.kv_nodes < r.nodes for r in others)
    assert len({r.nodes for r in graph.layers}) == 1 and graph.steps[-1].operators["tide.route"] == 2
    assert graph.shape == ("2", "9", str(HIDDEN)) and "leave above 0.85" in repr(found)
    assert len(tide_compile.explain(model, IDS, options={"exit_threshold": 1.0}).main.checkpoints) == 0


def test_explain_without_routers_and_refused(model):
    """Where checkpoints would be, and why nothing is cut."""
    graph = tide_compile.explain(model, IDS, options=SETTINGS).main
    assert graph.checkpoints == (0, 1, 2) and "no routers" in graph.notes[0]
    net = torch.nn.Linear(4, 4)
    graph = tide_compile.explain(net, torch.ones(2, 4)).main
    assert graph.error.startswith("LayersNotFoundError") and "not cut" in str(graph)


def test_dumped_code_is_the_graph(model, bank, tmp_path, monkeypatch):
    """Every file of a pass can be imported and run, and the last computes what the pieces compute. Catches an import
    that is missing, a constant that is lost, inputs in another order."""
    from tide_compile import backend

    programs, lower = [], backend.lower
    monkeypatch.setattr(backend, "lower", lambda program, *rest: (programs.append(program), lower(program, *rest))[1])
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))
    with tide_compile.dump(tmp_path / "dump") as dumps:
        engine.generate(IDS, attention_mask=MASK, **GENERATE)
    assert [d.folder.name for d in dumps] == ["graph_00", "graph_01"] and len(programs) == 2  # prompt, decoding
    for one, program in zip(dumps, programs, strict=True):
        files = sorted(one.folder.glob("*.py"))
        assert [int(f.name[:2]) for f in files] == list(range(1, 10))
        for file in files[::4]:
            module = runpy.run_path(str(file))
            for piece, kind in module["PIECES"].items():
                with torch.no_grad():
                    results = kind()(*module["example_inputs"](piece))
                assert len(results) == len(kind.outputs)
        assert list(module["PIECES"]) == [piece.name for piece in program.pieces()]
        for piece in program.pieces():
            inputs = [_filled(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
            ours, theirs = (_run(call, inputs) for call in (module["PIECES"][piece.name](), piece.graph))
            assert all(map(_same, ours, theirs)), piece.name


def _filled(value):
    if not isinstance(value, torch.Tensor):
        return int(value)
    sizes = [int(s) for s in value.shape]
    return torch.rand(sizes, dtype=value.dtype) if value.is_floating_point() else torch.ones(sizes, dtype=value.dtype)


@torch.no_grad()
def _run(call, inputs):
    return call(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])


def _same(ours, theirs):
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_index_plan_and_charts(model, bank, tmp_path):
    """Catches an index that forgets a file, and charts that a drawing program would not read."""
    options = {"router": bank, "dump": tmp_path, "compaction": "never", **SETTINGS}
    with torch.no_grad():
        torch.compile(model, backend="tide", options=options)(IDS, attention_mask=MASK)
    folder = tmp_path / "graph_00"
    index, names = (folder / INDEX).read_text(), {p.name for p in folder.iterdir()}
    assert min(names) == INDEX and all(n in index for n in names - {INDEX})
    assert "+3 tide.route" in index and "checkpoints after layers 0, 1, 2" in index
    assert (folder / "07_splice_routers.py").read_text().startswith('"""splice_routers: nodes')
    assert (folder / "plan.txt").read_text().count("segment 0") == 2  # twins
    chart = nx.read_graphml(folder / "plan.graphml")
    assert set(STRAIGHT) <= set(nx.descendants(chart, "prologue")) | {"prologue"}
    assert set(chart.successors("router_1")) == {segment_name(2), fill_name(1)}
    (drawn,) = pydot.graph_from_dot_file(str(folder / "plan.dot"))
    assert {n.get_name().strip('"') for n in drawn.get_nodes()} - {"\\n"} == set(chart)


def test_the_folder_begins_with_an_index(model, bank, tmp_path):
    """Of the graphs of this run and of one before, those that were refused as well. Catches a folder of folders in
    which one has to guess, and an index of the last graph only."""
    options = {"router": bank, "dump": tmp_path, "compaction": "never", **SETTINGS}
    with torch.no_grad():
        torch.compile(model, backend="tide", options=options)(IDS)
        with pytest.raises(Exception, match="no decoder layers"):
            torch.compile(torch.nn.Linear(4, 4), backend="tide", options=options)(torch.ones(2, 4))
        torch._dynamo.reset()
        torch.compile(model, backend="tide", options=options)(IDS[:, :1])
    text = (tmp_path / CONTENTS).read_text()
    assert min(p.name for p in tmp_path.iterdir()) == CONTENTS
    first, refused, last = text.splitlines()[-3:]
    assert "hidden states [2, 9, 64]; checkpoints after layers 0, 1, 2;" in first and "[2, 1, 64]" in last
    assert "LayersNotFoundError" in refused and "plan.html" not in refused
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) == 7 and all((tmp_path / target).is_file() for target in targets)


def test_a_refused_graph_says_why(tmp_path):
    """In the index, because that is where one looks. Catches a dump that just stops."""
    with torch.no_grad(), pytest.raises(Exception, match="no decoder layers"):
        torch.compile(torch.nn.Linear(4, 4), backend="tide", options={"dump": str(tmp_path)})(torch.ones(2, 4))
    assert "LayersNotFoundError" in (tmp_path / "graph_00" / INDEX).read_text()


def test_wrong_folders_and_nothing_compiled(model, bank, tmp_path, caplog):
    """Catches a dump that is silently empty, or written somewhere else."""
    compiled = torch.compile(model, backend="tide", options={"router": bank, "compaction": "never", **SETTINGS})
    with torch.no_grad():
        compiled(IDS)
        with caplog.at_level(logging.WARNING, "tide_compile"), tide_compile.dump(tmp_path / "dump"):
            compiled(IDS)
    assert "nothing was compiled inside dump" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made a folder"), tide_compile.dump(tmp_path / "file"):
        pass
    with torch.no_grad(), pytest.raises(ConfigError, match="dump=5"):
        torch.compile(model, backend="tide", options={"dump": 5})(IDS)
    with torch.no_grad(), pytest.raises(UnknownOptionError, match="Did you mean 'dump'"):
        torch.compile(model, backend="tide", options={"dumps": "x"})(IDS)


def test_structured_trace(model, bank):
    """tlparse shows the passes: as many artifacts, with code that Python accepts."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    trace = logging.getLogger("torch.__trace")
    trace.addHandler(handler)
    try:
        with torch.no_grad():
            torch.compile(model, backend="tide", options={"router": bank, **SETTINGS})(IDS)
    finally:
        trace.removeHandler(handler)
    artifacts = {r.metadata["artifact"]["name"]: r.payload for r in records if "artifact" in getattr(r, "metadata", {})}
    ours = {name: text for name, text in artifacts.items() if name.startswith("tide_")}
    assert [name[5:7] for name in ours] == [f"{i:02d}" for i in range(1, 10)]
    for text in ours.values():
        compile(text, "artifact", "exec")


def test_inductor_code(tmp_path):
    """Paths of what was compiled at once and of what is compiled when a token first leaves. Catches a path of another
    piece, and the late ones missing."""
    model = tiny("rmsnorm-rope-gqa")
    bank = tide_compile.RouterBank.untrained(HIDDEN, LAYERS, layers=[1], bottleneck_dim=16)
    settings = {"min_layers": 2, "checkpoint_interval": 2, "compaction": "never"}
    options = {"router": bank, "dump": tmp_path, "exit_threshold": 0.999, **settings}
    compiled = torch.compile(model, backend="tide", options=options)
    ids = prompt(5, 1, 0)[0]  # too many rows for products that would be measured first
    with torch.no_grad():
        compiled(ids)
        before = _code_of(tmp_path)
        with tide_compile.exit_threshold(0.0):
            compiled(ids)
    after = _code_of(tmp_path)
    late = {fill_name(1), project_name(1), segment_name(1, "masked")}
    assert all(before[piece] == ["compiled when it is first needed"] for piece in late)
    assert set(before) == {*STRAIGHT[:3], "epilogue", *late}
    for piece in (*STRAIGHT[:3], "epilogue", fill_name(1), project_name(1)):
        (file,) = after[piece]
        with open(file) as code:
            assert "def call(" in code.read()
    assert len({after[p][0] for p in after}) == len(after)


def _code_of(root):
    lines = (root / "graph_00" / "inductor.txt").read_text().splitlines()[2:]
    found = {}
    for line in lines:
        piece, file = line.split(maxsplit=1)
        found.setdefault(piece, []).append(file.strip())
    return found
