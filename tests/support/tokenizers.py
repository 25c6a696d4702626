"""Tokenizers that need no download, and tiny models with them: as an engine, and in a folder to load from."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.support.models import CONFIGS, HIDDEN, LAYERS, SETTINGS, VOCABULARY, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORD_TEMPLATE = "{% for m in messages %}w9 {{ m['content'] }} w10 {% endfor %}"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """``w2`` to ``w127``, a token each; token 0 pads and stands for what is unknown, 1 ends."""
    numbers = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<pad>", eos_token="<end>")


def every_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, all 256: more than the tiny models have; a character may be several."""
    return PreTrainedTokenizerFast(tokenizer_object=_bytes(sorted(pre_tokenizers.ByteLevel.alphabet())))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token: ASCII, blank, newline, some bytes of longer characters; two special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = _bytes([*alphabet[:94], "Ġ", "Ċ", "Ã", "â", *alphabet[94:]][: VOCABULARY - 2])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE)


def _bytes(alphabet: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their blank in front, which the decoder drops at the beginning of a text; 0 pads and is unknown,
    1 ends."""
    numbers = {"<pad>": 0, "<end>": 1} | {f"\u2581w{i}": i for i in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<pad>", eos_token="<end>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, blanks as ``\u2581``, and a token per byte for all else; the first blank of a text is dropped."""
    names = ["<unk>", "<end>", "a", "b", "\u2581", "\u2581a", *(f"<0x{i:02X}>" for i in range(256))]
    numbers = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.BPE(numbers, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and pieces that go on with one; punctuation loses the blank before it."""
    names = ["[UNK]", "[SEP]", "a", "b", "##b", "##c", ".", ",", "'", "s", "not", "do"]
    inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[SEP]")


def word_end_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of which the last of a word says so."""
    names = ["<unk>", "<end>", "a", "b", "a</w>", "b</w>", ".</w>"]
    inner = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """Many blanks, and a decoder that drops all at the beginning of a text."""
    names = ["<unk>", "<end>", "\u2581", "\u2581\u2581", "\u2581a", "a", "b"]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 99, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


TOKENIZERS = {
    "words": word_tokenizer,
    "all bytes": every_byte_tokenizer,
    "some bytes": byte_tokenizer,
    "metaspace": metaspace_tokenizer,
    "byte fallback": byte_fallback_tokenizer,
    "blanks": blank_tokenizer,
    "word pieces": word_piece_tokenizer,
    "word ends": word_end_tokenizer,
    "slow": ByT5Tokenizer,
}


def tiny_engine() -> TIDE:
    """Some tokens leave early; replies end at the tokenizer's end token."""
    model = tiny("rmsnorm-rope-gqa")
    model.generation_config.eos_token_id = byte_tokenizer().eos_token_id
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    return TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))


def save_tiny(folder: Path, layers: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a random model and its tokenizer (of bytes, if none is given)."""
    config, tokenizer = CONFIGS["rmsnorm-rope-gqa"](), tokenizer or byte_tokenizer()
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
