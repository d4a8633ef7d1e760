"""Causal language models as gpmetric sees them: a list of repeated blocks holding prunable layers.

Nothing here knows an architecture by name: the blocks are the largest ModuleList of the model, prunable layers are the
Linear and Conv1D modules inside them, and each block is replayed with the arguments it was called with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from gpmetric.errors import InputError, ModelError

__all__ = ["DEMO_MODEL", "Block", "Layer", "Model", "check_path", "load", "load_model", "pick_device"]

_LOG = logging.getLogger(__name__)
DEMO_MODEL = Path(__file__).parent / "demo" / "model"
_ROUTER = re.compile(r"(^|\.)(router|gate)$")  # mixture-of-experts routers are never pruned
_HUB_SECONDS = 10  # to answer at all
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

    module: nn.Module
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Model:
    """A loaded causal language model in evaluation mode."""

    name: str
    module: Any  # transformers' PreTrainedModel, which is untyped
    tokenizer: Any
    blocks: tuple[Block, ...]
    folder: Path | None = None  # where its files are

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
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> str:
        return str(next(self.module.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def digest(self) -> str:
        """sha256 over the config and every parameter's name, dtype, shape and bytes. Taken while dense."""
        config = {key: value for key, value in self.module.config.to_diff_dict().items() if key not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, parameter in self.module.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            flat = parameter.detach().contiguous().view(-1).cpu()
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
        return digest.hexdigest()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Gives the prunable weights back their present values when the block ends, whatever happened in it."""
        dense = [layer.weight.clone() for layer in self.layers]
        try:
            yield
        finally:
            for layer, weight in zip(self.layers, dense, strict=True):
                layer.weight.copy_(weight)

    @contextmanager
    def holding(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """The model with these prunable weights [out, in], one per layer, in place of its own; none is copied.

        A weight of another dtype is converted, which is a copy.
        """
        own = [layer.parameter.data for layer in self.layers]
        try:
            for layer, weight, mine in zip(self.layers, weights, own, strict=True):
                layer.parameter.data = layer.oriented(weight).to(mine.dtype)
            yield
        finally:
            for layer, mine in zip(self.layers, own, strict=True):
                layer.parameter.data = mine


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu` or `cuda`; auto takes CUDA when there is one.

    Raises:
        InputError: another name, or CUDA asked for and absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, but got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but torch sees no CUDA device here")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Model:
    """Loads a Hugging Face causal language model and finds its prunable layers.

    Args:
        name: a directory or a Hub name; None is the embedded demo model.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU and the stored dtype on CUDA.
        include: keep only the layers whose name this regular expression is found in.
        exclude: leave out the layers whose name this regular expression is found in.

    Raises:
        ModelError: missing, damaged, incomplete, quantised, not causal, without repeated blocks, or with weights of a
            form that would silently stay dense.
    """
    where = pick_device(device)
    path = DEMO_MODEL if name is None else name
    check_path(path)
    wanted = _resolve_dtype(dtype, where)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    module, tokenizer = _load(str(path), wanted)
    module.to(where).eval().requires_grad_(False)
    module.config.use_cache = False
    blocks = _find_blocks(module, _compile("--include", include), _compile("--exclude", exclude))
    model = Model("demo" if name is None else str(name), module, tokenizer, blocks, _folder(str(path)))
    _check(model)
    return model


def load(name: str | Path, *, device: str = "auto", dtype: str | None = None) -> Any:
    """A causal language model as transformers has it, of a directory or Hub name; also what `gpmetric slim` writes.

    No code that comes with a model is run: nothing has to be trusted.

    Args:
        device, dtype: as of `load_model`.

    Raises:
        ModelError: as `load_model`.
    """
    module = load_model(str(name), device=device, dtype=dtype).module
    module.config.use_cache = True
    return module


def check_path(path: str | Path) -> None:
    """A directory is checked here, since transformers would answer a wrong one with a page about the Hub."""
    folder = Path(path)
    if _is_directory(folder):
        if not (folder / "config.json").is_file():
            raise ModelError(f"model directory {str(path)!r} holds no config.json")
    elif str(path).startswith(".") or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", str(path)) or folder.exists():
        raise ModelError(f"model directory {str(path)!r} does not exist")


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name too long, a parent that may not be read
        raise ModelError(f"model directory {str(path)!r} cannot be read: {error.strerror}") from error


def _resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise InputError(f"--dtype must be one of {', '.join(choices)}, but got {dtype!r}")
    return choices[dtype]


def _load(path: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    # code that comes with a checkpoint is refused, which transformers would otherwise ask about on the terminal
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not _is_reachable(path)}
    place = repr(path) if Path(path).is_dir() else f"{path!r} (no directory here)"
    with _explained(f"model {place}"):
        _know_slim(path, options)
        config = AutoConfig.from_pretrained(path, **options)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"model {path!r} is quantised; prune the full-precision checkpoint it was made from")
        if config.is_encoder_decoder:
            raise ModelError(f"model {path!r} ({config.model_type}) is an encoder-decoder; a causal model is wanted")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **options,
        )
    module, info = loaded
    with _explained(f"tokenizer of model {place}"):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    for kind in ("missing", "mismatched", "unexpected"):
        names = sorted(map(str, info[f"{kind}_keys"]))
        if names and kind != "unexpected":
            raise ModelError(f"model {path!r} has {len(names)} {kind} weights, first {names[0]}")
        if names:
            _LOG.warning("model %r ignores %d weights that its files hold, first %s", path, len(names), names[0])
    return module, tokenizer


def _know_slim(path: str, options: dict[str, Any]) -> None:
    """Tells transformers of the models that `gpmetric slim` writes, if this is one, so that none of its code is run."""
    config, _ = PreTrainedConfig.get_config_dict(path, **options)
    if isinstance(config, dict) and str(config.get("model_type")).startswith("slim_"):
        from gpmetric.slim_models import SLIM_MODELS  # imports every architecture it knows

        for kind, made in SLIM_MODELS.values():
            AutoConfig.register(kind.model_type, kind, exist_ok=True)
            AutoModelForCausalLM.register(kind, made, exist_ok=True)


def _folder(path: str) -> Path:
    """Where the files of a loaded model are."""
    if Path(path).is_dir():
        return Path(path)
    found = cached_file(path, "config.json", local_files_only=True)
    assert found is not None  # it was loaded
    return Path(found).parent


def _is_reachable(path: str) -> bool:
    """False when a Hub name has to be answered from what was downloaded before: transformers would retry for 23 s."""
    if Path(path).is_dir():
        return True
    try:
        HfApi().model_info(path, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return True  # it answered: transformers says what is wrong
    except Exception:  # offline mode, or the HTTP library's own, which changes between releases of huggingface_hub
        return False
    return True


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what transformers raises (OSError, ValueError, SafetensorError, KeyError, ...) into one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 240, placeholder=" ...")
        if " " not in reason:  # a bare KeyError
            reason = f"{type(error).__name__} {reason}".strip()
        raise ModelError(f"{what} cannot be loaded: {reason}") from error


def _compile(option: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option} {pattern!r} is not a regular expression: {error}") from error


def _find_blocks(module: Any, include: re.Pattern[str] | None, exclude: re.Pattern[str] | None) -> tuple[Block, ...]:
    inside = set(module.get_decoder().modules())  # not a vision tower, whose list may be the larger one
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) and child in inside
    ]
    if not lists:
        raise ModelError(f"{type(module).__name__} has no list of repeated blocks")
    prefix, found = max(lists, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))
    blocks = []
    for index, block in enumerate(found):
        _refuse_fused_experts(f"{prefix}.{index}", block)
        layers = (
            Layer(f"{prefix}.{index}.{name}", child)
            for name, child in block.named_modules()
            if isinstance(child, (nn.Linear, Conv1D)) and not _ROUTER.search(name)
        )
        blocks.append(Block(block, tuple(layer for layer in layers if _wanted(layer.name, include, exclude))))
    if not any(block.layers for block in blocks):
        raise ModelError(f"no prunable layer is left in {type(module).__name__} (--include, --exclude)")
    return tuple(blocks)


def _wanted(name: str, include: re.Pattern[str] | None, exclude: re.Pattern[str] | None) -> bool:
    return (include is None or include.search(name) is not None) and not (exclude and exclude.search(name))


def _refuse_fused_experts(name: str, block: nn.Module) -> None:
    """Fused experts are 3-D parameters that no Linear holds: pruning around them would leave most weights dense."""
    for owner_name, owner in block.named_modules():
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() >= 3 and not isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                full = ".".join(filter(None, (name, owner_name, parameter_name)))
                raise ModelError(
                    f"{full} is a fused expert weight {list(parameter.shape)}: mixture-of-experts models cannot be "
                    "pruned yet"
                )


def _check(model: Model) -> None:
    # embeddings are padded to round sizes, by less than a tenth in every published model known to us
    if not 0.9 * model.vocabulary <= len(model.tokenizer) or model.tokenizer.vocab_size > model.vocabulary:
        raise ModelError(
            f"tokenizer and model of {model.name!r} do not match: the tokenizer has {model.tokenizer.vocab_size} "
            f"entries, the model's embedding {model.vocabulary}"
        )
    for name, parameter in model.module.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"weight {name} of {model.name!r} is not in memory")
        if not torch.isfinite(parameter).all():
            raise ModelError(f"weight {name} of {model.name!r} holds NaN or infinity")
    _check_causal(model)


@torch.no_grad()
def _check_causal(model: Model) -> None:
    """Refuses a model that sees later tokens (BERT and its kin load as one): its perplexity would mean nothing."""
    first, second = (
        model.module(input_ids=torch.tensor([[0, token]], device=model.device), use_cache=False).logits[0, 0].float()
        for token in (0, 1)
    )
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ModelError(f"model {model.name!r} is not causal: its prediction after a token depends on the next one")
