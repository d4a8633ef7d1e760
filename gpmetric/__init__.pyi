"""Made by `make stubs` of the requests of the commands; not to be edited."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torch import Tensor

from gpmetric.allocation.listener import AllocateListener
from gpmetric.errors import GpmetricError
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.status import StatusListener
from gpmetric.loading import load, load_model
from gpmetric.metrics import BASELINES, Metric
from gpmetric.plugins import load_plugin
from gpmetric.pruning.listeners import BenchListener, PruneListener
from gpmetric.pruning.mask import select_mask
from gpmetric.results import (
    AllocateResult,
    AnalyseResult,
    BenchResult,
    CatalogueResult,
    DiscoverResult,
    EvaluateResult,
    LayersResult,
    PruneResult,
    ReproduceResult,
    Result,
    SlimResult,
    StatisticsResult,
    TuneResult,
    VerifyResult,
    load_result,
)
from gpmetric.session.listeners import EvaluateListener, Listener
from gpmetric.structured.listener import SlimListener
from gpmetric.targets import parse_target
from gpmetric.tuning.listener import TuneListener

__all__ = [
    "BASELINES",
    "DiscoverListener",
    "GpmetricError",
    "Metric",
    "Result",
    "allocate",
    "analyse",
    "bench",
    "calibrate",
    "catalogue",
    "check_ledger",
    "discover",
    "evaluate",
    "export",
    "export_ledger",
    "free_ledger",
    "layers",
    "list_names",
    "load",
    "load_model",
    "load_plugin",
    "load_result",
    "merge_ledgers",
    "pack",
    "parse_target",
    "prune",
    "repair_ledger",
    "report",
    "reproduce",
    "select_mask",
    "slim",
    "statistics",
    "status",
    "tune",
    "unpack",
    "verify",
]
__version__: str

def allocate(
    model: str | Path | None = None,
    *,
    search: str | Path | None = None,
    validation: str | Path | None = None,
    ledger: str | Path | None = None,
    output: str | Path | None = None,
    metric: str = "wanda",
    sparsity: float | None = None,
    max_loss_ratio: float | None = None,
    granularity: str | None = None,
    patterns: str | Iterable[str] = ("dense", "4:8", "2:4", "1:4"),
    update: str = "none",
    fit: str = "own",
    levels: int | None = None,
    genes: str = "matrix",
    allocator: str = "nsga2",
    objective: str = "kl",
    lowest: float = 0.4,
    highest: float = 0.8,
    init: str | Path | Iterable[str | Path] = (),
    population: int = 24,
    evaluations: int | None = None,
    tokens: int | None = None,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
    track: str | Iterable[str] = (),
    force: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    worker_gpus: float = 1.0,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    windows: int = 64,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    search_windows: int = 32,
    resume: bool = False,
    listener: AllocateListener | None = None,
    progress: bool | None = None,
) -> AllocateResult:
    """Searches the sparsity of each layer, and writes the allocation that is asked for."""

def analyse(
    ledger: str | Path,
    *,
    seed: int = 0,
    output: str | Path | None = None,
    force: bool = False,
    plugin: str | Path | Iterable[str | Path] = (),
) -> AnalyseResult:
    """Which parts of formulas, sizes and masks go with good fitness in a campaign."""

def bench(
    model: str | Path | Iterable[str | Path] | None = None,
    *,
    text: str | Path | Iterable[str | Path] = (),
    metric: str | Iterable[str] = (),
    target: str | float | Iterable[str | float] = ("0.5",),
    update: str = "none",
    fit: str = "own",
    permute: bool = False,
    one_shot: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    worker_gpus: float = 1.0,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    ledger: str | Path | None = None,
    resume: bool = False,
    listener: BenchListener | None = None,
    progress: bool | None = None,
) -> BenchResult:
    """Every metric at every target under one protocol, the dense model first."""

def calibrate(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    operands: str | Iterable[str] = ("X",),
    listener: Listener | None = None,
    progress: bool | None = None,
) -> StatisticsResult:
    """Writes the statistics of every prunable layer of a dense model, as an exported `score` reads them."""

def catalogue(
    name: str | None = None,
    *,
    model: str | Path | Iterable[str | Path] | None = None,
    text: str | Path | None = None,
    target: str | float | Iterable[str | float] = ("0.5", "0.6", "0.7", "2:4"),
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    ledger: str | Path | None = None,
    resume: bool = False,
    listener: BenchListener | None = None,
    progress: bool | None = None,
) -> CatalogueResult:
    """The formulas with what each is worth: as it stands in the package, or measured on the models asked for."""

def check_ledger(
    ledger: str | Path,
) -> Result:
    """What is wrong with a campaign's ledger, also while a driver has it:
    `gpmetric.check_ledger("campaign.sqlite")`."""

def discover(
    model: str | Path | Iterable[str | Path] | None = None,
    *,
    windows: int | None = 128,
    search: str | Path | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    text: str | Path | None = None,
    target: str | float | Iterable[str | float] = ("0.5", "0.6", "0.7", "2:4"),
    operands: str | Iterable[str] = ("W", "X", "G", "H", "D", "F"),
    primitives: str | Iterable[str] = (
        "neg",
        "abs",
        "sqr",
        "sqrt",
        "log",
        "exp",
        "tanh",
        "inv",
        "mms",
        "zsn",
        "rowsum",
        "colsum",
        "rownorm",
        "colnorm",
        "add",
        "sub",
        "mul",
        "div",
        "max",
        "min",
        "pow",
    ),
    start: str | Iterable[str] = (),
    forbid: str | Iterable[str] = (),
    update: str = "none",
    fit: str = "own",
    objective: str = "kl",
    group: str = "search",
    population: int = 40,
    generations: int | None = None,
    evaluations: int | None = None,
    max_nodes: int = 30,
    ledger: str | Path | None = None,
    resume: bool = False,
    fork: str | Path | None = None,
    reseed: bool = False,
    on_generation: str | None = None,
    track: str | Iterable[str] = (),
    live: int | None = None,
    cache: str | Path | None = None,
    search_windows: int = 32,
    calibration_seeds: int = 3,
    workers: int | None = None,
    ray: str | None = None,
    worker_gpus: float = 1.0,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    listener: DiscoverListener | None = None,
    progress: bool | None = None,
) -> DiscoverResult:
    """Runs a campaign to its end: `gpmetric.discover("DIR", text="t.txt", minutes=30,
    ledger="campaign.sqlite")`."""

def evaluate(
    model: str | Path | None = None,
    *,
    text: str | Path | Iterable[str | Path] = (),
    tasks: str | Iterable[str] = (),
    task_folder: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    minutes: float | None = None,
    memory: str | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    listener: EvaluateListener | None = None,
    progress: bool | None = None,
) -> EvaluateResult:
    """Perplexity on each text, over non-overlapping windows, and tasks, with everything needed to repeat it."""

def export(
    formula: str | Path,
    *,
    format: str = "python",
    output: str | Path | None = None,
    force: bool = False,
    plugin: str | Path | Iterable[str | Path] = (),
) -> Result:
    """Writes what is asked for and returns the JSON document of `gpmetric export`, with its `text` where no
    file is."""

def export_ledger(
    ledger: str | Path,
    *,
    output: str | Path = ...,
    force: bool = False,
) -> Result:
    """Writes every candidate with its figures: `gpmetric.export_ledger("campaign.sqlite",
    output="candidates.csv")`."""

def free_ledger(
    ledger: str | Path,
) -> Result:
    """Takes a ledger from a driver that has ended where nothing tells so:
    `gpmetric.free_ledger("campaign.sqlite")`."""

def layers(
    model: str | Path | None = None,
    *,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> LayersResult:
    """Every parameter of a model, each once."""

def list_names(
    kind: str | None = None,
    *,
    plugin: str | Path | Iterable[str | Path] = (),
) -> Result:
    """The names that options and formulas know: `gpmetric.list_names("metrics")`."""

def merge_ledgers(
    ledgers: str | Path | Iterable[str | Path] = (),
    *,
    output: str | Path | None = None,
) -> Result:
    """Puts campaigns together: `gpmetric.merge_ledgers(["a.sqlite", "b.sqlite"], output="both.sqlite")`."""

def pack(
    folder: str | Path,
    *,
    output: str | Path | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> Result:
    """Packs every file of a folder and of its folders; each piece is decoded again and compared before the
    next."""

def prune(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    text: str | Path | None = None,
    metric: str = "wanda",
    target: str | float | None = None,
    allocation: str | Path | None = None,
    update: str = "none",
    fit: str = "own",
    permute: bool = False,
    recipe: str | Path | None = None,
    one_shot: bool = False,
    save_masks: str | Path | None = None,
    force: bool = False,
    resume: bool = True,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    listener: PruneListener | None = None,
    progress: bool | None = None,
) -> PruneResult:
    """Prunes a model under the protocol of `bench`, writes it block by block and verifies what was written."""

def repair_ledger(
    ledger: str | Path,
    *,
    output: str | Path | None = None,
) -> Result:
    """Saves what is sound of a ledger: `gpmetric.repair_ledger("campaign.sqlite", output="repaired.sqlite")`."""

def report(
    source: str | Path,
    *,
    output: str | Path | None = None,
    force: bool = False,
    plugin: str | Path | Iterable[str | Path] = (),
) -> Result:
    """Writes the page of a result: `gpmetric.report("campaign.sqlite", output="page.html")`."""

def reproduce(
    name: str | None = None,
    *,
    model: str | None = None,
    text: str | Path | None = None,
    list: bool = False,
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    ledger: str | Path | None = None,
    resume: bool = False,
    listener: BenchListener | None = None,
    progress: bool | None = None,
) -> ReproduceResult:
    """Runs the studies that are asked for, or all whose models are on this machine."""

def slim(
    model: str | Path | None = None,
    *,
    search: str | Path | None = None,
    validation: str | Path | None = None,
    search_windows: int = 256,
    output: str | Path | None = None,
    sparsity: float = 0.3,
    granularity: str | Iterable[str] = ("channel", "head"),
    format: str | None = None,
    budget: str = "global",
    cost: str = "parameters",
    multiple_of: int = 1,
    estimator: str = "exchange",
    objective: str = "kl",
    start: str = "auto",
    repair: str = "least-squares",
    add_bias: bool = False,
    steps: int | None = None,
    draws: int = 2,
    batch: int = 1,
    rate: float | None = None,
    track: str | Iterable[str] = (),
    force: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    worker_gpus: float = 1.0,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    windows: int = 64,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ledger: str | Path | None = None,
    resume: bool = False,
    listener: SlimListener | None = None,
    progress: bool | None = None,
) -> SlimResult:
    """Searches, writes what stays, and reads it in a fresh process."""

def statistics(
    model: str | Path | None = None,
    *,
    operands: str | Iterable[str] = ("X",),
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    listener: Listener | None = None,
    progress: bool | None = None,
) -> dict[str, dict[str, Tensor]]:
    """The statistics of every prunable layer of a dense model, as an exported `score` reads them."""

def status(
    ledger: str | Path,
    *,
    watch: float | None = None,
    plugin: str | Path | Iterable[str | Path] = (),
    listener: StatusListener | None = None,
    progress: bool | None = None,
) -> Result:
    """Where a campaign is: `gpmetric.status("campaign.sqlite")`."""

def tune(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    target: str | float = "0.5",
    text: str | Path | None = None,
    metric: str | Iterable[str] = (),
    evolve: bool | None = None,
    structured: bool = False,
    format: str | None = None,
    force: bool = False,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    calibration: str | Path | None = None,
    text_column: str | None = None,
    preset: str | None = None,
    samples: int = 128,
    sampling: Literal["windows", "documents"] = "windows",
    sequence_length: int | None = None,
    windows: int = 64,
    shuffle: bool = False,
    bos: Literal["auto", "always", "never"] = "auto",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    statistics_dtype: Literal["float32", "bfloat16"] = "float32",
    search: str | Path | None = None,
    validation: str | Path | None = None,
    search_windows: int = 32,
    ledger: str | Path | None = None,
    resume: bool = False,
    listener: TuneListener | None = None,
    progress: bool | None = None,
) -> TuneResult:
    """Finds a recipe for a model and a target, prunes by it, and says what each of its parts is worth."""

def unpack(
    archive: str | Path,
    *,
    output: str | Path | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> Result:
    """Writes the folder whole, each file checked against its sha256, or nothing."""

def verify(
    folder: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    against: str | Path | None = None,
    plugin: str | Path | Iterable[str | Path] = (),
    minutes: float | None = None,
    memory: str | None = None,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> VerifyResult:
    """Re-reads a checkpoint that `prune` or `slim` wrote, one tensor at a time, and runs it block by block."""
