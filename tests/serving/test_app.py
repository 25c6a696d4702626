"""The server, by HTTP on loopback: the same text as offline, OpenAI's shapes, what is refused."""

import asyncio
import contextlib
import json

import httpx
import openai
import pytest

import tide_compile
from bench.serve import serving
from tests.support.models import tiny
from tests.support.tokenizers import metaspace_tokenizer
from tide_compile import TIDE, TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.serving.app import build_app

TOTAL = 128
URL, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def server(engine, tokenizer):
    """With warmup; the module's other tests use it."""
    with serving(build_app(engine, tokenizer, "tiny", total_tokens=TOTAL, max_bytes=4000)) as url:
        yield url


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


def offline(engine, tokenizer, prompt, tokens, **kwargs):
    """Text and ids of the new tokens."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = engine.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **kwargs)
    new = out[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), new.tolist()


def events(text):
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_fifty_at_once(server, engine, tokenizer):
    """None is lost, and each gets its own text, streamed or not. Catches replies that are mixed up, caches that two
    requests share, and a threshold of one request that stays for the next."""
    prompts = [f"prompt number {i} " + "x" * (i % 7) for i in range(50)]
    thresholds = [(None, 0.3, 1.0)[i % 3] for i in range(50)]
    want = []
    for prompt, threshold in zip(prompts, thresholds, strict=True):
        with contextlib.nullcontext() if threshold is None else tide_compile.exit_threshold(threshold):
            want.append(offline(engine, tokenizer, prompt, 12)[0])
    assert len(set(want)) > 25

    async def ask(client, i):
        body = {"model": "tiny", "prompt": prompts[i], "max_tokens": 12, "temperature": 0, "stream": i % 2 == 1}
        if thresholds[i] is not None:
            body["exit_threshold"] = thresholds[i]
        reply = await client.post(URL, json=body)
        assert reply.status_code == 200, reply.text
        if not body["stream"]:
            return reply.json()["choices"][0]["text"]
        *chunks, done = events(reply.text)
        assert done == "[DONE]"
        return "".join(json.loads(c)["choices"][0]["text"] for c in chunks)

    async def all_at_once():
        async with httpx.AsyncClient(base_url=server, timeout=120, limits=httpx.Limits(max_connections=50)) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(50)))

    assert asyncio.run(all_at_once()) == want


def test_openai_client(server, engine, tokenizer):
    """Both endpoints and the list of models through OpenAI's own client. Catches replies of another shape."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    turns = [{"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "hi"}]}]
    want, ids = offline(engine, tokenizer, "[user] say hi [assistant] ", 10)
    chat = client.chat.completions.create(model="tiny", messages=turns, max_tokens=10, temperature=0)
    assert chat.choices[0].message.content == want and chat.choices[0].message.role == "assistant"
    assert chat.choices[0].finish_reason == "length"
    prompt = len("[user] say hi [assistant] ")
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (prompt, len(ids))
    stream = client.chat.completions.create(
        model="tiny", messages=turns, max_tokens=10, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == want
    assert last.usage.completion_tokens == len(ids)
    whole = client.completions.create(model="tiny", prompt=tokenizer("by ids")["input_ids"], temperature=0)
    assert whole.choices[0].text == offline(engine, tokenizer, "by ids", 16)[0]
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="other", prompt="x")


def test_where_a_reply_ends(client, engine, tokenizer):
    """At a stop string, which is cut off however it is split, or at the model's end token. Catches a stop string that
    is sent in part, and a reply that goes on behind it."""
    text, ids = offline(engine, tokenizer, "where to stop", 24)
    stop = text[5:8]
    for stream in (False, True):
        body = {
            "prompt": "where to stop",
            "max_tokens": 24,
            "temperature": 0,
            "stop": ["never", stop],
            "stream": stream,
        }
        reply = client.post(URL, json=body)
        if stream:
            choices = [json.loads(e)["choices"][0] for e in events(reply.text)[:-1]]
            got, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
        else:
            (choice,) = reply.json()["choices"]
            got, reason = choice["text"], choice["finish_reason"]
            assert reply.json()["usage"]["completion_tokens"] < 24
        assert got == text[: text.index(stop)] and reason == "stop"
    end = engine.model.generation_config.eos_token_id
    engine.model.generation_config.eos_token_id = ids[3]
    try:
        choice = client.post(URL, json={"prompt": "where to stop", "temperature": 0}).json()["choices"][0]
    finally:
        engine.model.generation_config.eos_token_id = end
    assert tokenizer(choice["text"])["input_ids"] == ids[: ids.index(ids[3]) + 1]
    assert choice["finish_reason"] == "stop"


