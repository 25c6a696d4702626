"""Calls of ``generate``, one or more for each of its parameters and for each field of ``GenerationConfig``.

A case is a function of ``generate`` and a ``Setup``; what it returns is compared. Values that keep state (streamers,
processors, caches) are made anew for each run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer

from tests.support.models import VOCABULARY, tiny
from tests.support.tokenizers import word_tokenizer

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
SAMPLE = {"do_sample": True}


@dataclass(slots=True)
class Setup:
    """What a run starts from: prompts ``ids`` and ``mask`` [B, S], padded on the left but for the last row; and what
    becomes known of it: ``seen``, what callbacks were given, ``ends``, the end tokens, and ``pad``."""

    model: PreTrainedModel
    ids: torch.Tensor
    mask: torch.Tensor
    seen: list[object] = field(default_factory=list)
    ends: set[int] = field(default_factory=lambda: {GREEDY["eos_token_id"]})
    pad: int = GREEDY["pad_token_id"]


Generate = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Case:
    """``covers``: the parameters and fields that it is about."""

    covers: tuple[str, ...]
    name: str
    run: Callable[[Generate, Setup], object]


class _Later:
    """A value that is made for each run."""

    def __init__(self, make: Callable[[Setup], object], name: str) -> None:
        self.make, self.name = make, name

    def __repr__(self) -> str:
        return self.name


def later(make: Callable[[Setup], object], name: str = "...") -> _Later:
    return _Later(make, name)


def call(covers: str, **kwargs: object) -> Case:
    """``generate(ids, attention_mask=mask, **GREEDY, **kwargs)``."""

    def run(generate: Generate, s: Setup) -> object:
        made = {n: v.make(s) if isinstance(v, _Later) else v for n, v in kwargs.items()}
        arguments = {"attention_mask": s.mask, **GREEDY, **made}
        ends = arguments["eos_token_id"]
        pads = (arguments["pad_token_id"], *(ends if isinstance(ends, list) else [ends]), 0)
        s.pad = next(p for p in pads if p is not None)
        s.ends = set(ends) if isinstance(ends, list) else {ends}  # {None}: rows that are done go on
        return generate(**({"inputs": s.ids} | arguments if _PROMPTS.isdisjoint(made) else arguments))

    about = tuple(covers.split())
    shown = {n: v for n, v in kwargs.items() if n in about} or kwargs
    return Case(about, ", ".join(f"{n}={_brief(v)}" for n, v in shown.items()) or covers, run)


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 40 and "\n" not in shown else type(value).__name__


def scenario(covers: str, name: str) -> Callable[[Callable], Case]:
    """Several calls, or one in another form."""
    return lambda run: Case(tuple(covers.split()), name, run)


_PROMPTS = {"inputs", "input_ids", "inputs_embeds"}


class Counting(LogitsProcessor):
    """Prefers tokens by how often it was called."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(input_ids.shape))
        return scores + torch.arange(scores.shape[1]) * (len(self.seen) % 2) * 0.01


