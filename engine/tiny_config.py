"""Which Mixture-of-Experts architectures transformers has, and a config of each that fits into a test.

Found in transformers' own registry: an architecture counts if its config speaks of experts. A tiny config is the
family's default one with every size that it has made small; what is derived from sizes (layer types, ranks per layer)
the config class derives again by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, EXPERTS, TOP_K = 3, 8, 2
TOKENS: Mapping[str, Any] = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}

# Names of sizes as configs call them, by the small number that stands for them.
_SIZES: Mapping[int, tuple[str, ...]] = {
    1: (
        "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "n_group", "topk_group",
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_expert_group", "moe_layer_interval",
        "interleave_moe_layer_step", "n_groups", "mamba_n_groups", "index_local_blocks",
    ),
    TOP_K: (
        "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "num_key_value_heads",
        "swa_num_key_value_heads", "linear_num_key_heads", "layer_group_size", "zero_expert_num",
        "num_sliding_attention_heads", "o_groups", "heads_per_ngram", "index_topk_blocks",
    ),
    LAYERS: (
        "num_hidden_layers", "n_layers", "num_layers",
    ),
    4: (
        "num_attention_heads", "n_heads", "swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads",
        "qk_rope_head_dim", "mamba_num_heads", "mamba_n_heads", "d_rel", "rotary_dim", "index_block_size",
        "split_ngram_parts",
    ),
    EXPERTS: (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "head_dim", "swa_head_dim",
        "kv_channels", "qk_nope_head_dim", "v_head_dim", "linear_head_dim", "linear_key_head_dim",
        "linear_value_head_dim", "index_head_dim", "index_topk", "mamba_d_state", "ssm_state_size", "mamba_dt_rank",
        "hc_lowrank", "indexer_head_dim", "gated_norm_rank", "o_lora_rank", "ple_embed_dim",
    ),
    16: (
        "moe_intermediate_size", "expert_ffn_hidden_size", "sliding_window", "sliding_window_size", "kv_lora_rank",
        "q_lora_rank", "mamba_head_dim", "mamba_d_head", "chunk_size", "mamba_chunk_size", "router_hidden_size",
        "rel_extent", "block_size", "attention_chunk_size", "index_n_heads",
    ),
    12: (
        "hidden_size_per_layer_input",
    ),
    24: (
        "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
        "moe_shared_expert_intermediate_size", "share_expert_dim",
    ),
    32: (
        "hidden_size", "d_model",
    ),
    48: (
        "intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size",
        "prefix_dense_intermediate_size",
    ),
    260: (
        "vocab_size", "vocab_size_per_layer_input", "ngram_vocab_size_base",
    ),
    512: (
        "max_position_embeddings", "max_seq_len", "model_max_length",
    ),
}  # fmt: skip
SIZES = {name: size for size, names in _SIZES.items() for name in names}
MIXED: Mapping[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
QSA: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
}

# Without these a family's default is a dense model, or one whose answers depend on chance.
SWITCHES: Mapping[str, Any] = {"enable_moe_block": True, "is_moe": True, "tie_word_embeddings": False}
# Where sizes depend on one another, or what is derived from them does not fit three layers.
FAMILY: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "bailing_hybrid": MIXED,
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "granitemoehybrid": MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "kimi_linear": MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax": MIXED,
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_5_moe": {"text_config": MIXED},
    "qwen3_5_moe_text": MIXED,
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "zaya": {"num_experts_per_tok": 1},
}

TEXT_CONFIGS = ("text_config", "attn_config", "ffn_config")


@cache
def moe_families() -> Mapping[str, str]:
    """Every language model of transformers' registry whose config speaks of experts: model_type -> model class."""
    classes = {family: CONFIG_MAPPING[family] for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    speak = [family for family, kind in classes.items() if any("expert" in name for name in _deep_names(kind))]
    return {family: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in speak}


def tiny_fields(family: str) -> dict[str, Any]:
    """The sizes of a tiny `family`, as keywords for its config class."""
    small = _small(CONFIG_MAPPING[family])
    for name, value in FAMILY.get(family, {}).items():
        small[name] = small.get(name, {}) | dict(value) if isinstance(value, Mapping) else value
    return small


def _small(kind: Any) -> dict[str, Any]:
    names = _names(kind)
    small = {name: value for name, value in (SIZES | dict(SWITCHES)).items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has as many key as query heads; head_dim is its rotary part's width
        small |= {"num_key_value_heads": 4, "head_dim": 4}
    return small | dict(TOKENS) | {name: _small(inner) for name, inner in _inner(kind)}


def _deep_names(kind: Any) -> Iterator[str]:
    yield from _names(kind)
    for _, inner in _inner(kind):
        yield from _names(inner)


def _names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}


def _inner(kind: Any) -> list[tuple[str, Any]]:
    """The configs inside a config that are about text."""
    found = kind.sub_configs.items()
    return [(name, inner) for name, inner in found if name in TEXT_CONFIGS and is_dataclass(inner)]
