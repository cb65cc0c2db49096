"""Tiny random checkpoints of real families in hub layout, for tests and speed runs. Transformers writes them.

H hidden, V vocab.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from engine.tiny_config import TOKENS, moe_families, tiny_fields

# Those with shapes of their own, which every test of the engine runs on; any other family gets those of `tiny_config`.
FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "qwen3_next")

PAD, BOS, EOS, END_OF_TURN = "<pad>", "<bos>", "<eos>", "<|end|>"
SPECIALS = (PAD, BOS, EOS, END_OF_TURN)
VOCAB = 256 + len(SPECIALS)  # one token a byte, then the specials

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    **TOKENS,
}

_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {
        "num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16, "sliding_window": None},
    "olmoe": {"num_experts": 8, "intermediate_size": 16, "norm_topk_prob": False},
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 4,  # transformers reads it as the rotary part's width
        "num_key_value_heads": 4,
    },
    "qwen3_next": {
        "num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def write_tiny(
    family: str,
    folder: Path | str,
    seed: int = 0,
    *,
    dtype: str = "float32",
    max_shard_size: str | int | None = None,
    std: float = 0.2,
    **config_overrides: Any,
) -> Path:
    """Write a tiny random checkpoint with its tokenizer into `folder`, which is made, and return that folder.

    Any field of the family's config may be overridden. The same seed and fields give the same bytes.
    """
    if family not in moe_families():
        others = sorted(moe_families().keys() - set(FAMILIES))
        raise ValueError(f"Tiny checkpoints exist for {', '.join([*FAMILIES, *others])}; got {family!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = dict(_COMMON) | dict(_FAMILY[family]) if family in _FAMILY else tiny_fields(family)
    config = AutoConfig.for_model(family, **(shapes | config_overrides))
    config.dtype = getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    _randomise(model, seed, std)
    model.generation_config = GenerationConfig(bos_token_id=257, eos_token_id=[258, 259], pad_token_id=256)
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **shards)
    write_byte_tokenizer(folder)
    return folder


def _randomise(model: torch.nn.Module, seed: int, std: float) -> None:
    """Weights with enough spread for routing to vary; norms and scales near one, biases (the correction bias too) away
    from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    buffers = {name: each for name, each in model.state_dict().items() if each.is_floating_point()}
    with torch.no_grad():
        for name, tensor in (
            parameters | {name: each for name, each in buffers.items() if name not in parameters}
        ).items():
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = tensor.dim() == 1 and (name.endswith("norm.weight") or bool(tensor.eq(1).all()))
            tensor.copy_(1 + 0.1 * noise if is_norm else std * noise)


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of the bytes 0..255, in the order of the bytes (GPT-2's convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(0x100, 0x200))
    shown = set(printable)
    return [chr(byte) if byte in shown else chr(next(rest)) for byte in range(256)]


def write_byte_tokenizer(folder: Path) -> None:
    """One token a byte, so that any text is encodable and a character may span several tokens."""
    vocab = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
