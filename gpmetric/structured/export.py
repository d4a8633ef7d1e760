"""A slimmed model as a folder of files: its own widths per layer, equal ones, or zeros in the original shapes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_IMODE
from typing import Any

import torch
from torch import Tensor, nn

from gpmetric import slim_models
from gpmetric.errors import InputError, ModelError
from gpmetric.files import read_object
from gpmetric.loading import load_model, quiet_transformers
from gpmetric.models import Model
from gpmetric.pruning.checkpoint import tensors
from gpmetric.slim_models import SLIM_FILE, SLIM_MODELS
from gpmetric.stored_names import stored_names
from gpmetric.structured.fewer_experts import experts_left, fewer_experts, keep_names, set_experts
from gpmetric.structured.groups import SUBLAYERS, Groups, find_groups
from gpmetric.structured.request import FORMATS
from gpmetric.structured.shrink import Repair, Shrinker
from gpmetric.tensor_file import dtype_name, weight_bytes

__all__ = [
    "Slimmed",
    "check_format",
    "in_float32",
    "make_hetero",
    "make_padded",
    "make_uniform",
    "stored_dtypes",
    "write_model",
    "written_bytes",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REMOTE = SLIM_FILE.removesuffix(".py")

Made = tuple[Any, dict[str, Tensor], Any]  # config, state and class of the model to write


@dataclass(frozen=True)
class Slimmed:
    """What stays of a model, and what is done for it."""

    groups: Groups
    kept: Tensor  # units that stay, [units], bool
    repairs: Mapping[int, Repair]  # by index of a sublayer

    def widths(self) -> list[dict[str, Any]]:
        """By block, heads and channels that stay, and whether an output has a bias that it had not; or experts."""
        if self.groups.mixtures:
            return experts_left(self.groups, self.kept)
        counts: list[dict[str, int]] = [{} for _ in self.groups.by_block]
        biased: list[dict[str, bool]] = [{} for _ in self.groups.by_block]
        for index, (one, mine) in enumerate(zip(self.groups.sublayers, self.groups.split(self.kept), strict=True)):
            repaired = index in self.repairs and self.repairs[index].bias is not None
            counts[one.block][one.kind.width] = one.width(int(mine.sum()))
            biased[one.block][one.kind.bias] = repaired and (not mine.any() or one.output.bias is None)
        return [dict(widths) | flags for widths, flags in zip(counts, biased, strict=True)]


def check_format(model: Model, kind: str, *, biases: bool, blocks: bool = False) -> None:
    """Raises InputError for a format, a key of FORMATS, that cannot hold what is asked for.

    Args:
        biases: of outputs that have none.
        blocks: whether they go as a whole.
    """
    config = model.module.config
    if FORMATS[kind].equal and blocks and _numbered(config):
        others = " or ".join(name for name, row in FORMATS.items() if not row.equal)
        raise InputError(
            f"--granularity block: {model.name!r} scales attention by the number of its block "
            f"(scale_attn_by_inverse_layer_idx), which --format {kind} would change; accepted is {others}"
        )
    if FORMATS[kind].stock and biases and not hasattr(config, "mlp_bias") and config.model_type != "gpt2":
        others = " or ".join(name for name, row in FORMATS.items() if not row.stock)
        raise InputError(
            f"--add-bias: {config.model_type} models of stock transformers have no such bias; --format {others} has"
        )


def stored_dtypes(model: Model) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """By name of a tensor of the model, the dtype that its files hold it in, and that of the largest.

    Raises:
        ModelError: they hold no dtype that can be written.
    """
    assert model.folder is not None
    prefix = f"{model.module.base_model_prefix}."
    known = model.module.state_dict().keys()
    found: dict[str, torch.dtype] = {}
    stored: dict[str, torch.dtype] = {}  # by name in the files
    sizes: dict[torch.dtype, int] = {}
    others: set[str] = set()
    for name, file in tensors(model.folder).items():
        place = file.places[name]
        if place.dtype not in _DTYPES:
            others.add(dtype_name(place.dtype))
            continue
        found[name if name in known else prefix + name] = stored[name] = place.dtype
        sizes[place.dtype] = max(sizes.get(place.dtype, 0), math.prod(place.shape))
    if not sizes:
        accepted = ", ".join(map(dtype_name, _DTYPES))
        raise ModelError(f"{model.name!r} is stored as {', '.join(sorted(others))}: accepted are {accepted}")
    found |= {own: stored[name] for own, name in stored_names(model.module, stored).items()}
    return found, max(sizes, key=lambda dtype: sizes[dtype])


def written_bytes(model: Model, kind: str, removed: float) -> int:
    """About how many bytes the written weights take, before it is known what stays.

    Args:
        kind: a key of FORMATS.
        removed: parameters that are going to be.
    """
    assert model.folder is not None
    share = removed / sum(parameter.numel() for parameter in model.module.parameters())
    return int(weight_bytes(model.folder) * (1 if FORMATS[kind].full else 1 - share))


def write_model(model: Model, shrinker: Shrinker, slimmed: Slimmed, kind: str, folder: Path) -> None:
    """Writes config and weights, in the dtypes of the dense model's files, and for `hetero` the modelling file.

    Weights that stay are those of the files, also where the model was loaded in a dtype that rounds them.

    Args:
        kind: a key of FORMATS.
        folder: empty.
    """
    dtypes, dtype = stored_dtypes(model)
    if model.dtype != "float32" and any(str(one) != f"torch.{model.dtype}" for one in dtypes.values()):
        model, shrinker, slimmed = in_float32(model, slimmed, "cpu")
    config, state, made = FORMATS[kind].make(model, shrinker, slimmed)
    with torch.device("meta"):
        module = made(config)
    module.load_state_dict(state, assign=True, strict=True)
    module.tie_weights()
    module.config.dtype = dtype
    module.generation_config = model.module.generation_config
    with quiet_transformers():
        module.save_pretrained(folder)
    if slimmed.groups.mixtures:
        keep_names(_settings(model), folder / "config.json")
    for path in folder.glob("*.safetensors"):
        path.chmod(S_IMODE((folder / "config.json").stat().st_mode))  # safetensors' files are their owner's alone
    model.tokenizer.save_pretrained(folder)
    if not FORMATS[kind].stock:
        shutil.copyfile(slim_models.__file__, folder / SLIM_FILE)


def in_float32(model: Model, slimmed: Slimmed, device: str) -> tuple[Model, Shrinker, Slimmed]:
    """A model, opened again if it is not in float32, and what stays of it."""
    exact = model if model.dtype == "float32" else load_model(str(model.folder), device=device, dtype="float32")
    repairs = {
        index: Repair(*(None if one is None else one.to(device, torch.float32) for one in (repair.weight, repair.bias)))
        for index, repair in slimmed.repairs.items()
    }
    groups = find_groups(exact, slimmed.groups.kinds)
    return exact, Shrinker(exact, groups), replace(slimmed, groups=groups, repairs=repairs)


def make_hetero(model: Model, shrinker: Shrinker, slimmed: Slimmed) -> Made:
    """A model of `slim_models`, blocks of which nothing is left left out."""
    kind, made = SLIM_MODELS[model.module.config.model_type]
    widths = slimmed.widths()
    stays = [index for index, width in enumerate(widths) if _numbered(model.module.config) or any(width.values())]
    config = kind(**_settings(model) | _numbers(model, stays))
    config.widths = [widths[index] for index in stays]
    config.auto_map = {"AutoConfig": f"{_REMOTE}.{kind.__name__}", "AutoModelForCausalLM": f"{_REMOTE}.{made.__name__}"}
    with shrinker.keeping(slimmed.kept, slimmed.repairs):
        state = _renumbered(model, _state(model), stays)
    return config, state, made


def make_uniform(model: Model, shrinker: Shrinker, slimmed: Slimmed) -> Made:
    """A stock model of smaller shapes, of units that are as many in every block, or of fewer blocks."""
    if slimmed.groups.mixtures:
        return _make_sparser(model, shrinker, slimmed)
    stays = [index for index, width in enumerate(slimmed.widths()) if any(width.values())]
    widths = [slimmed.widths()[index] for index in stays]
    settings, dense = _settings(model) | _numbers(model, stays), model.module.config
    if dense.model_type == "gpt2":
        settings["n_inner"] = widths[0]["channels"]
    else:
        per_group = dense.num_attention_heads // dense.num_key_value_heads
        settings |= {
            "head_dim": slimmed.groups.sublayers[0].module.head_dim,
            "num_key_value_heads": widths[0]["heads"],
            "num_attention_heads": widths[0]["heads"] * per_group,
            "intermediate_size": widths[0]["channels"],
        }
    with shrinker.keeping(slimmed.kept, slimmed.repairs):
        state = _renumbered(model, _state(model), stays)
    return _stock(model, settings, state, widths)


def _make_sparser(model: Model, shrinker: Shrinker, slimmed: Slimmed) -> Made:
    """A stock model of as many experts less in every block."""
    shrinker.dense()
    groups, kept, made = slimmed.groups, slimmed.kept, type(model.module)
    (count,) = {int(mine.sum()) for mine in groups.split(kept)}
    config = set_experts(_settings(model), type(model.module.config), count)
    return config, fewer_experts(model, groups, kept, _state(model)), made


def make_padded(model: Model, shrinker: Shrinker, slimmed: Slimmed) -> Made:
    """A stock model of the original shapes, with zeros where units are gone."""
    shrinker.dense()
    state = _state(model)
    names = {id(module): name for name, module in model.module.named_modules()}
    sublayers = zip(slimmed.groups.sublayers, slimmed.groups.split(slimmed.kept), strict=True)
    for index, (sublayer, mine) in enumerate(sublayers):
        repair = slimmed.repairs.get(index, Repair())
        gone = (~mine).nonzero()[:, 0]
        for attribute, features in sublayer.rows.items():
            layer = getattr(sublayer.module, attribute)
            rows, name = features[:, gone].flatten(), names[id(layer)]
            state[f"{name}.weight"] = _zeroed(layer, state[f"{name}.weight"], rows, 0)
            if layer.bias is not None:
                state[f"{name}.bias"] = state[f"{name}.bias"].index_fill(0, rows, 0)
        layer = sublayer.output
        name = names[id(layer)]
        weight = _zeroed(layer, state[f"{name}.weight"], sublayer.columns[gone].flatten(), 1)
        if repair.weight is not None:
            columns = sublayer.columns[mine].flatten()
            turned = not isinstance(layer, nn.Linear)
            fitted = repair.weight.t() if turned else repair.weight
            weight = weight.index_copy(0 if turned else 1, columns, fitted.to(weight))
        state[f"{name}.weight"] = weight
        if repair.bias is not None:
            state[f"{name}.bias"] = repair.bias.cpu().to(state.get(f"{name}.bias", weight).dtype)
        elif not mine.any() and layer.bias is not None:
            state[f"{name}.bias"] = torch.zeros_like(state[f"{name}.bias"])
    return _stock(model, _settings(model), state, slimmed.widths())


def _stock(
    model: Model, settings: dict[str, Any], state: dict[str, Tensor], widths: Sequence[Mapping[str, Any]]
) -> Made:
    """A model of the dense model's class, with a bias in all layers where some have got one."""
    for flag in (kind.bias for kind in SUBLAYERS.values()):
        if hasattr(model.module.config, flag) and any(width[flag] for width in widths):
            settings[flag] = True
    config = type(model.module.config)(**settings)
    made = type(model.module)
    with torch.device("meta"):
        wanted = made(config).state_dict()
    for name, value in wanted.items():
        if name not in state:
            assert name.endswith(".bias"), name
            state[name] = torch.zeros(value.shape, dtype=stored_dtypes(model)[1])
    return config, state, made


