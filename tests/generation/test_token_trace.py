"""The trace of tokens: layers, scores and texts."""

import json

import pytest
import torch
from transformers import set_seed

import tide_compile
from tests.support.models import HIDDEN, LAYERS, SETTINGS, prompt, tiny
from tests.support.tokenizers import every_byte_tokenizer, word_tokenizer
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.generation.token_trace import token_texts

CONFIG = TIDEConfig(exit_threshold=0.5, compaction="never", **SETTINGS)
IDS, MASK = prompt(2)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 300}  # which no token is


@pytest.fixture(scope="module")
def engine():
    """One for all tests: what it has compiled is used again where the shapes are the same."""
    return TIDE(tiny("rmsnorm-rope-gqa"), RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16), CONFIG)


@pytest.fixture(scope="module")
def traced(engine):
    """Ids and trace of what was generated, by how."""

    def run(ids, mask, **arguments):
        set_seed(0)
        out = engine.generate(ids, attention_mask=mask, trace=True, **{**GREEDY, **arguments})
        return out if isinstance(out, torch.Tensor) else out.sequences, engine.last_trace

    end = int(run(IDS, MASK)[0][0, IDS.shape[1] + 1])
    return {
        "greedy": run(IDS, MASK),
        "dictionary": run(IDS, MASK, return_dict_in_generate=True, tokenizer=word_tokenizer()),
        "sampling": run(IDS[:1], MASK[:1], do_sample=True, num_return_sequences=2),
        "ended": run(IDS, MASK, eos_token_id=end),
    }


@pytest.mark.parametrize(("how", "mask"), [("greedy", MASK), ("sampling", MASK[[0, 0]]), ("dictionary", MASK)])
def test_layers_and_scores_of_every_token(model, bank, traced, how, mask):
    """They are those that the eager reference finds when it reads the finished text at once, with left padding. Catches
    a trace that is off by one, or in which sequences have changed places."""
    (out, trace), length = traced[how], mask.shape[1]
    mask = torch.nn.functional.pad(mask, (0, out.shape[1] - length), value=1)
    with torch.no_grad(), tide_compile.eager_reference(model, bank, CONFIG) as reference:
        model(out, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    (layers,), (scores,) = reference.exit_layers, reference.scores
    assert torch.equal(trace.layers, torch.cat([layers[:, :length], layers[:, length - 1 : -1]], 1))
    assert len({*trace.layers[:, length:].flatten().tolist()}) > 1, "all tokens leave at one layer: nothing is shown"
    for i, j in (trace.layers >= 0).nonzero().tolist():
        read, layer = j - (j >= length), min(int(trace.layers[i, j]), LAYERS - 2)
        assert torch.isclose(trace.scores[i, j], scores[layer][i, read], atol=1e-4)
    kept = [[t.id for t in tokens] for tokens in trace.tokens()]
    assert kept == [row[m == 1].tolist() for row, m in zip(out, mask, strict=True)]


def test_what_ended_is_not_shown(traced):
    """Catches padding behind the end of a sequence that is counted as generated."""
    _, trace = traced["ended"]
    assert [sum(not t.prompt for t in tokens) for tokens in trace.tokens()] == [2, 6]


def test_trace_is_asked_for(traced, engine, model):
    """It does not outlive the next call, and refuses what it cannot follow; embeddings have no ids to show."""
    engine.generate(IDS, attention_mask=MASK, **GREEDY)
    assert engine.last_trace is None and not engine.last_stats.exit_layers
    with pytest.raises(ConfigError, match="num_beams=2"):
        engine.generate(IDS, trace=True, num_beams=2, **GREEDY)
    embeddings = model.get_input_embeddings()(IDS).detach()
    out = engine.generate(inputs_embeds=embeddings, attention_mask=MASK, trace=True, **GREEDY)
    trace = engine.last_trace
    assert [[t.id for t in tokens] for tokens in trace.tokens()] == out.tolist() and not trace.depths(prompt=True)
    assert torch.equal(trace.layers, traced["greedy"][1].layers[:, IDS.shape[1] :])
    assert "12 generated tokens" in repr(trace)


def test_json(traced):
    out, trace = traced["dictionary"]
    _, tokens = json.loads(trace.to_json())["sequences"]
    assert [t["id"] for t in tokens] == out[1].tolist() and tokens[0]["text"] == f"w{out[1, 0]}"
    assert sum(t["prompt"] for t in tokens) == 9 and all(t["score"] is None or 0 <= t["score"] <= 1 for t in tokens)


def test_texts_of_tokens():
    """Together they are the text, with characters of several tokens. Catches a replacement character per byte."""
    tokenizer, text = every_byte_tokenizer(), "naïve 🙂 text\n"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text and len(texts) == len(ids) > len(text) and "" in texts
    assert token_texts(None, [1, 2]) == [None, None]
