"""A tiny model with a tokenizer: as an engine, and in a folder, as ``from_pretrained`` wants it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models import CONFIGS, HIDDEN, LAYERS, SETTINGS, VOCABULARY, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token: ASCII, blank, newline, some bytes of longer characters; two special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*alphabet[:94], "Ġ", "Ċ", "Ã", "â", *alphabet[94:]][: VOCABULARY - 2]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE)


def tiny_engine() -> TIDE:
    """Some tokens leave early; replies end at the tokenizer's end token."""
    model = tiny("rmsnorm-rope-gqa")
    model.generation_config.eos_token_id = byte_tokenizer().eos_token_id
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    return TIDE(model, bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))


def save_tiny(folder: Path, layers: int) -> Path:
    """Write a random model and its tokenizer."""
    config, tokenizer = CONFIGS["rmsnorm-rope-gqa"](), byte_tokenizer()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
