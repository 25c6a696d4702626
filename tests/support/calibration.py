"""A calibration that takes a moment: a tokenizer and texts for tiny models, and a config with few steps."""

import torch

from tests.support.models import VOCABULARY
from tide_compile import TIDEConfig, calibrate

CONFIG = TIDEConfig(checkpoint_interval=1, min_layers=1, router_bottleneck_dim=8, distillation_steps=8)


class Characters:
    """A tokenizer for tiny models: a character is a token."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts, truncation=True, max_length=64):
        return {"input_ids": [[ord(c) % VOCABULARY for c in text][:max_length] for text in texts]}


def texts(number, length=40):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(97, 122, (number, length), generator=generator).tolist()
    return ["".join(map(chr, row)) for row in rows]


def run(model, source, **kwargs):
    return calibrate(model, Characters(), kwargs.pop("config", CONFIG), dataset=source, progress=False, **kwargs)
