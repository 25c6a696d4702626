"""Text as people get it is what exits are judged by: with the processors of a generation config, one text, greedily."""

import pytest
import torch
from transformers import GenerationConfig

from tests.support.models import FEW, HIDDEN, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.planning.choose_checkpoints import read_scores
from tide_compile.text.self_text import continue_prompts
from tide_compile.text.written import preferred, write
from tide_compile.thresholds.agreement import measure_agreement

G = 12
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [40]]
PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(40, 128))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(64))},
    "min_length": {"min_length": 10, "eos_token_id": list(range(64))},
    "min_new_tokens": {"min_new_tokens": 99, "eos_token_id": list(range(64))},
    "forced_eos_token_id": {"forced_eos_token_id": 3},
    "sequence_bias": {"sequence_bias": [[[5], 4.0], [[7], -4.0]]},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(40)]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
}
OTHER_WAYS = {
    "do_sample": True, "num_beams": 3, "num_return_sequences": 2, "temperature": 7.0, "return_dict_in_generate": True,
    "guidance_scale": 4.0, "max_length": 5, "cache_implementation": "static", "output_scores": True,
    "stop_strings": ["a"], "prompt_lookup_num_tokens": 2, "penalty_alpha": 0.6, "max_time": 0.0,
}  # fmt: skip


@pytest.fixture
def model():
    return tiny("rmsnorm-rope-gqa", layers=FEW)


@pytest.mark.parametrize("name", PROCESSORS)
def test_exits_off_agree(model, name):
    """Whatever changes the model's choice, changes it on both sides. Catches a penalty that looks like disagreement,
    and one that counts the padding of a batch on one side alone."""
    bank = RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)
    config = TIDEConfig(exit_threshold=1.0, min_layers=1, checkpoint_interval=1)
    plain = measure_agreement(model, bank, config, PROMPTS, max_new_tokens=G)
    model.generation_config = GenerationConfig(**PROCESSORS[name])
    outcome = measure_agreement(model, bank, config, PROMPTS, max_new_tokens=G)
    assert outcome.disagreement == 0
    texts = [[g.tokens.tolist() for g in o.generations] for o in (outcome, plain)]
    assert texts[0] != texts[1]  # they do change it


def test_other_ways_do_not_count(model):
    """Catches beams or sampling of a generation config in what is measured, and results of another form."""
    want = continue_prompts(model, PROMPTS, G, sample=False)
    bank = RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)
    config = TIDEConfig(exit_threshold=1.0, min_layers=1, checkpoint_interval=1)
    for name, value in OTHER_WAYS.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config.to_dict()
    assert continue_prompts(model, PROMPTS, G, sample=False) == want
    outcome = measure_agreement(model, bank, config, PROMPTS, max_new_tokens=G)
    written = [[*p, *g.tokens.tolist()] for p, g in zip(PROMPTS, outcome.generations, strict=True)]
    assert outcome.disagreement == 0 and written == want
    sampled = continue_prompts(model, PROMPTS, G, sample=True)
    assert len(sampled) == len(PROMPTS) and sampled != want
    assert model.generation_config.to_dict() == kept


def test_as_generate_writes(model):
    """One text is that of ``generate``; each token is preferred from the logits that it was chosen from."""
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.suppress_tokens = [31]
    ids, mask = prompt(3)
    text = write(model, ids, mask, G, 0)
    asked = {"attention_mask": mask, "max_new_tokens": G, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(text, model.generate(ids, **asked))
    logits = model.generate(ids, **asked, output_logits=True, return_dict_in_generate=True).logits
    for row in range(len(ids)):
        found = preferred(model, text[row], mask[row], torch.stack([x[row] for x in logits]), G, 0)
        assert torch.equal(found, text[row, ids.shape[1] :])


def test_scores_of_checkpoints(model):
    """Leaving after a layer is right if it leads to the same token, a penalty included. Catches a choice of checkpoints
    that is made for another text: here the last layer but one says what the model says, so all are right."""
    model.generation_config.no_repeat_ngram_size = 1
    bank = RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)
    last = model.model.layers[-1]
    with torch.no_grad():
        for part in (last.self_attn.o_proj, last.mlp.down_proj):
            part.weight.zero_()
    _, correct = read_scores(model, bank.keep([FEW - 2]), TIDEConfig(), PROMPTS, max_new_tokens=G)
    assert correct.shape == (len(PROMPTS) * G, 1) and correct.all()
