"""Mixtures of experts as transformers holds them, one fused parameter, with each expert a layer of its own.

An experts module keeps its class, its activation and its place; of its fused parameters, every expert gets two modules
whose weights are views of its slices, and the forward pass hands each the tokens that are routed to it. So hooks see
what an expert reads, and what prunes linear layers prunes experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from gpmetric.errors import ModelError

__all__ = [
    "Fused", "expert_family", "is_expert", "join_experts", "joined_names", "refuse_unsplit", "split_experts",
    "split_layers",
]  # fmt: skip

_UNROUTED = {"Llama4TextExperts"}  # [E, in, out], called with every expert's tokens, those of others being zeros
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # of transformers' integrations/moe.py
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, of two orders of the same sums; half precision: 3e-2
_FAMILY = re.compile(r"(?<=\.experts)\.\d+(?=\.)")


@dataclass(frozen=True)
class Fused:
    """A fused parameter that was split.

    Attributes:
        layers: names of its experts' layers, in the order of the experts.
        shape: of an expert's slice, as it is in memory.
        transposed: whether that is [in, out].
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    transposed: bool


class _Linear(nn.Linear):
    """An expert's projection whose weight is stored [out, in]."""


class _Transposed(Conv1D):
    """One whose weight is stored [in, out]; with or without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t(), self.bias)


def is_expert(module: nn.Module) -> bool:
    """Whether a layer is an expert's slice of a fused parameter."""
    return isinstance(module, (_Linear, _Transposed))


def expert_family(name: str) -> str | None:
    """What the layers of a block's experts have in common, `experts.down_proj` for `experts.7.down_proj`; else None."""
    family, count = _FAMILY.subn("", name)
    return family if count else None


@torch.no_grad()
def split_experts(module: nn.Module) -> dict[str, Fused]:
    """Gives every expert of a model its own modules, in place, and returns what was split, by name of the parameter.

    The first module of each class is compared with the one that transformers has, on a few random tokens.

    Raises:
        ModelError: the split one does not compute the same.
    """
    found: dict[str, Fused] = {}
    known: set[type] = set()
    for name, owner in list(module.named_modules()):
        form = _form(owner)
        if form is None:
            continue
        fused = _fused(owner, form)
        count = len(next(iter(fused.values())))
        given = None if type(owner) in known else _inputs(owner, count)
        before = None if given is None else _eager(owner)(owner, *given)
        _split(owner, fused, form)
        if given is not None and not _close(before, owner(*given)):
            raise ModelError(
                f"{name} ({type(owner).__name__}) does not compute what its experts compute one by one: "
                "this form of a mixture cannot be pruned"
            )
        known.add(type(owner))
        for kind, weight in fused.items():
            layers = tuple(f"{name}.{index}.{kind}" for index in range(count))
            found[f"{name}.{kind}"] = Fused(layers, (weight.shape[1], weight.shape[2]), form["is_transposed"])
    return found


@torch.no_grad()
def join_experts(module: nn.Module) -> None:
    """Undoes `split_experts`: fused parameters hold what the experts' modules hold now, under transformers' names."""
    for owner in module.modules():
        if not (experts := split_layers(owner)):
            continue
        for kind in vars(owner).pop("_split_kinds"):
            layers: list[Any] = [expert.get_submodule(kind) for expert in experts]
            for parameter, name in (("weight", kind), ("bias", f"{kind}_bias")):
                if getattr(layers[0], parameter) is not None:
                    joined = torch.stack([getattr(one, parameter) for one in layers])
                    owner.register_parameter(name, nn.Parameter(joined, requires_grad=False))
        for index in range(len(experts)):
            delattr(owner, str(index))
        del vars(owner)["forward"]


def split_layers(owner: Any) -> list[Any]:
    """Of a module whose experts were split, the layers of each by name; of another one, or of none, nothing."""
    if owner is None or "_split_kinds" not in vars(owner):
        return []
    return [owner.get_submodule(str(index)) for index in range(_count(owner))]


def joined_names(module: nn.Module) -> dict[str, list[str]]:
    """By transformers' name of a model's parameter or buffer, the names that hold it while its experts are split.

    Those of a fused parameter are its slices', in the order of the experts.
    """
    fused: dict[str, str] = {}
    for path, owner in module.named_modules():
        for index, layers in enumerate(split_layers(owner)):
            for kind, layer in layers.items():
                for name, _ in layer.named_parameters():
                    joined = kind if name == "weight" else f"{kind}_bias"
                    fused[f"{path}.{index}.{kind}.{name}"] = f"{path}.{joined}"
    found: dict[str, list[str]] = {}
    for name in module.state_dict():
        found.setdefault(fused.get(name, name), []).append(name)
    return found


