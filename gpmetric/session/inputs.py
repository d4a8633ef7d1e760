"""What a command reads, whatever it does: model, texts, windows, device. Requests of commands extend it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from gpmetric.errors import InputError, one_of
from gpmetric.extensible import Extensible
from gpmetric.options import Option, Request, described

if TYPE_CHECKING:
    import torch

__all__ = [
    "BOS", "DEVICES", "DTYPES", "PRESETS", "SAMPLINGS", "STATISTICS_DTYPES", "Inputs", "Limits", "Staff", "Texts",
    "parse_size",
]  # fmt: skip

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
STATISTICS_DTYPES = ("float32", "bfloat16")
BOS = ("auto", "always", "never")
SAMPLINGS = ("windows", "documents")

# Options that stand for a regime together. The published one is that of SparseGPT and Wanda, whose windows have no BOS
# but where a document begins; None leaves a command its default.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"samples": 32, "sequence_length": 256, "sampling": "windows", "bos": "auto", "windows": 32},
    "standard": {"samples": 128, "sequence_length": None, "sampling": "windows", "bos": "auto", "windows": None},
    "published": {"samples": 128, "sequence_length": 2048, "sampling": "documents", "bos": "never", "windows": None},
}

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Texts:
    """Which text is read for what.

    Attributes:
        splits: by split, its text; None is the demo's split of that name, where the demo model is used.
        windows: by split, how many windows at most; None is all.
        cut: one text that is cut into all splits, instead.
        evaluated: texts that perplexity is measured on besides; None is the demo's test text.
        disjoint: whether no two splits may share a window.
    """

    splits: Mapping[str, str | None] = field(default_factory=dict)
    windows: Mapping[str, int | None] = field(default_factory=dict)
    cut: str | None = None
    evaluated: tuple[str | None, ...] = ()
    disjoint: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits(Request):
    """What a command that runs a model may take."""

    minutes: Annotated[float | None, Option("Wall time of the whole command, in minutes.", above=0)] = None
    memory: Annotated[
        str | None, Option("Memory of the device at most, 12GB for instance; what is free by default.", metavar="SIZE")
    ] = None

    def check(self) -> None:
        super().check()
        if self.memory is not None:
            parse_size(self.memory)

    @property
    def memory_limit(self) -> int | None:
        """Bytes of the device's memory at most."""
        return None if self.memory is None else parse_size(self.memory)


@dataclass(frozen=True, kw_only=True)
class Staff(Request):
    """The options of commands that share their work out."""

    workers: Annotated[
        int | None,
        Option("Worker processes, each with the model; discover: one per core for small ones, and per GPU.", least=1),
    ] = None
    ray: Annotated[
        str | None,
        Option("Workers on the nodes of a Ray cluster: auto, or its address; needs gpmetric[ray].", metavar="ADDRESS"),
    ] = None
    worker_gpus: Annotated[float, Option("Part of a GPU that a worker of --ray takes, or how many.", above=0)] = 1.0

    def check(self) -> None:
        super().check()
        if self.ray is not None and not self.ray.strip():
            raise InputError("--ray must be auto or the address of a cluster, but is empty")

    @property
    def shared_out(self) -> bool:
        """Whether workers are asked for."""
        return self.ray is not None or self.workers is not None


@dataclass(frozen=True, kw_only=True)
class Inputs(Limits, Extensible):
    """The options that commands share; those of a command that has no use for some name them in `unused`."""

    model: Annotated[
        str | tuple[str, ...] | None,
        Option(
            "Hugging Face directory or name; the embedded demo model if none.",
            metavar="MODEL",
            argument=True,
            reads=True,
        ),
    ] = None
    calibration: Annotated[
        str | None,
        Option(
            "Text of the statistics: a file, folder or pattern, - (standard input) or hf:dataset:split.", reads=True
        ),
    ] = None
    text_column: Annotated[
        str | None, Option("Column of the text in JSON, Parquet and CSV; text by default.", metavar="NAME")
    ] = None
    preset: Annotated[
        str | None,
        Option(
            "Samples, length, sampling, BOS and windows at once; options given win.",
            metavar="|".join(PRESETS),
            choices=PRESETS,
        ),
    ] = None
    samples: Annotated[int, Option("Calibration windows.", accepted=("--nsamples",), least=1)] = 128
    sampling: Annotated[
        str,
        Option(
            "Where calibration windows are: the first ones, or one inside each of random documents.", choices=SAMPLINGS
        ),
    ] = "windows"
    sequence_length: Annotated[
        int | None, Option("Tokens per window; the model's context, at most 2048.", accepted=("--seqlen",))
    ] = None
    windows: Annotated[int | None, Option("Windows of each text evaluated; all by default.", least=1)] = None
    shuffle: Annotated[bool, Option("Draw windows with --seed, not the first.", names=("--shuffle",))] = False
    bos: Annotated[str, Option("Whether a window begins with BOS; auto where the tokenizer adds it.", choices=BOS)] = (
        "auto"
    )
    seed: Annotated[int, Option("Seed of everything random.", least=0, below=2**63)] = 0
    device: Annotated[str, Option("Where it runs.", choices=DEVICES)] = "auto"
    dtype: Annotated[
        str | None,
        Option(
            "What the model is computed in, {choices}; float32 on a CPU, as stored on CUDA.",
            metavar="DTYPE",
            choices=DTYPES,
        ),
    ] = None
    include: Annotated[str | None, Option("Prune only layers whose name matches.", metavar="REGEX")] = None
    exclude: Annotated[str | None, Option("Leave layers whose name matches dense.", metavar="REGEX")] = None
    statistics_dtype: Annotated[
        str, Option("What G, H, F and R are kept in, {choices}.", metavar="DTYPE", choices=STATISTICS_DTYPES)
    ] = "float32"

    @classmethod
    def filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = super().filled(given)
        others = {name: value for name, value in given.items() if name != "preset"}
        if (preset := given.get("preset")) is None:
            return others
        meant, known = PRESETS[one_of("--preset", preset, PRESETS)], {field.name for field in described(cls)}
        return {name: value for name, value in meant.items() if name in known and value is not None} | others

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """That matrices of statistics are kept in; None is float32."""
        import torch  # which options are read without

        return torch.bfloat16 if self.statistics_dtype == "bfloat16" else None

    @property
    def models(self) -> tuple[str | None, ...]:
        """Every model asked for, once; (None,) is the demo model."""
        names = (self.model,) if self.model is None or isinstance(self.model, str) else self.model
        return tuple(dict.fromkeys(names)) or (None,)

    @property
    def texts(self) -> Texts:
        """What is read; a command says it of its own options."""
        return Texts()

    @property
    def shuffle_seed(self) -> int | None:
        """Seed that windows are drawn with; None takes the first ones."""
        return self.seed if self.shuffle else None


def parse_size(text: str) -> int:
    """Bytes of a size such as 12GB or 900MiB.

    Raises:
        InputError: not a size.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]I?)?B?\s*", text.upper(), re.ASCII)
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise InputError(f"--memory must be a size such as 12GB or 900MiB, but got {text!r:.40}")
    return size
