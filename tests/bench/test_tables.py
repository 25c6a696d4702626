"""The tables of ``python -m bench.tables`` say what the model does."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

import tide_compile
from bench import tables
from bench.support import table_quality, table_speed
from bench.support.page import Table, update_page
from bench.support.report import Timing
from tests.support.models import LAYERS, SETTINGS, prompt
from tests.support.tokenizers import byte_tokenizer, save_tiny
from tide_compile import TIDE, TIDEConfig

ROWS = prompt(6, length=12, padding=0)[0].tolist()
SOME = 0.5  # of the untrained routers: some tokens leave, others do not


def percent(text):
    return float(text.rstrip("%")) / 100


def shows(text, share):
    """Whether a cell is this share, but for rounding."""
    return abs(percent(text) - float(share)) < 6e-4


@torch.no_grad()
def choices(model, row):
    return model(input_ids=torch.tensor([row])).logits[0].argmax(-1)


def test_convergence(model):
    """Catches a final state behind the norm (as the reference has it), and layers that are off by one."""
    states = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
    with torch.no_grad():
        behind = [model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states for row in ROWS]
        hook.remove()
        last = torch.cat(states)
        wanted = model.lm_head(model.model.norm(last)).argmax(-1)
        table = table_quality.convergence(model, ROWS, 0.8)
        assert [row[0] for row in table.rows] == [str(i) for i in range(LAYERS)]
        for layer, (_, above, mean, same) in enumerate(table.rows):
            state = torch.cat([h[layer + 1][0] for h in behind]) if layer < LAYERS - 1 else last
            cosine = cosine_similarity(state, last, dim=-1)
            agrees = (model.lm_head(model.model.norm(state)).argmax(-1) == wanted).double().mean()
            assert shows(above, (cosine > 0.8).double().mean())
            assert abs(float(mean) - cosine.mean()) < 6e-3
            assert shows(same, agrees)
    assert 0 < percent(table.rows[2][1]) < 1 and 0 < percent(table.rows[2][3]) < 1


def test_exits(model, bank):
    """Against the compiled model. Catches shares of the wrong tokens, and routers that are not asked."""
    table = table_quality.exits(model, bank, ROWS, [1.0, SOME])
    assert table.rows[0][:4] == ["1 (off)", "0.0%", "0.0%", ""] and table.rows[0][4:] == ["", "100.0%"]
    options = {"router": bank, "exit_threshold": SOME, **SETTINGS}
    compiled = torch.compile(model, backend="tide", options=options)
    with torch.no_grad(), tide_compile.record_exits(per_token=True) as stats:
        same = torch.cat([choices(compiled, row) == choices(model, row) for row in ROWS])
    left = torch.cat([layers[0] for layers in stats.exit_layers]) < LAYERS - 1
    _, rate, saved, where, of_these, of_all = table.rows[1]
    assert 0 < percent(rate) < 1
    assert shows(rate, stats.exit_rate)
    assert shows(saved, stats.layers_saved)
    shares = {int(k): percent(v) for k, v in (part.split(": ") for part in where.split(", "))}
    found = {k: n / stats.total_tokens for k, n in sorted(stats.exits_per_layer.items())}
    assert shares == pytest.approx(found, abs=6e-4)
    assert shows(of_these, same[left].double().mean())
    assert shows(of_all, same.double().mean())


def test_quality(model, bank):
    """Against what the engine generates. Catches exits of the prompt among those of the text."""
    new = 10
    table = table_quality.quality(model, byte_tokenizer(), bank, ROWS, [1.0, SOME], new)
    assert table.rows[0][:3] == ["1 (off)", "0.0%", "0.0%"] and table.rows[0][4:6] == ["100.0%", "6 of 6"]
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=SOME, **SETTINGS))
    agree, distinct, depths, whole = [], [], [], 0
    for row in ROWS:
        text = engine.generate(
            torch.tensor([row]), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, trace=True
        )[0].tolist()
        same = choices(model, text[:-1])[len(row) - 1 :] == torch.tensor(text[len(row) :])
        agree.append(same.double().mean())
        whole += bool(same.all())
        written = text[len(row) :]
        grams = [tuple(written[i : i + 3]) for i in range(new - 2)]
        distinct.append(len(set(grams)) / len(grams))
        depths.append(engine.last_trace.layers[0, len(row) :])
    depths = torch.cat(depths).double()
    _, rate, saved, _, agrees, texts, different = table.rows[1]
    assert shows(rate, (depths < LAYERS - 1).double().mean())
    assert shows(saved, 1 - (depths + 1).mean() / LAYERS)
    assert shows(agrees, sum(agree) / len(ROWS))
    assert texts == f"{whole} of 6" and shows(different, sum(distinct) / 6)
    assert table.after.count("\n* ") == 2


def test_speed(model, bank, monkeypatch):
    """Catches tokens per second of one sequence, ratios upside down, exits of another threshold."""

    def fixed(steps, rounds):
        for step in steps.values():
            assert step() > 0
        return {name: Timing([0.1 * (i + 1)] * rounds) for i, name in enumerate(steps)}

    monkeypatch.setattr(table_speed, "interleave", fixed)
    bank.routers = {layer: bank.routers[layer] for layer in (0, 1)}
    calls = table_speed.contenders(model, bank, [0.999, 0.0], "eager")
    table = table_speed.latency(model, calls, {12: ROWS[:2], 6: [row[:6] for row in ROWS[:2]]}, 3)
    assert [row[0] for row in table.rows] == ["12"] * 5 + ["6"] * 5
    assert [row[2] for row in table.rows[:5]] == ["100.0", "200.0", "300.0", "400.0", "500.0"]
    assert [row[4] for row in table.rows[:5]] == ["0.50", "1.00", "1.50", "2.00", "2.50"]
    table = table_speed.throughput(model, lambda: calls, ROWS, [2], 3)
    assert [float(row[2]) for row in table.rows] == [pytest.approx(16 / (0.1 * i), abs=0.06) for i in range(1, 6)]
    assert [row[4] for row in table.rows] == ["2.00", "1.00", "0.67", "0.50", "0.40"]
    assert [row[5:] for row in table.rows] == [["", ""]] * 3 + [["0.0%", "0.0%"], ["100.0%", "75.0%"]]


def test_rows_are_spread_over_the_text(tmp_path):
    """Catches a sample of the beginning only, and texts of another length."""
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(letter * 150 for letter in "abcdefgh"))
    rows = table_quality.text_rows(byte_tokenizer(), str(path), 4, 100)
    assert [len(row) for row in rows] == [100] * 4
    assert len({byte_tokenizer().decode(row)[50] for row in rows}) == 4
    short = table_quality.beginnings(byte_tokenizer(), str(path), 4, 8)
    assert [byte_tokenizer().decode(row) for row in short] == [letter * 8 for letter in "aceg"]
    with pytest.raises(tide_compile.errors.ConfigError, match="no text of that length"):
        table_quality.beginnings(byte_tokenizer(), str(path), 4, 500)


def test_page_keeps_the_other_tables(tmp_path):
    path = tmp_path / "page.md"
    made = {n: Table(n, f"about {n}.", "data.", ["a"], [["1"]]).section("machine.") for n in ("one", "two", "three")}
    update_page(path, "# Page", {"two": made["two"], "mine": "## mine\n\nby hand\n"}, ["one", "two", "three"])
    update_page(path, "# Page", {"one": made["one"]}, ["one", "two", "three"])
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# Page", "## one", "## two", "## mine"]
    update_page(path, "# Page", {"two": made["two"].replace("1", "2")}, ["one", "two", "three"])
    assert path.read_text() == text[: text.index("## two")] + text[text.index("## two") :].replace("| 1", "| 2")


def test_command(tmp_path):
    """A page and JSON from the command line, without the folders of this machine."""
    folder = save_tiny(tmp_path / "somewhere" / "tiny", LAYERS)
    page, record = tmp_path / "page.md", tmp_path / "tables.json"
    arguments = ["--table", "convergence", "--model", str(folder), "--tokens", "64", "--length", "32"]
    tables.main([*arguments, "--markdown", str(page), "--json", str(record)])
    text = page.read_text()
    assert text.startswith(f"{tables.HEADING}\n## Convergence per layer\n") and str(tmp_path) not in text
    assert "`python -m bench.tables --table convergence --model somewhere/tiny --tokens 64" in text
    assert len(json.loads(record.read_text())["tables"]["convergence"]["rows"]) == LAYERS