def refuse_unsplit(prefix: str, block: nn.Module) -> None:
    """Refuses weights of experts that are in no linear layer: pruning around them would leave most weights dense.

    A parameter of three axes that is not an expert's (a decay, a convolution) stays as it is.

    Raises:
        ModelError: naming the parameter.
    """
    for path, owner in block.named_modules():
        if isinstance(owner, (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            named = f"{path} {type(owner).__name__} {name}".lower()
            if parameter.dim() >= 2 and "expert" in named and "router" not in named:
                full = ".".join(filter(None, (prefix, path, name)))
                raise ModelError(
                    f"{full} is a fused expert weight {list(parameter.shape)} of {type(owner).__name__}, a form that "
                    "is not known: a mixture of this architecture cannot be pruned"
                )


def _form(owner: nn.Module) -> dict[str, bool] | None:
    """How an experts module holds its parameters, by the names that transformers has for it; None of another module."""
    down = dict(owner.named_parameters(recurse=False)).get("down_proj")
    if down is None or down.dim() != 3:
        return None
    if type(owner).__name__ in _UNROUTED:
        return dict.fromkeys(_FLAGS, False) | {"has_gate": True, "is_transposed": True}
    if all(hasattr(owner, flag) for flag in _FLAGS):
        return {flag: bool(getattr(owner, flag)) for flag in _FLAGS}
    return None


def _fused(owner: nn.Module, form: Mapping[str, bool]) -> dict[str, nn.Parameter]:
    """An experts module's fused weights [E, ., .] by name, in the order in which they read."""
    names = ("gate_up_proj" if form["has_gate"] else "up_proj", "down_proj")
    return {name: owner.get_parameter(name) for name in names}


def _count(owner: nn.Module) -> int:
    return sum(name.isdigit() for name, _ in owner.named_children())


def _split(owner: nn.Module, fused: Mapping[str, nn.Parameter], form: Mapping[str, bool]) -> None:
    """Replaces fused parameters by modules whose weights are views of them."""
    biases = {name: owner.get_parameter(f"{name}_bias") for name in fused} if form["has_bias"] else {}
    for index in range(len(next(iter(fused.values())))):
        layers = {
            name: _layer(weight.data[index], biases[name].data[index] if biases else None, form["is_transposed"])
            for name, weight in fused.items()
        }
        owner.add_module(str(index), nn.ModuleDict(layers))
    for name in (*fused, *(f"{name}_bias" for name in biases)):
        delattr(owner, name)
    gate = getattr(owner, "_apply_gate", None)
    vars(owner)["_split_kinds"] = list(fused)
    vars(owner)["_split_gate"] = (gate or MethodType(_chunked, owner)) if form["has_gate"] else owner.act_fn
    unrouted = type(owner).__name__ in _UNROUTED
    vars(owner)["forward"] = MethodType(_unrouted if unrouted else _routed, owner)


def _layer(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    """A projection on a slice [out, in], or [in, out] where it is transposed; nothing is copied."""
    kind: Any = _Transposed if transposed else _Linear
    with torch.device("meta"):
        layer = kind(weight.shape[1], weight.shape[0])  # Linear(in, out) of [out, in], Conv1D(out, in) of [in, out]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    made: nn.Module = layer
    return made


def _chunked(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gated: Tensor = up * self.act_fn(gate)
    return gated


def _expert(self: Any, index: int, states: Tensor) -> Tensor:
    """What an expert makes of tokens [tokens, hidden]."""
    first, down = self.get_submodule(str(index)).values()
    output: Tensor = down(self._split_gate(first(states)))
    return self.post_expert_norm(output) if getattr(self, "has_post_expert_norm", False) else output


def _routed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Weighted sum of what each token's experts give, as transformers' `grouped_mm_experts_forward`.

    It is called with hidden states [tokens, hidden], experts [tokens, k], where the number of experts stands for none,
    and their weights [tokens, k].
    """
    names = inspect.signature(type(self).forward).bind(self, *args, **kwargs).args
    states, chosen, weights = names[1:4]
    count, (tokens, choices) = _count(self), chosen.shape
    flat = chosen.reshape(-1)  # [tokens * k]
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat.clamp(max=count), minlength=count + 1)[:count].tolist()
    outputs = []
    for index, places in enumerate(order[: sum(sizes)].split(sizes)):
        if len(places):
            found = _expert(self, index, states[places // choices])
            outputs.append(found * weights.reshape(-1)[places, None])
    result: Tensor = (outputs or [states])[0].new_zeros(tokens * choices, states.shape[-1])
    if outputs:
        result = result.index_put((order[: sum(sizes)],), torch.cat(outputs))
    result = result.view(tokens, choices, -1).sum(dim=1).to(states.dtype)  # [tokens, hidden]
    return result


def _unrouted(self: Any, hidden_states: Tensor) -> Tensor:
    """What each expert gives for its tokens [E * tokens, hidden]; those of other experts are zeros, and stay so."""
    outputs = []
    for index, states in enumerate(hidden_states.reshape(_count(self), -1, hidden_states.shape[-1])):
        (places,) = (states != 0).any(dim=-1).nonzero(as_tuple=True)
        found = torch.zeros_like(states)
        if len(places):
            found = found.index_put((places,), _expert(self, index, states[places]))
        outputs.append(found)
    return torch.cat(outputs)


def _eager(owner: nn.Module) -> Any:
    """The forward pass as the class has it, whatever kernels transformers would take for it."""
    forward = type(owner).forward
    return getattr(forward, "__wrapped__", forward)


def _inputs(owner: nn.Module, count: int) -> tuple[Tensor, ...]:
    """Tokens to try an experts module on: random ones, for random experts."""
    weight = owner.get_parameter("down_proj")
    width = int(weight.shape[2 if _form(owner)["is_transposed"] else 1])  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    if type(owner).__name__ in _UNROUTED:
        return (torch.randn(2 * count, width, generator=generator).to(weight.dtype),)
    states = torch.randn(6, width, generator=generator).to(weight.dtype)
    chosen = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(6)])
    return states, chosen, torch.rand(chosen.shape, generator=generator).to(weight.dtype)


def _close(value: Any, other: Tensor) -> bool:
    """Whether two outputs differ by rounding alone; weights that are not finite are refused elsewhere."""
    tolerance = _CLOSE.get(other.dtype, 3e-2) * float(other.float().nan_to_num(0, 0, 0).abs().amax())
    return torch.allclose(value.float(), other.float(), rtol=0, atol=tolerance, equal_nan=True)
