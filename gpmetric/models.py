"""Causal language models as gpmetric sees them: a list of repeated blocks holding prunable layers.

They are found by `blocks`, and each block is replayed with the arguments that it was called with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpmetric.digests import remembered_digest
from gpmetric.errors import ModelError
from gpmetric.placement import BATCH_TOKENS, FRONT, HEAD, Part, Placement
from gpmetric.stored_experts import Piece

__all__ = ["Block", "Layer", "Model", "Told", "check_weights", "find_parts"]

_CHECKED = 2**22  # entries of a weight that are looked at together
_PIECE = 2**24  # entries of a parameter that are hashed at once
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache"}  # of a config: no part of what the model computes


@dataclass(frozen=True)
class Layer:
    """One prunable weight matrix, seen as [out, in] whatever the module stores."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """[out, in], a view of the stored weight (Conv1D stores [in, out]): writing to it changes the model."""
        return self.oriented(self.parameter.data)

    @property
    def parameter(self) -> nn.Parameter:
        """The stored weight, in whatever orientation the module has it."""
        parameter = self.module.weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor of the stored weight's shape (its gradient, say) as [out, in]."""
        return stored.t() if isinstance(self.module, Conv1D) else stored


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks, with its prunable layers in module order."""

    module: nn.Module  # a ModuleList of those that are one block because they share a layer
    layers: tuple[Layer, ...]


Told = Callable[[int, int], None]  # done, in all


def _silent(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Model:
    """A loaded causal language model in evaluation mode."""

    name: str
    module: Any  # transformers' PreTrainedModel, which is untyped
    tokenizer: Any
    blocks: tuple[Block, ...]
    folder: Path | None = None  # where its files are
    placement: Placement | None = None  # None: all parameters are where they compute
    dense: Mapping[str, str] = field(default_factory=dict)  # by name, why a linear layer of a block is not pruned
    experts: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)  # by layer, where slices are in the files
    hashing: Told = field(default=_silent, repr=False, compare=False)  # told of parameters while the digest is taken

    @property
    def resident(self) -> bool:
        """Whether all weights are on the device for good."""
        return self.placement is None or self.placement.resident

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward pass."""
        return BATCH_TOKENS if self.placement is None else self.placement.batch_tokens

    def at_hand(self, part: Part) -> AbstractContextManager[None]:
        """A block, by index, or what lies before or behind them, on the device while the context is open."""
        return nullcontext() if self.placement is None else self.placement.at_hand(part)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every prunable layer, in block order."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Default sequence length: the model's positions, at most 2,048 (a long-context model would exhaust memory)."""
        return min(2048, self.positions or 2048)

    @property
    def positions(self) -> int | None:
        """Positions the model was made for; None when its config names no limit (ALiBi, recurrent models)."""
        return getattr(self.module.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        if self.placement is not None:
            return self.placement.device
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> str:
        """That it computes in, without torch's prefix."""
        own = None if self.placement is None else self.placement.dtype
        return str(own or next(self.module.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def digest(self) -> str:
        """sha256 over the config and every parameter's name, dtype, shape and bytes, as they were loaded.

        Taken while dense; of files that have not changed it is remembered from one command to the next.
        """
        config = {key: value for key, value in self.module.config.to_diff_dict().items() if key not in _VOLATILE}
        told = json.dumps(config, sort_keys=True, default=str)
        if self.folder is None:
            return self._computed_digest(told)
        drawn = [(self._kind(name, one), _sample(one)) for name, one in self.module.named_parameters()]
        settings = {"config": told, "parameters": drawn, "versions": [torch.__version__, transformers.__version__]}
        return remembered_digest(self.folder, settings, lambda: self._computed_digest(told))

    def _computed_digest(self, config: str) -> str:
        digest = hashlib.sha256(config.encode())
        parameters = list(self.module.named_parameters())
        for done, (name, parameter) in enumerate(parameters):
            self.hashing(done, len(parameters))
            digest.update(f"{self._kind(name, parameter)}\n".encode())
            flat = parameter.detach().contiguous().view(-1)  # [entries]
            for piece in flat.split(_PIECE):  # of a device, so that no copy of all of it is made
                digest.update(memoryview(piece.cpu().to(self._dtype_of(parameter)).view(torch.uint8).numpy()))
            if self.placement is not None:
                self.placement.let_go(parameter.data)
        self.hashing(len(parameters), len(parameters))
        return digest.hexdigest()

    def _dtype_of(self, parameter: Tensor) -> torch.dtype:
        """That a parameter has when it is at hand."""
        own = None if self.placement is None else self.placement.dtype
        return own if own and parameter.is_floating_point() else parameter.dtype

    def _kind(self, name: str, parameter: Tensor) -> str:
        return f"{name} {self._dtype_of(parameter)} {tuple(parameter.shape)}"

    @contextmanager
    def holding(self, weights: Sequence[Tensor], layers: Sequence[Layer] | None = None) -> Iterator[None]:
        """The model with these prunable weights [out, in], one per layer, in place of its own; none is copied.

        A weight of another dtype is converted, which is a copy.

        Args:
            weights: of `layers`, or of all.
            layers: whose block is at hand.
        """
        replaced = self.layers if layers is None else layers
        own = [layer.parameter.data for layer in replaced]
        try:
            for layer, weight, mine in zip(replaced, weights, own, strict=True):
                layer.parameter.data = layer.oriented(weight).to(mine.dtype)
            yield
        finally:
            for layer, mine in zip(replaced, own, strict=True):
                layer.parameter.data = mine


def _sample(parameter: Tensor) -> list[float]:
    """Some entries: a model that was pruned in memory is not taken for the one of its files."""
    flat = parameter.detach().reshape(-1)  # [entries]
    return [float(value) for value in flat[:: max(1, len(flat) // 16)].cpu()]


def find_parts(module: Any, blocks: Sequence[Block]) -> dict[Part, list[nn.Parameter]]:
    """A model's parameters by part: each block's, those that are read before the blocks, and those read behind them.

    What is neither an embedding of tokens nor the output layer is small, and belongs to both ends.
    """
    parts: dict[Part, list[nn.Parameter]] = {
        index: list(block.module.parameters()) for index, block in enumerate(blocks)
    }
    inside = {id(parameter) for found in parts.values() for parameter in found}
    others = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    first, last = (
        {id(one) for one in end.parameters()} if end is not None else set()
        for end in (module.get_input_embeddings(), module.get_output_embeddings())
    )
    parts[FRONT] = [one for one in others if id(one) not in last or id(one) in first]
    parts[HEAD] = [one for one in others if id(one) not in first or id(one) in last]
    return parts


def check_weights(model: Model, told: Told = _silent) -> None:
    """Refuses a model that would give figures without a meaning; told of the parameters that were looked at.

    Raises:
        ModelError: another model's tokenizer, or weights that are not in memory or not finite.
    """
    # embeddings are padded to round sizes, by less than a tenth in every published model known to us
    if not 0.9 * model.vocabulary <= len(model.tokenizer) or model.tokenizer.vocab_size > model.vocabulary:
        raise ModelError(
            f"tokenizer and model of {model.name!r} do not match: the tokenizer has {model.tokenizer.vocab_size} "
            f"entries, the model's embedding {model.vocabulary}"
        )
    parameters = list(model.module.named_parameters())
    for done, (name, parameter) in enumerate(parameters):
        told(done, len(parameters))
        if parameter.is_meta:
            raise ModelError(f"weight {name} of {model.name!r} is not in memory")
        if not all(part.isfinite().all() for part in parameter.detach().flatten().split(_CHECKED)):
            raise ModelError(f"weight {name} of {model.name!r} holds NaN or infinity")
        if model.placement is not None:
            model.placement.let_go(parameter.data)
    told(len(parameters), len(parameters))
