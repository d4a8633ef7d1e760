"""Opening models: a directory or a name of the Hugging Face Hub, without running code that comes with it."""

from __future__ import annotations

import json
import logging
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging

from gpmetric.blocks import find_layers, leave_dense
from gpmetric.blockwise.replay import check_blocks
from gpmetric.errors import InputError, ModelError
from gpmetric.experts import join_experts, split_experts
from gpmetric.models import Model, check_weights, find_parts
from gpmetric.placement import Placement
from gpmetric.stored_experts import map_experts, stored_shapes
from gpmetric.tensor_file import weight_files

__all__ = [
    "DEMO_MODEL", "check_path", "load", "load_model", "open_model", "pick_device", "prepare_model",
    "quiet_transformers",
]  # fmt: skip

_LOG = logging.getLogger(__name__)
DEMO_MODEL = Path(__file__).parent / "demo" / "model"
_LOADING = threading.RLock()
_HUB_SECONDS = 10  # to answer at all
_LAYERS = re.compile(r"(n|num|number_of)_(\w+_)?layers?")  # what configs call their number
_MOST_LAYERS = 1000
_SPARE = 10**7  # parameters beyond those of the files that a model may seem to have
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    name: str | None = None, *, resident: bool = True, device: str = "auto", dtype: str | None = None,
    include: str | None = None, exclude: str | None = None,
) -> Model:  # fmt: skip
    """A model that is ready to run; other arguments and errors as of `open_model`.

    Args:
        resident: whether all weights are brought to the device, or each block when it is needed.

    Raises:
        ModelError: also for weights that are not finite, and for a model that is not causal or whose blocks cannot be
            run one by one.
    """
    model = open_model(name, device=device, dtype=dtype, include=include, exclude=exclude)
    return prepare_model(model, resident=resident)