def _settings(model: Model) -> dict[str, Any]:
    """The config as its file has it, without what is of the dense folder only."""
    assert model.folder is not None
    settings = read_object(model.folder / "config.json")
    names = ("architectures", "model_type", "transformers_version", "auto_map", "gpmetric", "_name_or_path")
    return {name: value for name, value in settings.items() if name not in names}


def _state(model: Model) -> dict[str, Tensor]:
    """The model as it is, in the dtypes of its files."""
    dtypes, others = stored_dtypes(model)
    return {name: one.detach().cpu().to(dtypes.get(name, others)) for name, one in model.module.state_dict().items()}


def _numbered(config: Any) -> bool:
    """Whether a block depends on its number."""
    return bool(getattr(config, "scale_attn_by_inverse_layer_idx", False))


def _numbers(model: Model, stays: Sequence[int]) -> dict[str, Any]:
    """Settings that are told block by block, of the blocks that stay."""
    config = model.module.config
    found: dict[str, Any] = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(stays)}
    if getattr(config, "layer_types", None):
        found["layer_types"] = [config.layer_types[index] for index in stays]
    return found


def _renumbered(model: Model, state: Mapping[str, Tensor], stays: Sequence[int]) -> dict[str, Tensor]:
    """A state without the blocks that do not stay."""
    prefix, found = _prefix(model), {}
    for name, value in state.items():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            if int(index) not in stays:
                continue
            name = f"{prefix}{stays.index(int(index))}.{rest}"
        found[name] = value
    return found


def _prefix(model: Model) -> str:
    """Of the names of what is in blocks, up to the block's number."""
    first = model.blocks[0].module
    name = next(name for name, module in model.module.named_modules() if module is first)
    return f"{name.rpartition('.')[0]}."


def _zeroed(layer: nn.Module, stored: Tensor, features: Tensor, side: int) -> Tensor:
    return stored.index_fill(side if isinstance(layer, nn.Linear) else 1 - side, features, 0)
