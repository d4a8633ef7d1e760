"""Every causal language model that the installed transformers knows, with its sizes shrunk by the names they have.

What a config calls its sizes is matched by patterns; a config that a new release brings is shrunk by the same ones.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["architectures", "tiny_config", "tiny_model"]

LAYERS = 4
# The first pattern that a name matches as a whole gives its size; a name without one keeps its default.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size_per_layer_input|vocab_size|.*_vocab_size|text_vocab_size|total_vocab.*", 300),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length|context_length|seq_length", 128),
    (r"num_hidden_layers|n_layers?|num_layers|.*coder_layers|num_blocks|depth|num_hidden_layers_.*", LAYERS),
    (r"num_kv_shared_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"n_groups?|topk_group|mamba_n_groups|num_expert_group|mamba_ngroups|norm_groups?", 1),
    (r"num_experts_per_tok.*|moe_topk|top_k_experts|moe_k|expert_top_k|num_selected_experts|top_k", 2),
    (r"qk_head_dim", 16),
    (r".*rope_head_dim|.*head_dim.*|d_kv|kv_channels|d_head|.*_head_size|attention_head_size|rotary_dim|index_head_dim",
     8),
    (r"(num_|n_)?(local_|routed_|moe_)?experts(_num)?|moe_num_experts|num_local_experts|zero_expert_num|ffn_num_experts",
     4),
    (r"moe_num_shared_experts|n_shared_experts|num_shared_experts?", 1),
    (r"(num_|n_|attention_)?(.*_)?(key_value|kv)_heads|num_kv_heads|attn_kv_heads|num_query_groups", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_heads", 4),
    (r"mamba_(d_head|head_dim)|mamba_headdim", 16),
    (r"(num_|n_)?(.*_)?heads?|attention_heads", 4),
    (r".*lora_rank|.*_lora_dim|.*low_rank_dim|laurel_rank|time_step_rank|mamba_dt_rank|adapter_rank|o_rank", 8),
    (r"hidden_size_per_layer_input", 8),
    (r"mamba_d_ssm|mamba_intermediate_size", 64),
    (r"hidden_size|hidden_dim|n_embd|d_model|emb_dim|embedding_size|embedding_dim|attention_hidden_size|lru_width"
     r"|dim|d_embed|word_embed_proj_dim|dim_model|block_size_width|output_hidden_size|ple_hidden_size"
     r"|adapter_(in|out)_dim|adapter_input_size", 32),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|d_?ff|d_inner|ffn_hidden_size|mlp_hidden_size|ff_proj_dim|dim_ff"
     r"|feed_forward_size|feedforward_size|.*mlp_dim|block_ff_dim|expert_ffn_hidden_size|ffn_embed_dim", 48),
    (r"(mamba_|ssm_)?(d_state|state_size)|ssm_state_size", 8),
    (r"sliding_window|local_attention|attention_window_size|window_size|attention_chunk_size|index_topk", 5),
    (r".*chunk_size|.*chunk_length|block_size", 16),
    (r"image_size", 28),
    (r"patch_size", 14),
)  # fmt: skip
# Tried in turn where a model of the shrunk sizes cannot be run.
_OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 8},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8},
)
# What no pattern can know, by model type.
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 2}
_QWEN4 = {f"indexer_{name}": size for name, size in _INDEXER.items()}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BLT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
_DOTS = {"q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DOTS = {f"swa_{name}": size for name, size in _DOTS.items()}
_OWN: dict[str, dict[str, Any]] = {
    "blt": {
        "vocab_size": 300,
        "encoder_hash_byte_group_vocab": 302,
        "encoder_config": _BLT | {"hidden_size_global": 32},
        "decoder_config": _BLT | {"hidden_size_global": 32, "num_hidden_layers": LAYERS, "head_dim": 8},
        "patcher_config": _BLT | {"num_hidden_layers": 1, "head_dim": 8},
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE),
    },
    "cpmant": {"prompt_types": 4, "prompt_length": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS},
    "dots3_note_text": _DOTS,
    "gemma4": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gemma4_unified": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"num_kv_shared_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
_KEYS = ("num_key_value_heads", "num_kv_heads")
_LISTS = re.compile(r".*layer.*|.*types?|block_.*|.*pattern|.*_per_layer")


def architectures() -> list[str]:
    """What the installed transformers can load as a causal language model, by model type."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of a model type with its sizes shrunk.

    Args:
        model_type: a name of `architectures`.
        changes: of what the patterns make.

    Raises:
        Exception: whatever a config says of sizes that do not fit together.
    """
    sizes = _shrunk(CONFIG_MAPPING[model_type]())
    for part in (_OWN.get(model_type, {}), changes):
        sizes |= {key: {**sizes[key], **one} if key == "text_config" else one for key, one in part.items()}
    return CONFIG_MAPPING[model_type](**sizes)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a tiny config, in evaluation mode, that can be run.

    Raises:
        Exception: whatever the first of the configs or models that were tried says.
    """
    first: Exception | None = None
    for other in _OTHERWISE:
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(tiny_config(model_type, **other | changes)).eval()
                model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
            return model
        except Exception as error:  # of configs and models of all sorts
            first = first or error
    assert first is not None
    raise first


def _shrunk(config: Any) -> dict[str, Any]:
    """What a config is made with again to be tiny."""
    found: dict[str, Any] = {}
    heads = _size("num_attention_heads")
    told = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in told.items():
        if name in config.sub_configs and value is not None:
            found[name] = _shrunk(value)
        elif name == "is_decoder":
            found[name] = True  # BERT and its kin load as causal models, but are only with it
        elif isinstance(value, bool) or name in ("transformers_version", "dtype"):
            continue
        elif name.endswith("token_id") or name.endswith("token_index"):
            found[name] = 0 if isinstance(value, int) else None
        elif isinstance(value, int) and (size := _size(name)) is not None and size < value:
            found[name] = heads if name in _KEYS and value == told.get("num_attention_heads") else size
        elif isinstance(value, (list, tuple)) and len(value) > LAYERS and _LISTS.fullmatch(name):
            found[name] = _spread(value)
        elif isinstance(value, (list, tuple)) and len(value) > LAYERS and (size := _size(name)) is not None:
            found[name] = [size] * LAYERS
    return found


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _spread(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """As many as there are layers, with every kind among them."""
    kinds = list(dict.fromkeys(map(str, values)))
    if len(kinds) == 1 or len(kinds) > LAYERS:
        return list(values[:LAYERS])
    first = {kind: next(value for value in values if str(value) == kind) for kind in kinds}
    return [first[kinds[place % len(kinds)]] for place in range(LAYERS)]
