"""The pages that are drawn from traces and from plans."""

import copy
import html.parser
import json
import re
import shutil
import subprocess

import pytest
import torch

import tide_compile
from tests.support.models import GENERATE, HIDDEN, LAYERS, prompt
from tests.support.tokenizers import every_byte_tokenizer, tiny_engine
from tide_compile import RouterBank
from tide_compile.inspection.plan_page import plan_page
from tide_compile.passes.program import segment_name
from tide_compile.runtime.piece_times import EXECUTOR, Times


@pytest.fixture(scope="module")
def trace():
    """Of what two sequences, one of them padded, go on with."""
    ids, mask = prompt(2)
    engine = tiny_engine()
    engine.generate(ids, attention_mask=mask, trace=True, **{**GENERATE, "eos_token_id": 300})  # which no token is
    return engine.last_trace


class Spans(html.parser.HTMLParser):
    """Start tags with their attributes, and the text of tokens."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "span" and "data-id" in dict(attrs)
        if self._inside:
            self.texts.append("")

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data

    def handle_endtag(self, tag):
        self._inside = False


def stands_alone(page):
    tags = Spans(page).tags
    asks = [t for t in tags if {"src", "href", "srcset", "data", "action"} & t[1].keys() or t[0] in ("link", "iframe")]
    return not asks and not re.search(r"https?://|url\(|@import|fetch\(|import\(", page)


@pytest.fixture
def token_page(trace):
    trace = copy.copy(trace)
    trace.ids, given = (
        trace.ids[1:].clone(),
        every_byte_tokenizer()("<b>&\né")["input_ids"],
    )  # the sequence without padding
    trace.layers, trace.scores = trace.layers[1:], trace.scores[1:]
    trace.ids[0, : len(given)] = torch.tensor(given)
    return trace, trace.to_html(tokenizer=every_byte_tokenizer(), title="<script>")


@pytest.fixture
def plan(model):
    bank = RouterBank.untrained(HIDDEN, LAYERS, layers=[1], bottleneck_dim=16)
    options = {"router": bank, "min_layers": 2, "checkpoint_interval": 2}
    ids, mask = prompt(2)
    found = tide_compile.explain(model, ids, attention_mask=mask, options=options)
    stats = tide_compile.ExitStats()
    stats.add(LAYERS, {1: 30}, 10)
    first, second, masked = segment_name(0), segment_name(1), segment_name(1, "masked")
    seconds = {EXECUTOR: [0.004, 0.004], first: [0.001] * 2, second: [0.002], masked: [0.0005]}
    return found, plan_page(found.main, stats, Times(seconds), "A plan")


def test_token_page(token_page, tmp_path):
    """Every token once, as it is, by layer. Catches text that becomes markup, and a page that needs the network."""
    trace, page = token_page
    (tokens,) = trace.tokens(every_byte_tokenizer())
    spans = [a for tag, a in Spans(page).tags if tag == "span" and "data-id" in a]
    assert Spans(page).texts == [t.text for t in tokens] and "".join(Spans(page).texts).startswith("<b>&\né")
    assert [int(a["data-layer"]) for a in spans] == [t.layer for t in tokens]
    assert all(("early" in a["class"].split()) == (t.layer < LAYERS - 1) for a, t in zip(spans, tokens, strict=True))
    assert stands_alone(page) and "<title>&lt;script&gt;" in page
    trace.to_html(tmp_path / "page.html")
    assert len([a for _, a in Spans((tmp_path / "page.html").read_text()).tags if "data-id" in a]) == len(tokens)


def test_plan_page(plan):
    """Shares and times of the segment they belong to; nothing of the kind where nothing was measured."""
    found, page = plan
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "75.0 % 30 tokens" in text and "75.0 % of 40 tokens left early" in text
    assert "1.00 ms 100 % run" in text and "1.25 ms 25 % run" in text and "4.0 ms per call" in text
    assert page.count('class="layer depth"') == LAYERS and page.count('class="gate depth"') == 1
    assert stands_alone(page)
    bare = found.to_html()
    assert " ms</b>" not in bare and "left early" not in bare and bare.count('class="layer depth"') == LAYERS


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
PROBE = """<script>
function rgb(color) {
  const c = document.createElement("canvas").getContext("2d", { colorSpace: "srgb" });
  c.fillStyle = color; c.fillRect(0, 0, 1, 1);
  return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function light(color) {
  const [r, g, b] = rgb(color).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(selector, behind) {
  const all = [...document.querySelectorAll(selector)].map(e => {
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(behind(e)).backgroundColor].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  return Math.min(...all);
}
const found = { paper: light(getComputedStyle(document.body).backgroundColor),
  text: contrast("h1, p.lead", () => document.body), wide: document.documentElement.scrollWidth <= innerWidth };
const token = document.querySelector(".t");
if (token) {
  found.token = contrast("p:not(.prompt) .t.early", e => e);
  token.focus();
  token.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  found.tip = document.getElementById("tip").textContent;
  found.shown = getComputedStyle(document.getElementById("tip")).visibility;
  found.at = [...document.querySelectorAll(".t")].indexOf(document.activeElement);
} else found.layer = contrast(".layer > span", e => e.parentElement.querySelector("i"));
document.title = "found" + JSON.stringify(found);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("which", ["token_page", "plan"])
def test_in_a_browser(which, scheme, tmp_path, request):
    """Follows the colour scheme, is legible in both (WCAG's 4.5), and tells of a token that the keyboard has reached.
    Catches an error in the script, and colours for one scheme only."""
    file = tmp_path / "page.html"
    file.write_text(request.getfixturevalue(which)[1] + PROBE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    flags += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--window-size=1000,800"]
    dom = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=60).stdout
    found = json.loads(re.search(r"<title>found(\{.*?\})</title>", dom).group(1))
    assert (found["paper"] > 0.5) == (scheme == "light")
    assert found["text"] >= 4.5 and found["wide"] and found.get("token", found.get("layer")) >= 4.5
    if which == "token_page":
        assert found["at"] == 1 and found["shown"] == "visible" and '"b"' in found["tip"] and "score" in found["tip"]
