"""The corpus of a calibration: text the model writes, chat templates, interruptions, several processes."""

import os

import pytest
import torch
import torch.multiprocessing as mp

from tests.support.calibration import Characters, run, texts
from tests.support.models import VOCABULARY, tiny
from tide_compile.errors import CalibrationDataError
from tide_compile.text import corpus as corpus_module
from tide_compile.text.corpus import Corpus


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus_module, "SHARD", 8)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts(40, 120)))
    return path


def rows(corpus, limit):
    return [row for shard in corpus.shards(limit) for row in shard()]


def test_text_of_the_model(small_shards, file):
    """After the beginnings of texts, in the same part as the text, and the same again. Catches prompts that count, a
    held-out text whose continuation is fitted, and sampling without a seed."""
    made = rows(Corpus(f"{file}+self", tiny("rmsnorm-rope-gqa"), Characters(), self_length=6, max_length=40), 40)
    read, written = made[:20], made[20:]
    assert len(written) == 20 and [r.held_out for r in read] == [r.held_out for r in written]
    for text, row in zip(read, written, strict=True):
        assert row.ids[:32] == text.ids[:32] and row.start == 31 and 32 < len(row.ids) <= 38
    again = rows(Corpus(f"{file}+self", tiny("rmsnorm-rope-gqa"), Characters(), self_length=6, max_length=40), 40)
    assert again == made


def test_no_data_at_all(small_shards):
    corpus = Corpus("self", tiny("rmsnorm-rope-gqa"), Characters(), self_length=4)
    made = rows(corpus, 10)
    assert len(made) == 10 and len({tuple(r.ids) for r in made}) > 1
    prompts = corpus.prompts(5, limit=10)
    assert len(prompts) == 5
    assert not any(row.ids[:8] == prompt[:8] for row in made for prompt in prompts)


def test_prompts_are_texts_that_were_not_read(file):
    corpus = Corpus(file, tiny("rmsnorm-rope-gqa"), Characters())
    prompts = corpus.prompts(10, limit=35)
    assert prompts == [[ord(c) % VOCABULARY for c in text[:32]] for text in texts(40, 120)[35:]]


class Chatting(Characters):
    chat_template = "there is one"

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        return {"input_ids": [[1, *map(ord, m["content"][:3]), 2] for (m,) in messages]}


def test_chat(file):
    made = rows(Corpus(file, tiny("rmsnorm-rope-gqa"), Chatting(), chat=True), 5)
    assert all(r.ids[0] == 1 and r.ids[-1] == 2 for r in made)
    with pytest.raises(CalibrationDataError, match="no"):
        Corpus(file, tiny("rmsnorm-rope-gqa"), Characters(), chat=True)


def same(one, two):
    pairs = zip(one, two, strict=True)
    return all(torch.allclose(a, b, atol=1e-4) for p, q in pairs for a, b in zip(p[:2], q[:2], strict=True))


@pytest.mark.parametrize("touched", [False, True])
def test_interrupted(small_shards, file, tmp_path, monkeypatch, touched):
    """Going on gives what an undisturbed run gives, without reading again what was read, unless the file was written
    in the meantime. Catches tokens that count twice, and half of an older text."""
    whole = run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=tmp_path / "whole.safetensors")
    read = []
    original = Characters.__call__

    def failing(self, batch, **kwargs):
        read.append(len(batch))
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(self, batch, **kwargs)

    monkeypatch.setattr(Characters, "__call__", failing)
    path = tmp_path / "r.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=path)
    assert not path.exists()
    if touched:
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    bank = run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=path)
    again = 5 if touched else 2  # shards, after three and the one that failed; all five to refine with
    assert read == [8] * (4 + again + 5)
    assert bank.metadata["texts"] == 40 and bank.metadata["tokens"] == whole.metadata["tokens"]
    assert same(bank.projections.values(), whole.projections.values())
    assert same(bank.shortcuts.values(), whole.shortcuts.values())
    assert sorted(p.name for p in tmp_path.glob(".*partial*")) == []


def _process(rank, folder):
    torch.set_num_threads(1)
    corpus_module.SHARD = 8
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    bank = run(tiny("rmsnorm-rope-gqa"), f"{folder}/texts.txt", num_samples=40, save_path=f"{folder}/two.safetensors")
    assert bank.metadata["texts"] == 40


def test_two_processes_are_as_good_as_one(small_shards, file, tmp_path):
    """Catches texts that nobody reads, or both, and sums that are not added."""
    from tide_compile import RouterBank

    one = run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=tmp_path / "one.safetensors")
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    two = RouterBank.load(tmp_path / "two.safetensors")
    assert two.metadata["tokens"] == one.metadata["tokens"] and two.layers == one.layers
    assert same(two.projections.values(), one.projections.values())