def test_sampling_is_by_seed(client):
    """Catches a seed that is set too early (for another request) and sampling that is not the request's."""
    body = {"prompt": "dice", "temperature": 1.5, "top_p": 0.99, "max_tokens": 20}
    texts = [client.post(URL, json=body | {"seed": s}).json()["choices"][0]["text"] for s in (1, 2, 1)]
    free = {client.post(URL, json=body).json()["choices"][0]["text"] for _ in range(4)}
    assert texts[0] == texts[2] != texts[1] and len(free) > 1


def test_exit_threshold_of_a_request(client, engine):
    """Catches one that does not reach the thread that generates."""
    for threshold, share in ((1, 0), (0, 1)):
        client.post(URL, json={"prompt": "how deep", "exit_threshold": threshold})
        assert engine.last_stats.exit_rate == share


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (URL, {}, 400, "prompt"),
        (URL, {"prompt": ""}, 400, "prompt"),
        (URL, {"prompt": ["a", "b"]}, 400, "prompt"),
        (URL, {"prompt": [5, 128]}, 400, "prompt"),
        (URL, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        (URL, {"prompt": "x", "max_tokens": TOTAL}, 400, "max_tokens"),
        (URL, {"prompt": "x" * TOTAL}, 400, "prompt"),
        (URL, {"prompt": [5] * 999, "max_tokens": 1}, 400, "prompt"),
        (URL, {"prompt": []}, 400, "prompt"),
        (URL, {"prompt": [""]}, 400, "prompt"),
        (URL, {"prompt": [[1], [2]]}, 400, "prompt"),
        (URL, {"prompt": "x", "echo": True}, 400, "echo"),
        (URL, {"prompt": "x", "guided_json": {}}, 400, "guided_json"),
        (URL, {"prompt": "x", "min_tokens": 3}, 400, "min_tokens"),
        (URL, {"prompt": "x", "num_beams": 2}, 400, "num_beams"),
        (URL, {"prompt": "x", "stop_token_ids": [5]}, 400, "stop_token_ids"),
        (URL, {"prompt": "x", "ignore_eos": True}, 400, "ignore_eos"),
        (URL, {"prompt": "x", "temprature": 0}, 400, "temprature"),
        (URL, {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        (URL, {"prompt": "x", "stream": True, "stream_options": {"usage": True}}, 400, "stream_options.usage"),
        (URL, {"prompt": "x", "messages": []}, 400, "messages"),
        (URL, {"prompt": "x" * 5000}, 413, None),
        (URL, {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        (URL, {"prompt": "x", "temperature": -1}, 400, "temperature"),
        (URL, {"prompt": "x", "exit_threshold": 1.5}, 400, "exit_threshold"),
        (URL, {"prompt": "x", "stop": ["a"] * 5}, 400, "stop"),
        (URL, {"prompt": "x", "stop": [""]}, 400, "stop.0"),
        (URL, {"prompt": "x", "n": 2}, 400, "n"),
        (URL, {"prompt": "x", "logprobs": 0}, 400, "logprobs"),
        (URL, {"prompt": "x", "top_k": 5}, 400, "top_k"),
        (URL, {"prompt": "x", "model": "gpt"}, 404, "model"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [USER | {"role": "robot"}]}, 400, "messages.0.role"),
        (CHAT, {"messages": [USER | {"role": "tool"}]}, 400, "messages"),
        (CHAT, {"messages": [USER | {"content": None}]}, 400, "messages.0.content"),
        (CHAT, {"messages": [USER | {"content": "x" * TOTAL}]}, 400, "messages"),
        (CHAT, {"messages": [USER], "chat_template": "x"}, 400, "chat_template"),
        (CHAT, {"messages": [USER], "add_generation_prompt": False}, 400, "add_generation_prompt"),
        (CHAT, {"messages": [USER], "continue_final_message": True}, 400, "continue_final_message"),
        (CHAT, {"messages": [USER], "top_logprobs": 3}, 400, "top_logprobs"),
        (CHAT, {"messages": [USER], "max_tokens": 3, "max_completion_tokens": 4}, 400, "max_completion_tokens"),
        (CHAT, {"messages": [USER | {"content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
        (CHAT, {"messages": [USER], "tools": [{}]}, 400, "tools"),
        ("/v1/embeddings", {}, 404, None),
    ],
)  # fmt: skip
def test_refused(client, path, body, status, param):
    """In OpenAI's shape, with the field. Catches a wrong request that is served as if it were another one."""
    reply = client.post(path, json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"].endswith(".") and (param is None or param.partition(".")[0] in error["message"])


def test_refused_bodies(client):
    """Not JSON, not declared as JSON, and too long without saying so."""
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"[]", b"\xff", b"[" * 3000, b'{"prompt": "\\ud800"}'):
        reply = client.post(URL, content=content, headers=headers)
        assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert client.post(URL, content=b'{"prompt": "x"}').status_code == 415
    assert client.post(URL, content=iter([b" " * 1000] * 8), headers=headers).status_code == 413
    wrong = client.get(URL)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


def test_refusals_speak_json(client):
    """With every name, and what may be sent instead as it is sent. Catches ``False``, and all but the first name."""
    body = {"prompt": "x", "echo": True, "modalities": ["audio"], "guided_regex": "a", "response_format": {"type": "x"}}
    assert client.post(URL, json=body).json()["error"]["message"] == (
        "echo is not supported: leave it out or send false; "
        'modalities is not supported: leave it out or send ["text"]; '
        "guided_regex is not supported: leave it out; "
        'response_format is not supported: leave it out or send {"type": "text"}.'
    )
    many = {f"field{i}": 1 for i in range(50)} | {"prompt": "x", "y" * 1000: 1}
    message = client.post(URL, json=many).json()["error"]["message"]
    assert message.endswith("; and 46 more.") and len(message) < 400


def test_harmless_fields(client):
    """Catches a server that refuses what every client library sends."""
    body = {
        "prompt": "x", "n": 1, "user": "me", "frequency_penalty": 0, "logprobs": None, "logit_bias": {},
        "store": False, "metadata": {"a": "b"}, "echo": False, "ignore_eos": False, "min_tokens": 0,
        "guided_json": None, "service_tier": "auto", "best_of": 1, "suffix": None, "stop": None,
    }  # fmt: skip
    assert client.post(URL, json=body).status_code == 200
    usage = {"stream_options": {"include_usage": False, "include_obfuscation": False}, "stream": True}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, USER | {"name": "me"}]
    body = {"messages": turns, "max_tokens": 3, "max_completion_tokens": 3, "top_logprobs": 0, "tools": [], **usage}
    assert client.post(CHAT, json=body).status_code == 200


def test_default_length(client):
    """A prompt that leaves place for a few tokens gets these. Catches a request that is refused for a number of tokens
    that nobody has asked for."""
    for length, want in ((TOTAL - 3, 3), (TOTAL - 1, 1)):
        reply = client.post(URL, json={"prompt": "x" * length, "temperature": 0}).json()
        assert reply["usage"]["completion_tokens"] == want


def test_temperatures_near_zero_are_greedy(client):
    """Catches logits that overflow when they are divided by one: an error of the server's."""
    texts = {
        client.post(URL, json={"prompt": "cold", "temperature": t, "top_p": 1e-300}).json()["choices"][0]["text"]
        for t in (0, 1e-300, 1e-9, 1e-4)
    }
    assert len(texts) == 1


def test_a_model_by_its_name(server, client):
    """Names of hubs have a slash. Catches a route that has none, and a list that says otherwise."""
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == listed and listed["object"] == "model"
    reply = client.get("/v1/models/other/model")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
    named = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    assert named.models.retrieve("tiny").id == "tiny"


def test_a_blank_in_front(engine):
    """Prompt and text together are the text of all tokens. Catches a completion without the blank that its first word
    carries."""
    tokenizer = metaspace_tokenizer()
    with serving(build_app(engine, tokenizer, "org/tiny", total_tokens=TOTAL, warmup=False)) as url:
        reply = httpx.post(f"{url}{URL}", json={"prompt": "w5 w6", "temperature": 0}, timeout=60).json()
        assert httpx.get(f"{url}/v1/models/org%2Ftiny").json()["id"] == "org/tiny"
    want, _ = offline(engine, tokenizer, "w5 w6", 16)
    assert reply["choices"][0]["text"] == f" {want}"


def test_metrics_of_the_server(client, engine):
    """Catches counters of another engine, or none."""
    client.post(URL, json={"prompt": "x", "max_tokens": 4})
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['tide_tokens_total{engine="tiny"}']) == engine.stats.total_tokens > 0
    assert float(lines['tide_requests_total{outcome="completed"}']) >= 1
    assert float(lines["tide_requests_unfinished"]) == 0
    assert client.get("/health").json()["status"] == "ok"


def test_what_cannot_be_served(tokenizer):
    """Catches limits that are no limits, and a request for exits where there are none."""
    engine = TIDE(tiny("rmsnorm-rope-gqa"), config=TIDEConfig(exit_threshold=1.0, lowering="eager"))
    with pytest.raises(ConfigError, match="body_seconds=0"):
        build_app(engine, tokenizer, "tiny", body_seconds=0)
    with pytest.raises(ConfigError, match="waiting=-1"):
        build_app(engine, tokenizer, "tiny", waiting=-1)
    with pytest.raises(ConfigError, match="no tokenizer"):
        build_app(engine, object(), "tiny")
    with serving(build_app(engine, tokenizer, "tiny", warmup=False)) as url:
        reply = httpx.post(f"{url}{URL}", json={"prompt": "x", "exit_threshold": 0.5})
        assert reply.status_code == 400 and "without exits" in reply.json()["error"]["message"]
        assert httpx.post(f"{url}{URL}", json={"prompt": "x", "exit_threshold": 1.0}, timeout=60).status_code == 200
