"""Every causal language model that transformers knows, tiny and with random weights, and shapes that are used widely.

The names of model families in this file are for measuring alone; the compiler knows none.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS = 128, 4
_LARGEST = 50_000_000  # parameters

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "is_decoder": True,
    "decoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "mamba_d_state": 16,
}  # fmt: skip

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SPARSE = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
_OF_TYPE = {
    "axk2": _SPARSE,
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}},
    "deepseek_v32": _SPARSE,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        **_SPARSE, "head_dim": 16, "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention",
        "indexed_attention"], **{f"swa_{n}": v for n, v in {
            "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
            "qk_nope_head_dim": 8, "v_head_dim": 16}.items()}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64}},
    "dots3_note": {"vision_config": {"adapter_in_dim": 64}, "audio_config": {"adapter_input_size": 64}},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 16,
        "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "num_experts": None},
    "glm_moe_dsa": _SPARSE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2,
        "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},
    "moshi": {"audio_vocab_size": 32, "ffn_dim": 192},
    "plbart": {"decoder_attention_heads": 4},
    "qwen4_exp_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16)},
    "whisper": {"encoder_attention_heads": 4},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "attention_head_dim": 32, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# widely used models whose architecture is not their own: (model type, what is particular about them)
SHAPES = {
    "CodeLlama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "TinyLlama": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "Llama 3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "DistilGPT-2": ("gpt2", {"n_layer": 3}),
    "Pythia": ("gpt_neox", {"use_parallel_residual": True, "rotary_pct": 0.25}),
    "Qwen2.5 with a window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "Phi-4": ("phi3", {"num_key_value_heads": 2, "partial_rotary_factor": 0.75}),
    "Falcon, old decoder": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "Falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon with alibi": ("falcon", {"alibi": True}),
    "OPT, projected embeddings": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}  # fmt: skip


def names() -> list[str]:
    """All model types of transformers' causal LM mapping, then the shapes."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SHAPES]


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model whose hidden states change visibly from layer to layer.

    Raises:
        ValueError: the config does not get small.
        Exception: whatever the family's own code raises for a small config.
    """
    config = config_of(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > _LARGEST:
        raise ValueError(f"{count / 1e6:.0f}M parameters are left when the usual sizes are small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(3)
    return model


def config_of(name: str) -> PretrainedConfig:
    """The config of a tiny model, made of the sizes that every family shares and its ``_OF_TYPE``."""
    model_type, extra = SHAPES.get(name, (name, {}))
    kind = CONFIG_MAPPING[model_type]
    return kind(**_small(kind, {**_OF_TYPE.get(model_type, {}), **extra}))


def _small(kind: type[PretrainedConfig], extra: dict[str, object]) -> dict[str, object]:
    names = {f.name for f in dataclasses.fields(kind)}
    sizes = {kind.attribute_map.get(n, n): v for n, v in _SMALL.items()}
    if "kv_lora_rank" in names:  # latent attention has a key for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    chosen = {n: v for n, v in {**sizes, **extra}.items() if n in names or n in extra}
    for field in {"layer_types", "mlp_layer_types"} & (names - set(extra)):
        kinds = list(dict.fromkeys(_default(kind, field) or ()))
        if kinds:
            chosen[field] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    for field, sub in kind.sub_configs.items():
        sub = sub if dataclasses.is_dataclass(sub) else type(_default(kind, field))
        if field in names and dataclasses.is_dataclass(sub):
            given = {**_OF_TYPE.get(sub.model_type, {}), **extra.get(field, {})}
            chosen[field] = {"model_type": sub.model_type, **_small(sub, given), **extra.get(field, {})}
    return chosen


def _default(kind: type[PretrainedConfig], field: str) -> object:
    try:
        return getattr(kind(), field)
    except Exception:  # some defaults contradict each other
        return None
