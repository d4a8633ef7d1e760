"""Tiny random mixtures of experts, of both forms and of several ways to store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES |= {"max_position_embeddings": 64, "num_experts_per_tok": 2, "initializer_range": 0.2}
_LOCAL = {"intermediate_size": 24, "num_local_experts": 4}
_QWEN = {"moe_intermediate_size": 24, "num_experts": 4, "intermediate_size": 44}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _SIZES | _LOCAL,
    "qwen2_moe": _SIZES | _QWEN | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _SIZES | _QWEN | {"head_dim": 8},
    "olmoe": _SIZES | {"intermediate_size": 24, "num_experts": 4},
    "deepseek_v3": _SIZES
    | {"moe_intermediate_size": 24, "n_routed_experts": 4, "intermediate_size": 44, "num_key_value_heads": 4}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "granitemoe": _SIZES | _LOCAL,
    "phimoe": _SIZES | _LOCAL,
    "gpt_oss": _SIZES | _LOCAL | {"head_dim": 8, "sliding_window": 8},
    "llama4_text": _SIZES
    | _LOCAL
    | {"intermediate_size_mlp": 44, "head_dim": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    | {"attn_temperature_tuning": False},
    "aria_text": _SIZES | {"intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "jamba": _SIZES
    | {"intermediate_size": 24, "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4},
}


def save_mixture(save_model: Callable[..., Path], model_type: str, **more: Any) -> Path:
    """Directory of a random mixture whose weights and biases are all of the same size."""
    from transformers import AutoModelForCausalLM

    folder = save_model(model_type, **MIXTURES.get(model_type, {}) | more)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    """The model as transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