class After(StoppingCriteria):
    """Every row ends at a length of its own."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.arange(len(input_ids)) + self.length <= input_ids.shape[1]


class Listening(BaseStreamer):
    def __init__(self, seen: list) -> None:
        self.seen = seen

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append("end")


def first_token(s: Setup) -> int:
    """What the model answers to the last row."""
    with torch.no_grad():
        return int(s.model(s.ids, attention_mask=s.mask).logits[-1, -1].argmax())


def assistant(s: Setup) -> PreTrainedModel:
    return tiny("rmsnorm-rope-gqa", seed=1, layers=1)


def twice(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """A decoding loop of a user."""
    for _ in range(2):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], 1)
    return input_ids


ALL_OUTPUTS = {
    "output_scores": True, "output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True
}  # fmt: skip
TOKENIZER = later(lambda s: word_tokenizer(), "words")
ASSISTED = {"assistant_model": later(assistant, "a model of one layer")}
LOOKUP = {"prompt_lookup_num_tokens": 3}

CASES: list[Case] = [
    # what generate takes
    call("inputs"),
    call("input_ids", input_ids=later(lambda s: s.ids, "ids")),
    call("inputs_embeds", inputs_embeds=later(lambda s: s.model.get_input_embeddings()(s.ids).detach(), "embeddings")),
    call("attention_mask", attention_mask=None),
    call("attention_mask", attention_mask=later(lambda s: s.mask.flip(1), "padded on the right")),
    call("attention_mask", attention_mask=later(lambda s: s.mask.bool(), "bool")),
    call("attention_mask", attention_mask=later(lambda s: s.mask.float(), "float")),
    call("attention_mask", attention_mask=later(lambda s: torch.zeros_like(s.mask), "zeros")),
    call("position_ids", position_ids=later(lambda s: (s.mask.cumsum(1) - 1).clamp(0), "of the mask")),
    call("generation_config", generation_config=GenerationConfig(**GREEDY), max_new_tokens=3),
    call("generation_config", generation_config=GenerationConfig(**GREEDY, num_beams=2)),
    call("generation_config", generation_config=GenerationConfig(**GREEDY, cache_implementation="dynamic")),
    call("logits_processor", logits_processor=later(lambda s: LogitsProcessorList([Counting(s.seen)]), "counting")),
    call("stopping_criteria", stopping_criteria=later(lambda s: StoppingCriteriaList([After(11)]), "by row")),
    call(
        "stopping_criteria eos_token_id",
        stopping_criteria=later(lambda s: StoppingCriteriaList([After(11)]), "by row"),
        eos_token_id=None,
    ),
    call("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn=lambda row, ids: [3 + row, 40, 41, 90]),
    call("prefix_allowed_tokens_fn num_beams", prefix_allowed_tokens_fn=lambda row, ids: [3, 40, 90], num_beams=2),
    call("synced_gpus", synced_gpus=False),
    call("assistant_model", **ASSISTED),
    call("assistant_model do_sample", **ASSISTED, **SAMPLE),
    call("streamer", streamer=later(lambda s: Listening(s.seen), "listening")),
    call(
        "negative_prompt_ids guidance_scale",
        negative_prompt_ids=later(lambda s: s.ids[:, :4], "ids"),
        guidance_scale=2.0,
    ),
    call(
        "negative_prompt_attention_mask",
        negative_prompt_ids=later(lambda s: s.ids, "ids"),
        guidance_scale=1.5,
        negative_prompt_attention_mask=later(lambda s: s.mask, "mask"),
    ),
    call("custom_generate", custom_generate=twice),
    call("custom_generate", custom_generate="nobody/nothing"),
    # lengths
    call("max_length", max_length=12, max_new_tokens=None),
    call("max_length", max_length=4, max_new_tokens=None),
    *(call("max_new_tokens", max_new_tokens=n) for n in (0, 1, 2, 40)),
    call("min_length", min_length=13, eos_token_id=later(first_token, "first")),
    call("min_new_tokens", min_new_tokens=3, eos_token_id=later(first_token, "first")),
    call("max_time", max_time=0.0),
    call("max_time", max_time=600.0),
    call("stop_strings", stop_strings=[f"w{i}" for i in range(2, 60)], tokenizer=TOKENIZER),
    call("stop_strings", stop_strings=["w5"]),
    # ways
    call("do_sample", **SAMPLE),
    call("do_sample", **SAMPLE, eos_token_id=list(range(1, 60))),
    call("num_beams", num_beams=3),
    call("num_beams do_sample", num_beams=3, **SAMPLE),
    call("num_beams", num_beams=2, eos_token_id=list(range(1, 60))),
    call("num_beams", num_beams=2, **ALL_OUTPUTS),
    call("early_stopping", num_beams=3, early_stopping=True, eos_token_id=list(range(1, 30))),
    call("early_stopping", num_beams=3, early_stopping="never", eos_token_id=list(range(1, 30))),
    call("length_penalty", num_beams=3, length_penalty=-2.0, eos_token_id=list(range(1, 30))),
    call("num_return_sequences", num_return_sequences=2, **SAMPLE),
    call("num_return_sequences", num_return_sequences=2, num_beams=3),
    call("num_return_sequences", num_return_sequences=2),
    call("num_beam_groups diversity_penalty", num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    call("penalty_alpha", penalty_alpha=0.6, top_k=4),
    call("low_memory", penalty_alpha=0.6, top_k=4, low_memory=True),
    call("dola_layers", dola_layers="low"),
    call("constraints", constraints=[], num_beams=2),
    call("force_words_ids", force_words_ids=[[5]], num_beams=2),
    call("use_mtp", use_mtp=True),
    call("use_mtp", use_mtp=False),
    # caches
    call("use_cache", use_cache=False),
    call("use_cache", use_cache=True),
    call("use_cache output_logits", use_cache=False, output_logits=True, return_dict_in_generate=True),
    *(call("cache_implementation", cache_implementation=name) for name in ALL_CACHE_IMPLEMENTATIONS),
    call("cache_implementation", cache_implementation="static", num_beams=2),
    call("cache_implementation", cache_implementation="fast"),
    call("cache_config", cache_implementation="quantized", cache_config={"nbits": 4}),
    call("max_cache_len", max_cache_len=64, cache_implementation="static"),
    call("prefill_chunk_size", prefill_chunk_size=4),
    call("prefill_chunk_size", prefill_chunk_size=4, cache_implementation="static"),
    call("past_key_values", past_key_values=later(lambda s: DynamicCache(config=s.model.config), "dynamic")),
    call("past_key_values", past_key_values=later(lambda s: StaticCache(s.model.config, max_cache_len=32), "static")),
    call("past_key_values", past_key_values=later(lambda s: StaticCache(s.model.config, max_cache_len=4), "too short")),
    # what tokens are chosen from
    *(
        call(name, **{name: value}, **SAMPLE)
        for name, value in (
            ("temperature", 0.3),
            ("temperature", 5.0),
            ("top_k", 3),
            ("top_k", 0),
            ("top_p", 0.5),
            ("min_p", 0.2),
            ("top_h", 0.5),
            ("typical_p", 0.5),
            ("epsilon_cutoff", 0.01),
            ("eta_cutoff", 0.01),
            ("renormalize_logits", True),
            ("remove_invalid_values", True),
        )
    ),
    call("temperature", temperature=-1.0, **SAMPLE),
    *(
        call(name, **{name: value})
        for name, value in (
            ("repetition_penalty", 1.5),
            ("encoder_repetition_penalty", 1.5),
            ("no_repeat_ngram_size", 2),
            ("encoder_no_repeat_ngram_size", 2),
            ("bad_words_ids", [[5], [7, 8]]),
            ("forced_bos_token_id", 5),
            ("forced_eos_token_id", 7),
            ("suppress_tokens", list(range(60))),
            ("begin_suppress_tokens", [5, 6]),
            ("exponential_decay_length_penalty", (2, 1.5)),
            ("sequence_bias", [[[5], 20.0], [[7], -3.0]]),
            ("guidance_scale", 1.5),
            ("watermarking_config", WatermarkingConfig()),
            ("diversity_penalty", 0.5),
        )
    ),
    call("watermarking_config", watermarking_config=WatermarkingConfig(bias=4.0, seeding_scheme="selfhash"), **SAMPLE),
    call("token_healing", token_healing=True, tokenizer=TOKENIZER),
    call("token_healing", token_healing=True),
    # special tokens
    call("eos_token_id", eos_token_id=None),
    call("eos_token_id", eos_token_id=later(first_token, "first")),
    call("eos_token_id", eos_token_id=list(range(1, 100))),
    call("eos_token_id", eos_token_id=later(first_token, "first"), **ALL_OUTPUTS),
    call("pad_token_id", pad_token_id=5, eos_token_id=list(range(1, 64))),
    call("pad_token_id", pad_token_id=None, eos_token_id=list(range(1, 64))),
    call("bos_token_id", bos_token_id=2),
    call("bos_token_id", inputs=None, attention_mask=None, bos_token_id=2),
    call("decoder_start_token_id", decoder_start_token_id=2),
    # results
    call("return_dict_in_generate", return_dict_in_generate=True),
    *(
        call(name, **{name: True}, return_dict_in_generate=True)
        for name in ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    ),
    call("output_scores output_logits output_hidden_states", **ALL_OUTPUTS),
    call("output_logits do_sample", **ALL_OUTPUTS, **SAMPLE),
    call("output_attentions", output_attentions=True),
    call("output_hidden_states", output_hidden_states=True),
    # drafts
    call("prompt_lookup_num_tokens", **LOOKUP),
    call("max_matching_ngram_size", **LOOKUP, max_matching_ngram_size=1),
    call("prompt_lookup_num_tokens output_logits", **LOOKUP, **ALL_OUTPUTS),
    call("assistant_early_exit", assistant_early_exit=1),
    *(
        call(name, **{name: value}, **ASSISTED)
        for name, value in (
            ("num_assistant_tokens", 3),
            ("num_assistant_tokens_schedule", "constant"),
            ("num_assistant_tokens_schedule", "heuristic"),
            ("assistant_confidence_threshold", 0.9),
            ("is_assistant", True),
            ("assistant_lookbehind", 5),
            ("target_lookbehind", 5),
            ("assistant_ensemble_weight", 0.5),
            ("speculation_type", "default"),
        )
    ),
    call("assistant_lookbehind target_lookbehind", **ASSISTED, tokenizer=TOKENIZER, assistant_tokenizer=TOKENIZER),
    # compilation
    call("compile_config", compile_config=CompileConfig(), cache_implementation="static"),
    call("disable_compile", disable_compile=True, cache_implementation="static"),
    call("continuous_batching_config", continuous_batching_config=ContinuousBatchingConfig()),
    call("trust_remote_code", trust_remote_code=False),
    call("an argument that does not exist", no_such_argument=3),
    call("logits_to_keep", logits_to_keep=1),
]


def add(case: Case) -> Case:
    CASES.append(case)
    return case


@add
@scenario("inputs generation_config logits_processor stopping_criteria", "by position")
def by_position(generate: Generate, s: Setup) -> object:
    config = GenerationConfig(**GREEDY)
    processors, criteria = LogitsProcessorList([Counting(s.seen)]), StoppingCriteriaList([After(12)])
    return generate(s.ids, config, processors, criteria, attention_mask=s.mask)


@add
@scenario("inputs", "no token")
def no_token(generate: Generate, s: Setup) -> object:
    return generate(s.ids[:, :0], **GREEDY)


@add
@scenario("inputs", "one token")
def one_token(generate: Generate, s: Setup) -> object:
    return generate(s.ids[:, -1:], **GREEDY)


@add
@scenario("inputs", "beyond the model's positions")
def long_prompt(generate: Generate, s: Setup) -> object:
    return generate(s.ids.repeat(1, 30), **GREEDY)


@add
@scenario("inputs", "ids that the model does not have")
def unknown_ids(generate: Generate, s: Setup) -> object:
    return generate(s.ids + VOCABULARY, **GREEDY)


@add
@scenario("inputs", "one row without a batch")
def without_a_batch(generate: Generate, s: Setup) -> object:
    return generate(s.ids[-1], **GREEDY)


@add
@scenario("inputs", "int32")
def narrow_ids(generate: Generate, s: Setup) -> object:
    return generate(s.ids.int(), attention_mask=s.mask, **GREEDY)


@add
@scenario("past_key_values", "handed on to the next call")
def handed_on(generate: Generate, s: Setup) -> object:
    first = generate(s.ids, attention_mask=s.mask, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.full((len(s.ids), 2), 7)], 1)
    mask = torch.cat([s.mask, torch.ones(len(s.ids), ids.shape[1] - s.mask.shape[1], dtype=torch.long)], 1)
    return first, generate(ids, attention_mask=mask, past_key_values=cache_of(first), **GREEDY)


@add
@scenario("past_key_values", "handed on, and many tokens more")
def handed_on_far(generate: Generate, s: Setup) -> object:
    first = generate(s.ids, attention_mask=s.mask, **GREEDY, return_dict_in_generate=True)
    mask = torch.cat([s.mask, torch.ones_like(first.sequences[:, s.mask.shape[1] :])], 1)
    longer = {**GREEDY, "max_new_tokens": 300, "eos_token_id": None}
    return generate(first.sequences, attention_mask=mask, past_key_values=cache_of(first), **longer)


@add
@scenario("past_key_values", "of a forward, used by two calls")
def prefix(generate: Generate, s: Setup) -> object:
    with torch.no_grad():
        cache = s.model(s.ids[:, :-2], attention_mask=s.mask[:, :-2], use_cache=True).past_key_values
    return [generate(s.ids, attention_mask=s.mask, past_key_values=copy.deepcopy(cache), **GREEDY) for _ in range(2)]


@add
@scenario("past_key_values", "kept by the caller while others generate")
def kept(generate: Generate, s: Setup) -> object:
    first = generate(s.ids, attention_mask=s.mask, **GREEDY, return_dict_in_generate=True)
    generate(s.ids.flip(1), **GREEDY)
    ids = torch.cat([first.sequences, torch.full((len(s.ids), 2), 7)], 1)
    return generate(ids, past_key_values=cache_of(first), **GREEDY)


@add
@scenario("streamer", "generate inside of generate")
def nested(generate: Generate, s: Setup) -> object:
    class Asking(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == s.ids.shape[1] + 2:
                s.seen.append(generate(s.ids.flip(1), **GREEDY).tolist())
            return scores

    return generate(s.ids, attention_mask=s.mask, **GREEDY, logits_processor=LogitsProcessorList([Asking()]))


@add
@scenario("logits_processor", "after one that raised")
def after_an_error(generate: Generate, s: Setup) -> object:
    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > s.ids.shape[1] + 1:
            raise KeyError("mine")
        return scores

    ends = {**GREEDY, "eos_token_id": list(range(1, 64))}
    try:
        generate(s.ids, attention_mask=s.mask, **ends, logits_processor=LogitsProcessorList([fail]))
    except KeyError:
        s.seen.append("raised")
    return generate(s.ids, attention_mask=s.mask, **GREEDY)


def cache_of(result: object) -> object:
    """Renamed in transformers 5.24."""
    return result["cache"] if "cache" in result else result["past_key_values"]


# not for a call of generate: why
NOT_ASKED = {
    "_from_model_config": "written by transformers",
    "transformers_version": "written by transformers",
}


def undecided() -> list[str]:
    """Parameters of ``generate`` and fields of ``GenerationConfig`` that no case is about."""
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    covered = {name for case in CASES for name in case.covers}
    return sorted((parameters | set(vars(GenerationConfig()))) - covered - set(NOT_ASKED))
