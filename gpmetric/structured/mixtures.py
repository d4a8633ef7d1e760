"""Where mixtures of experts are in a model, and how many of their experts can go: a unit is one expert of one block.

What is left is a mixture as its architecture has it, with fewer experts: slices of the fused weights, and the rows of
the router that name them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gpmetric.errors import InputError, ModelError
from gpmetric.experts import split_layers
from gpmetric.models import Model

__all__ = ["ROUTERS", "Mixture", "Router", "experts_kept", "find_mixtures"]


@dataclass(frozen=True)
class Router:
    """What names the experts of a mixture.

    Attributes:
        name: attribute of the mixture.
        rows: its own tensors that have a row, or an entry, for each expert.
        groups: config -> groups of neighbouring experts that a token chooses among before it chooses experts.
        least: experts of a group that it looks at when it chooses groups.
    """

    name: str
    rows: tuple[str, ...] = ("weight",)
    groups: Callable[[Any], int] = lambda config: 1
    least: int = 1


def _grouped(config: Any) -> int:
    return config.n_group or 1


def _limited(config: Any) -> int:
    return _grouped(config) if config.topk_method == "group_limited_greedy" else 1


_GATE, _ROUTER = Router("gate"), Router("router")
_CORRECTED = Router("gate", ("weight", "e_score_correction_bias"), _grouped, least=2)  # groups by their two best

# model_type of a config -> the router of its mixtures, beside `experts`
ROUTERS: Mapping[str, Router] = {
    "mixtral": _GATE,
    "qwen2_moe": _GATE,
    "qwen3_moe": _GATE,
    "olmoe": _GATE,
    "deepseek_v2": Router("gate", groups=_limited),
    "deepseek_v3": _CORRECTED,
    "glm4_moe": _CORRECTED,
    "granitemoe": _ROUTER,
    "phimoe": _ROUTER,
    "gpt_oss": Router("router", ("weight", "bias")),
}


@dataclass(frozen=True)
class Mixture:
    """The experts of a block, of which each is a unit; see `groups.Sublayer`.

    Attributes:
        experts: the module that holds them, split.
        router: the module that chooses among them.
        rows: attributes of it with a row for each expert.
        cost: parameters of an expert and its rows.
        groups: into which the router cuts them; as many stay in each.
        least: experts of a group that have to stay.
    """

    block: int
    experts: Any
    router: Any
    rows: tuple[str, ...]
    units: int
    cost: int
    groups: int
    least: int
    unit: str = "expert"
    rest: int = 0  # parameters that go with the last unit: one always stays

    @property
    def outputs(self) -> list[nn.Module]:
        """The layer of each expert that reads its inner features."""
        return [layers["down_proj"] for layers in split_layers(self.experts)]

    def tensor(self, name: str) -> Tensor:
        """One of the router's, [experts, ...], as it is now."""
        found: Tensor = getattr(self.router, name)
        return found


def find_mixtures(model: Model) -> tuple[Mixture, ...]:
    """The mixtures of a model as it came, in the order of its blocks.

    Raises:
        ModelError: an architecture that is not in ROUTERS, or a mixture that has another form there.
    """
    config = model.module.config
    kind = config.model_type
    accepted = ", ".join(ROUTERS)
    if kind not in ROUTERS:
        raise ModelError(
            f"--granularity expert: {model.name!r} is a {kind} model, of whose experts and routers nothing is known: "
            f"accepted are {accepted}"
        )
    found = []
    for index, block in enumerate(model.blocks):
        for name, owner in block.module.named_modules():
            if split_layers(getattr(owner, "experts", None)):
                found.append(_mixture(config, index, f"{name} of block {index} of {model.name!r}", owner))
    if not found:
        raise ModelError(f"--granularity expert: {model.name!r} ({kind}) has no block with a mixture of experts")
    return tuple(found)


def _mixture(config: Any, index: int, name: str, owner: Any) -> Mixture:
    row = ROUTERS[config.model_type]
    router: Any = getattr(owner, row.name, None)
    layers = split_layers(owner.experts)
    known = router is not None and {one for one, _ in _tensors(router)} == set(row.rows)
    if not known or any(len(one) != len(layers) for _, one in _tensors(router)):
        raise ModelError(
            f"--granularity expert: {name} has no {row.name!r} of {', '.join(row.rows)} alone with a row for each of "
            f"its {len(layers)} experts, as {config.model_type} models have"
        )
    cost = sum(one.numel() for one in layers[0].parameters())
    cost += sum(one[0].numel() for one in router.parameters(recurse=False))
    groups = row.groups(config)
    chosen = config.topk_group if groups > 1 else 1
    least = max(row.least, -(-config.num_experts_per_tok // chosen))
    return Mixture(index, owner.experts, router, row.rows, len(layers), cost, groups, least)


def _tensors(router: nn.Module) -> list[tuple[str, Tensor]]:
    return [*router.named_parameters(), *router.named_buffers()]


def experts_kept(mixtures: tuple[Mixture, ...], sparsity: float) -> int:
    """Experts of each group of each block that stay where a share of them goes, rounded down.

    Raises:
        InputError: none would go, or fewer would stay than a token is routed to.
    """
    first = mixtures[0]
    assert all((one.units, one.groups) == (first.units, first.groups) for one in mixtures)  # of one config
    size = first.units // first.groups
    gone = int(sparsity * size + 1e-9)
    told = f"{first.units} experts of a block" + f" in {first.groups} groups" * (first.groups > 1)
    if not gone:
        share = 1 / size
        raise InputError(
            f"--sparsity {sparsity:g} cannot be met by --granularity expert: of {told}, the least that goes is "
            f"{first.groups}, a share of {share:.4g}"
        )
    if size - gone < first.least:
        most = (size - first.least) / size
        raise InputError(
            f"--sparsity {sparsity:g} is out of reach: of {told}, {first.groups * first.least} stay for the router to "
            f"choose among, so that at most {most:.4g} can go"
        )
    return size - gone
