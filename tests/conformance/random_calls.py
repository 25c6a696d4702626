"""Random sets of arguments that ``generate`` takes together."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from transformers import LogitsProcessorList, StoppingCriteriaList

from tests.conformance.cases import ALL_OUTPUTS, After, Case, Counting, Listening, call, later
from tests.support.models import VOCABULARY

_TOKEN = st.integers(2, VOCABULARY - 1)
_PROCESSORS = {
    "repetition_penalty": st.floats(0.5, 3),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(st.lists(_TOKEN, min_size=1, max_size=2), min_size=1, max_size=5),
    "suppress_tokens": st.lists(_TOKEN, min_size=1, max_size=40, unique=True),
    "begin_suppress_tokens": st.lists(_TOKEN, min_size=1, max_size=40, unique=True),
    "min_new_tokens": st.integers(0, 6),
    "forced_eos_token_id": _TOKEN,
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 3), st.floats(1.01, 2)),
    "renormalize_logits": st.booleans(),
    "remove_invalid_values": st.booleans(),
    "guidance_scale": st.floats(0.5, 2),
}
_SAMPLING = {
    "temperature": st.floats(0.2, 3),
    "top_k": st.integers(0, 20),
    "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 0.5),
    "typical_p": st.floats(0.2, 1),
}
_BEAMS = {
    "length_penalty": st.floats(-2, 2),
    "early_stopping": st.sampled_from([True, False, "never"]),
}
_OTHERS = {
    "use_cache": st.booleans(),
    "cache_implementation": st.sampled_from(["dynamic", "static", "dynamic_full"]),
    "return_dict_in_generate": st.just(True),
    "prefill_chunk_size": st.integers(2, 5),
    "logits_processor": st.just(later(lambda s: LogitsProcessorList([Counting(s.seen)]), "counting")),
    "stopping_criteria": st.integers(10, 13).map(
        lambda n: later(lambda s: StoppingCriteriaList([After(n)]), f"after {n} tokens")
    ),
}


@st.composite
def random_calls(draw: DrawFn) -> Case:
    """A call of greedy search, sampling, beam search or prompt lookup with any other arguments."""
    way = draw(st.sampled_from(["greedy", "sample", "beams", "beam sample", "lookup", "return all"]))
    chosen: dict[str, object] = {
        "max_new_tokens": draw(st.integers(1, 8)),
        "eos_token_id": draw(st.one_of(_TOKEN, st.lists(_TOKEN, min_size=1, max_size=60, unique=True), st.none())),
        "do_sample": way in ("sample", "beam sample"),
    }
    pools = [_PROCESSORS, _OTHERS]
    if "sample" in way:
        pools.append(_SAMPLING)
    if "beam" in way:
        chosen["num_beams"] = draw(st.integers(2, 3))
        pools.append(_BEAMS)
        if draw(st.booleans()):
            chosen["num_return_sequences"] = draw(st.integers(1, chosen["num_beams"]))
    elif way == "lookup":
        chosen["prompt_lookup_num_tokens"] = draw(st.integers(1, 4))
    elif way == "return all":
        chosen |= ALL_OUTPUTS
    for pool in pools:
        for name in draw(st.lists(st.sampled_from(sorted(pool)), max_size=3, unique=True)):
            chosen[name] = draw(pool[name])
    if "num_beams" not in chosen and draw(st.booleans()):
        chosen["streamer"] = later(lambda s: Listening(s.seen), "listening")
    return call("", **chosen)