def prepare_model(
    model: Model, *, resident: bool, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Model:
    """An opened model on its device, if it is to stay there, that gives figures with a meaning; told of what it reads.

    Layers that choose experts, or that are not called as others are, stay dense from here on: running it shows them.

    Raises:
        ModelError: see `load_model`.
    """
    if resident and model.placement is not None:
        model.placement.settle(partial(progress, "reading weights"))
    check_weights(model, partial(progress, "checking weights"))
    progress("trying the model", 0, 1)
    dense = check_blocks(model)
    progress("trying the model", 1, 1)
    return leave_dense(model, dense)


def open_model(
    name: str | None = None, *, device: str = "auto", dtype: str | None = None, include: str | None = None,
    exclude: str | None = None,
) -> Model:  # fmt: skip
    """Opens a Hugging Face causal language model and finds its prunable layers; its weights are mapped, not read.

    Args:
        name: a directory or a Hub name; None is the embedded demo model.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU and the stored dtype on CUDA.
        include: keep only the layers whose name this regular expression is found in.
        exclude: leave out the layers whose name this regular expression is found in.

    Raises:
        ModelError: missing, damaged, incomplete, quantised, without repeated blocks, or with weights of a form that
            would silently stay dense.
    """
    where = pick_device(device)
    path = DEMO_MODEL if name is None else name
    check_path(path)
    wanted = _resolve_dtype(dtype, where)
    with quiet_transformers():
        module, tokenizer = _load(str(path), wanted)
    module.eval().requires_grad_(False)
    names, fused = list(module.state_dict()), split_experts(module)
    for _, buffer in module.named_buffers():
        buffer.data = buffer.to(where)
    module.config.use_cache = False
    if getattr(module, "loss_type", None) is None:  # GPT-2's class names none, which transformers would warn of
        module.loss_type = "ForCausalLM"
    blocks, dense = find_layers(module, include, exclude)
    folder, dtype_there = _folder(str(path)), torch.float32 if wanted == torch.float32 else None
    placement = Placement(find_parts(module, blocks), where, dtype_there, weight_files(folder))
    experts = map_experts(module, names, fused, stored_shapes(folder)) if fused else {}
    return Model("demo" if name is None else str(name), module, tokenizer, blocks, folder, placement, dense, experts)


def load(name: str | Path | None = None, *, device: str = "auto", dtype: str | None = None) -> Any:
    """A causal language model as transformers has it, of a directory or Hub name; also what `gpmetric slim` writes.

    Without a name it is the embedded demo model. No code that comes with a model is run: nothing has to be trusted.

    Args:
        device, dtype: as of `load_model`.

    Raises:
        ModelError: as `load_model`.
    """
    module = load_model(None if name is None else str(name), device=device, dtype=dtype).module
    module.config.use_cache = True
    join_experts(module)
    return module


def check_path(path: str | Path) -> None:
    """A directory is checked here, since transformers would answer a wrong one with a page about the Hub."""
    if not isinstance(path, str | Path):
        raise ModelError(f"a model is a directory or a name of the Hub, but got {path!r:.60}")
    folder = Path(path)
    if (why := _other_kind(folder)) is not None:
        raise ModelError(f"{str(path)!r} {why}")
    if _is_directory(folder):
        if not (folder / "config.json").is_file():
            raise ModelError(f"model directory {str(path)!r} holds no config.json")
    elif str(path).startswith(".") or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", str(path)) or folder.exists():
        raise ModelError(f"model directory {str(path)!r} does not exist")


def _other_kind(path: Path) -> str | None:
    """What a path is that is no model as it can be pruned, and what to do; None where there is no telling."""
    gguf = "converted for llama.cpp: give the safetensors checkpoint that it was made from"
    if not _is_directory(path):
        if path.suffix.lower() == ".gguf" and path.exists():
            return f"is a GGUF file, {gguf}"
        weights = path.suffix in (".safetensors", ".bin") and path.exists()
        return "is a file of weights: give the folder that it is in" if weights else None
    if (path / "adapter_config.json").is_file():
        base = _base_of(path / "adapter_config.json")
        return (
            f"is a LoRA adapter{base}, not a model: merge it (peft's merge_and_unload, then save_pretrained) and give "
            "the folder of the merged model"
        )
    if any(path.glob("*.safetensors*")):
        return None
    if any(path.glob("*.gguf")):
        return f"holds GGUF files only, {gguf}"
    if any(path.glob("pytorch_model*.bin*")):
        return (
            "holds pytorch_model.bin, a pickle, which is not opened since it may run code; no file named "
            "model.safetensors: save it as that with transformers' save_pretrained where you trust it"
        )
    return None


def _base_of(config: Path) -> str:
    """Of which model an adapter is, if it says."""
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" of {name!r:.100}"


def _quantised(config: Any) -> str | None:
    """How a config says that its weights are quantised: as transformers, compressed-tensors or MLX have it."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config", "quantization"):
            if (told := getattr(part, key, None)) is not None:
                told = told if isinstance(told, dict) else getattr(told, "__dict__", {})
                method = told.get("quant_method")
                return f" ({getattr(method, 'value', method)})" if method else ""
    return None


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
        _look_at_config(path, options)
        config = AutoConfig.from_pretrained(path, **options)
        if (how := _quantised(config)) is not None:
            raise ModelError(
                f"model {path!r} is quantised{how}: give the full-precision checkpoint that it was made from"
            )
        if config.is_encoder_decoder:
            raise ModelError(f"model {path!r} ({config.model_type}) is an encoder-decoder; a causal model is wanted")
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"model {path!r} is of type {config.model_type!r}, for which transformers has no causal language model"
            )
        _check_size(path, config)
        module, info = _mapped(path, config, dtype, options)
    with _explained(f"tokenizer of model {place}"):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    slimmed = str(module.config.model_type).startswith("slim_")
    for kind in ("missing", "mismatched", "unexpected"):
        names = sorted(map(str, info[f"{kind}_keys"]))
        if names and (kind != "unexpected" or slimmed):  # of widths that are not its own
            raise ModelError(f"model {path!r} has {len(names)} {kind} weights, first {names[0]}")
        if names:
            _LOG.warning("model %r ignores %d weights that its files hold, first %s", path, len(names), names[0])
    return module, tokenizer


def _mapped(path: str, config: Any, dtype: torch.dtype | str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A module with its weights as their files have them where these can be converted later, else in `dtype`.

    transformers maps the files into memory where a weight keeps its dtype.
    """

    def load(kind: torch.dtype | str) -> tuple[Any, Any]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=deepcopy(config),
            dtype=kind,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            output_loading_info=True,
            **options,
        )
        module, info = loaded
        return module, info

    if dtype != torch.float32:
        return load(dtype)
    module, info = load("auto")
    own = module.dtype
    stored = {weight.dtype for weight in module.parameters()} | _stored_dtypes(_folder(path))
    # a buffer that was made in half precision, Gemma's scale of embeddings for instance, is not the one of fp32
    halved = any(buffer.dtype == own for buffer in module.buffers() if own != torch.float32)
    if stored != {own} or halved:
        return load(dtype)
    for part in (module.config, *(getattr(module.config, name) for name in module.config.sub_configs)):
        if part is not None:
            part.dtype = dtype  # as transformers tells it of a model that it converts
    return module, info


