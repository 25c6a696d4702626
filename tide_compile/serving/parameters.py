"""Parameters that are not supported: which leave the reply as it is, and how the others are refused."""

from __future__ import annotations

import json

from tide_compile.serving.errors import ApiError

# With the values that leave the reply as it is, as clients send them; null always does. All other names are refused.
_NEUTRAL = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "frequency_penalty": (0,),
    "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,), "logit_bias": ({},), "min_p": (0,),
    "min_tokens": (0,), "num_beams": (1,), "use_beam_search": (False,), "early_stopping": (False,),
    "ignore_eos": (False,), "stop_token_ids": ([],), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template_kwargs": ({},), "documents": ([],),
}  # fmt: skip
# About accounts, caches and prices, not about the reply.
_HARMLESS = (
    "user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "prediction", "parallel_tool_calls",
)  # fmt: skip
_SHOWN = 5  # names in one message


def refuse_unsupported(extra: dict[str, object]) -> None:
    """Raises ApiError (400), with their names, if some of the fields that no request has would change the reply."""
    wrong = [name for name, value in extra.items() if value is not None and not _is_neutral(name, value)]
    if not wrong:
        return
    found = [_refusal(name[:64]) for name in wrong[:_SHOWN]]
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise ApiError(400, "; ".join(found) + more + ".", param=wrong[0][:64], code="unsupported_parameter")


def describe_unsupported(schema: dict[str, object]) -> None:
    """Put them into the JSON schema of a request."""
    schema["additionalProperties"] = False
    neutral = {name: {"enum": [*values, None]} for name, values in _NEUTRAL.items()}
    schema["properties"] |= neutral | {name: {} for name in _HARMLESS}


def _is_neutral(name: str, value: object) -> bool:
    alike = (value == known and isinstance(value, bool) == isinstance(known, bool) for known in _NEUTRAL.get(name, ()))
    return name in _HARMLESS or any(alike)


def _refusal(name: str) -> str:
    only = [json.dumps(value) for value in _NEUTRAL.get(name, ())]
    return f"{name} is not supported: leave it out" + (f" or send {' or '.join(only)}" if only else "")
