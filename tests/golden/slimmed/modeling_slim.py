"""Language models whose layers differ in width: fewer key/value groups here, fewer MLP channels there, a part missing.

`gpmetric slim` copies this file into the folders it writes, so that transformers opens them anywhere
(`trust_remote_code=True`); with gpmetric installed nothing has to be trusted. It needs torch and transformers only.

The config of such a model is that of the dense one with another `model_type` and one more entry, `widths`: for each
layer `heads`, key/value groups left of its attention, `channels`, left of its MLP, and `attention_bias` and
`mlp_bias`, whether their outputs have a bias that the dense model's have not. A part with none left has no norm, and
adds its bias to the residual stream if its flag is set, nothing otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

__all__ = [
    "SLIM_FILE",
    "SLIM_MODELS",
    "Absent",
    "SlimGPT2Config",
    "SlimGPT2LMHeadModel",
    "SlimLlamaConfig",
    "SlimLlamaForCausalLM",
    "SlimMistralConfig",
    "SlimMistralForCausalLM",
    "SlimQwen2Config",
    "SlimQwen2ForCausalLM",
    "SlimQwen3Config",
    "SlimQwen3ForCausalLM",
    "set_width",
]


SLIM_FILE = "modeling_slim.py"  # what this file is called in a model's folder


class Absent(nn.Module):
    """Stands where all heads of an attention or all channels of an MLP are gone.

    Args:
        width: of the residual stream.
        bias: whether a constant is left.
        layer: index of the layer for an attention, whose place in the cache still counts tokens; None for an MLP.
    """

    def __init__(self, width: int, bias: bool, layer: int | None = None) -> None:
        super().__init__()
        self.layer_idx = layer
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **others: Any) -> Any:
        output = torch.zeros_like(hidden_states) if self.bias is None else self.bias.expand_as(hidden_states)
        if self.layer_idx is None:
            return output
        if past_key_values is not None:
            token = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(token, token, self.layer_idx)
        return output, None


def set_width(layer: nn.Module, index: int, heads: int, channels: int, attention_bias: bool, mlp_bias: bool) -> None:
    """Gives a decoder layer as its class makes it another width, its parameters new.

    Args:
        layer: of a Llama, Mistral, Qwen2, Qwen3 or GPT-2.
        index: its place in the model.
        heads: key/value groups left.
        channels: of the MLP left.
        attention_bias, mlp_bias: whether the output has a bias that it had not.
    """
    (_set_gpt2 if hasattr(layer, "attn") else _set_llama)(layer, index, heads, channels, attention_bias, mlp_bias)


def _set_llama(layer: Any, index: int, heads: int, channels: int, attention_bias: bool, mlp_bias: bool) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.o_proj.out_features
    if heads:
        keys = heads * attention.head_dim
        queries = keys * attention.num_key_value_groups
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            setattr(attention, name, nn.Linear(width, rows, bias=getattr(attention, name).bias is not None))
        attention.o_proj = nn.Linear(queries, width, bias=attention_bias or attention.o_proj.bias is not None)
    else:
        layer.self_attn, layer.input_layernorm = Absent(width, attention_bias, index), nn.Identity()
    if channels:
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, nn.Linear(width, channels, bias=getattr(mlp, name).bias is not None))
        mlp.down_proj = nn.Linear(channels, width, bias=mlp_bias or mlp.down_proj.bias is not None)
    else:
        layer.mlp, layer.post_attention_layernorm = Absent(width, mlp_bias), nn.Identity()


def _set_gpt2(layer: Any, index: int, heads: int, channels: int, attention_bias: bool, mlp_bias: bool) -> None:
    attention, width = layer.attn, layer.attn.embed_dim
    if heads:
        rows = heads * attention.head_dim
        attention.num_heads, attention.split_size = heads, rows
        attention.c_attn, attention.c_proj = Conv1D(3 * rows, width), Conv1D(width, rows)
    else:
        layer.attn, layer.ln_1 = Absent(width, attention_bias, index), nn.Identity()
    if channels:
        layer.mlp.c_fc, layer.mlp.c_proj = Conv1D(channels, width), Conv1D(width, channels)
    else:
        layer.mlp, layer.ln_2 = Absent(width, mlp_bias), nn.Identity()


def _set_widths(layers: nn.ModuleList, widths: list[dict[str, Any]]) -> None:
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        set_width(layer, index, **width)


class SlimLlamaConfig(LlamaConfig):
    model_type = "slim_llama"


class SlimLlamaForCausalLM(LlamaForCausalLM):
    config_class = SlimLlamaConfig

    def __init__(self, config: SlimLlamaConfig) -> None:
        super().__init__(config)
        _set_widths(self.model.layers, config.widths)


class SlimMistralConfig(MistralConfig):
    model_type = "slim_mistral"


class SlimMistralForCausalLM(MistralForCausalLM):
    config_class = SlimMistralConfig

    def __init__(self, config: SlimMistralConfig) -> None:
        super().__init__(config)
        _set_widths(self.model.layers, config.widths)


class SlimQwen2Config(Qwen2Config):
    model_type = "slim_qwen2"


class SlimQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = SlimQwen2Config

    def __init__(self, config: SlimQwen2Config) -> None:
        super().__init__(config)
        _set_widths(self.model.layers, config.widths)


class SlimQwen3Config(Qwen3Config):
    model_type = "slim_qwen3"


class SlimQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = SlimQwen3Config

    def __init__(self, config: SlimQwen3Config) -> None:
        super().__init__(config)
        _set_widths(self.model.layers, config.widths)


class SlimGPT2Config(GPT2Config):
    model_type = "slim_gpt2"


class SlimGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = SlimGPT2Config

    def __init__(self, config: SlimGPT2Config) -> None:
        super().__init__(config)
        _set_widths(self.transformer.h, config.widths)


# model_type of the dense model -> config and model of its slim form
SLIM_MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (SlimLlamaConfig, SlimLlamaForCausalLM),
    "mistral": (SlimMistralConfig, SlimMistralForCausalLM),
    "qwen2": (SlimQwen2Config, SlimQwen2ForCausalLM),
    "qwen3": (SlimQwen3Config, SlimQwen3ForCausalLM),
    "gpt2": (SlimGPT2Config, SlimGPT2LMHeadModel),
}