def _stored_dtypes(folder: Path) -> set[torch.dtype]:
    """Floating dtypes of the tensors in a folder's files."""
    found = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= {_FLOATS.get(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - no mapping
    return {dtype for dtype in found if dtype is not None}


def _look_at_config(path: str, options: dict[str, Any]) -> None:
    """Refuses what transformers would try to build for hours, and names it the models that `gpmetric slim` writes.

    Of these, if this is one, none of the code that comes with it is run.

    Raises:
        ModelError: weights outside the folder, or more layers than any model has.
    """
    if Path(path).is_dir():
        weight_files(Path(path))
    config, _ = PreTrainedConfig.get_config_dict(path, **options)
    if not isinstance(config, dict):  # which is told behind this
        return
    for part in (config, *config.values()):
        for name, count in part.items() if isinstance(part, dict) else ():
            if _LAYERS.fullmatch(str(name)) and isinstance(count, int | float) and not count <= _MOST_LAYERS:
                raise ModelError(
                    f"model {path!r}: {name} is {count!r:.30} in its config; at most {_MOST_LAYERS} are built"
                )
    if str(config.get("model_type")).startswith("slim_"):
        from gpmetric.slim_models import SLIM_MODELS  # imports every architecture it knows

        for kind, made in SLIM_MODELS.values():
            AutoConfig.register(kind.model_type, kind, exist_ok=True)
            AutoModelForCausalLM.register(kind, made, exist_ok=True)


def _check_size(path: str, config: Any) -> None:
    """Refuses a config of a model that is much larger than its weights: transformers would make up all that is missing.

    Raises:
        ModelError: naming both numbers of parameters.
    """
    wanted = stored = 0
    with suppress(Exception), torch.device("meta"):  # whatever is wrong, loading says it
        stored = sum(map(prod, stored_shapes(Path(path)).values()))
        built: Any = AutoModelForCausalLM.from_config(deepcopy(config))
        wanted = sum(one.numel() for one in built.parameters())
    if wanted > 2 * stored + _SPARE:  # tied weights are stored once
        raise ModelError(f"model {path!r} has {stored:,} parameters in its files, its config is of one with {wanted:,}")


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
def quiet_transformers() -> Iterator[None]:
    """Without the bars and warnings of transformers, which would stand among ours; what is wrong is told by us.

    One thread at a time is inside: the settings are the process's, and so is what transformers changes while it loads
    (transformers issue 41782: of two threads that load, one is told of missing weights).
    """
    with _LOADING:
        level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


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
