"""Settings of the process and of the model: the text is the reference's, or one sentence says why not."""

import asyncio
import multiprocessing

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.models import FEW, GENERATE, HIDDEN, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference
from tide_compile.errors import WeightsInGraphError

CONFIG = TIDEConfig(exit_threshold=0.5, min_layers=1, checkpoint_interval=1, lowering="eager")
IDS, MASK = prompt(2)


def new_model():
    return tiny("rmsnorm-rope-gqa", layers=FEW)


def bank():
    return RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)


def text(generate, ids=IDS, mask=MASK, **kwargs):
    out = generate(ids, attention_mask=mask, **GENERATE, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.sequences


def want(model, **kwargs):
    with eager_reference(model, bank(), CONFIG):
        return text(model.generate, cache_implementation="static", **kwargs)


@pytest.mark.parametrize("inside", ["made and used", "used", "used later"])
def test_inference_mode(inside):
    """Catches tensors that are made in inference mode and written to outside of it."""
    with torch.inference_mode(inside == "made and used"):
        model = new_model()
        engine = TIDE(model, bank(), CONFIG)
    expected = want(model)
    if inside == "used later":
        assert torch.equal(text(engine.generate), expected)
    with torch.inference_mode():
        assert torch.equal(text(engine.generate), expected)
    assert torch.equal(text(engine.generate), expected)


def test_grad_mode_threads_and_default_dtype():
    """What a process may change between two calls. Catches code that is compiled for one of them alone."""
    model = new_model()
    engine, expected = TIDE(model, bank(), CONFIG), want(model)
    with torch.enable_grad():
        assert torch.equal(text(engine.generate), expected) and not engine(IDS).requires_grad
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(text(engine.generate), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)


def test_tasks():
    """Three at once, in threads of asyncio."""
    model = new_model()
    engine, expected = TIDE(model, bank(), CONFIG), want(model)

    async def all_at_once():
        return await asyncio.gather(*(asyncio.to_thread(text, engine.generate) for _ in range(3)))

    assert all(torch.equal(found, expected) for found in asyncio.run(all_at_once()))


def _of_a_copy(model, answers):
    answers.put(text(TIDE(model, bank(), CONFIG).generate).tolist())


@pytest.mark.slow
def test_spawn():
    """A process that is given an engine's model, which arrives uncompiled. (After fork, torch itself hangs in a process
    that has used several threads.)"""
    model = new_model()
    engine = TIDE(model, bank(), CONFIG)
    expected = text(engine.generate)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_of_a_copy, args=(engine.model, answers))
    process.start()
    assert answers.get(timeout=300) == expected.tolist()
    process.join()


def test_weights_in_the_graph():
    """Freezing and modules that are not inlined put weights where routers are not found: one sentence, or no exits."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        with pytest.raises(WeightsInGraphError, match="freezing"):
            TIDE(new_model(), bank(), CONFIG).generate(IDS, **GENERATE)
        options, model = {"router": bank(), "fallback": "inductor", "exit_threshold": 0.5}, new_model()
        with torch.no_grad():
            found = torch.compile(model, backend="tide", options=options)(IDS).logits
            assert torch.allclose(found, model(IDS).logits, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("config", "output_hidden_states", True),
        ("config", "use_cache", False),
        ("generation_config", "use_cache", False),
        ("generation_config", "return_dict_in_generate", True),
        ("generation_config", "output_hidden_states", True),
        ("generation_config", "cache_implementation", "static"),
        ("generation_config", "num_beams", 2),
        ("generation_config", "repetition_penalty", 2.0),
    ],
)
def test_flags_of_a_config(where, name, value):
    model = new_model()
    setattr(getattr(model, where), name, value)
    engine = TIDE(model, bank(), CONFIG)
    with eager_reference(model, bank(), CONFIG), torch.no_grad():
        expected, logits = text(model.generate), model(IDS, attention_mask=MASK).logits
    assert torch.equal(text(engine.generate), expected)
    assert torch.allclose(engine(IDS, MASK)[MASK.bool()], logits[MASK.bool()], atol=1e-4)


def test_attentions_of_a_config():
    """They are had from attention that gives its weights."""
    model = new_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert torch.equal(text(TIDE(model, bank(), CONFIG).generate), want(model))


def test_adapters_that_change():
    """Switched, left out, merged: each as in the reference at that moment. Catches code of the adapter before."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(new_model(), settings)
    wrapped.add_adapter("other", settings)
    wrapped.eval()
    engine, inner, seen = TIDE(wrapped, bank(), CONFIG), wrapped.base_model.model, []

    def check():
        seen.append(text(engine.generate))
        assert torch.equal(seen[-1], want(inner))

    check()
    wrapped.set_adapter("other")
    check()
    with wrapped.disable_adapter():
        check()
    wrapped.merge_adapter()
    check()
    wrapped.unmerge_adapter()
    wrapped.set_adapter("default")
    check()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[-1])


def test_embeddings_that_change():
    """Resized, tied and untied, another dtype, after the first text."""
    model = new_model()
    engine = TIDE(model, bank(), CONFIG)
    for change in (
        lambda: None,
        lambda: model.resize_token_embeddings(150),
        lambda: setattr(model.lm_head, "weight", model.get_input_embeddings().weight),
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(2 * model.lm_head.weight.detach().flip(0))),
        lambda: model.to(torch.bfloat16),
    ):
        change()
        assert torch.equal(text(engine.generate), want(model))


_ORIGINAL = {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **_ORIGINAL},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_positions_that_are_scaled(scaling):
    """Within the positions that the model was trained on, beyond them, and within them again. (Dynamic scaling, which
    asks for the values of positions, is an error that says so.)"""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": 128, "num_attention_heads": 4}
    rope = {"rope_theta": 1e4, **scaling}
    config = LlamaConfig(**sizes, num_hidden_layers=FEW, max_position_embeddings=32, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = TIDE(model, bank(), CONFIG)
    for length in (9, 30, 60, 9):
        ids = torch.randint(2, 128, (1, length))
        with eager_reference(model, bank(), CONFIG):
            expected = text(model.generate, ids, torch.ones_like(ids), cache_implementation="static")
        assert torch.equal(text(engine.generate, ids, torch.ones_like(ids)), expected)
