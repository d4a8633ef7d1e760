"""The commands of `gpmetric`, one row each: what it is asked for, what runs it, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpmetric.allocation.request import AllocateRequest
from gpmetric.analysis.request import AnalyseRequest
from gpmetric.evolution.ledger_requests import (
    LedgerExportRequest,
    LedgerMergeRequest,
    LedgerRepairRequest,
    LedgerRequest,
)
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.formats.request import ExportRequest
from gpmetric.lazy import lazy
from gpmetric.listing import ListRequest
from gpmetric.options import Request
from gpmetric.packing.requests import PackRequest, UnpackRequest
from gpmetric.pruning.requests import (
    BenchRequest,
    CatalogueRequest,
    PruneRequest,
    ReproduceRequest,
    VerifyRequest,
)
from gpmetric.reporting.request import ReportRequest
from gpmetric.session.requests import CalibrateRequest, EvaluateRequest, LayersRequest
from gpmetric.structured.request import SlimRequest
from gpmetric.tuning.request import TuneRequest

__all__ = ["COMMANDS", "GROUPS", "Command", "listener_of"]


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        help: what it does; the first sentence stands in the list of commands.
        request: what it is asked for.
        run: called with the request, and with the listener where there is one; gives the document of --json.
        show: called with a console, the document and the request when it is done.
        listener: called with a console; a context manager that is told of the progress.
        failure: why a document is of work that failed, None where it is not.
        timed: whether `run` wants to know when the command began, as `started`.
        write: called with the document and the request once --json is written, for what can be made of it again.
        next: called with the document and the request; the command lines that may come next.
        live: whether the listener prints what belongs to the tables.
        work: what it does with a session, for `gpmetric plan`; None for a command that runs no model.
        examples: command lines for the help.
    """

    help: str
    request: type[Request]
    run: Callable[..., dict[str, Any]]
    show: Callable[..., None]
    listener: Callable[..., Any] | None = None
    failure: Callable[[Mapping[str, Any]], str | None] = lambda document: document.get("error")
    timed: bool = False
    write: Callable[..., None] = lambda document, request: None
    next: Callable[..., Sequence[str]] = lambda document, request: ()
    live: bool = False
    work: Callable[..., Any] | None = None
    examples: tuple[str, ...] = ()


GROUPS = {"ledger": "Checks, repairs, exports, merges and frees ledgers of campaigns."}
COMMANDS: dict[str, Command] = {  # the first word of two is a group
    "discover": Command(
        "Evolves metrics for a model and puts the winner beside every baseline.",
        DiscoverRequest,
        lazy("gpmetric.evolution.discover:run_campaign"),
        lazy("gpmetric.terminal.tables:print_discover"),
        lazy("gpmetric.terminal.live:DiscoverReport"),
        timed=True,
        work=lazy("gpmetric.evolution.workplace:campaign_work"),
        next=lazy("gpmetric.terminal.next_steps:after_discover"),
        examples=(
            "gpmetric discover --target 0.5 --minutes 5 --ledger short.sqlite",
            "gpmetric discover DIR --text corpus.txt --target 0.5 --target 2:4 --minutes 30 --ledger campaign.sqlite",
            "gpmetric discover DIR --text corpus.txt --update admm --fit dense --minutes 60 --ledger inside.sqlite",
            "gpmetric discover --resume --ledger short.sqlite --minutes 10 --target 0.5",
        ),
    ),
    "bench": Command(
        "Benchmarks metrics: perplexity of the model pruned by each metric to each target.\n\n"
        "With several models, a last table says where each metric wins and loses against Wanda. A metric or model that "
        "fails costs the others nothing: the result holds the reason, and the exit status is 1.",
        BenchRequest,
        lazy("gpmetric.pruning.bench:run_bench"),
        lazy("gpmetric.terminal.bench:print_bench"),
        lazy("gpmetric.terminal.reports:BenchReport"),
        lazy("gpmetric.pruning.bench:first_failure"),
        work=lazy("gpmetric.pruning.bench:bench_work"),
        timed=True,
        next=lazy("gpmetric.terminal.next_steps:after_bench"),
        examples=(
            "gpmetric bench --metric wanda --metric sparsegpt --target 0.5 --target 2:4",
            "gpmetric bench DIR --calibration c.txt --text t.txt --metric wanda --metric campaign.sqlite",
            "gpmetric bench NAME --preset published --calibration hf:allenai/c4/en:train --text t.txt",
        ),
    ),
    "export": Command(
        "Writes a formula, or the winner of a campaign, as a self-contained file.",
        ExportRequest,
        lazy("gpmetric.evolution.export:run_export"),
        lazy("gpmetric.terminal.export:print_export"),
        next=lazy("gpmetric.terminal.next_steps:after_export"),
        examples=(
            "gpmetric export campaign.sqlite --format python -o metric.py",
            'gpmetric export "abs(W)*sqrt(X)" --format latex',
            "gpmetric export metric.py --format triton -o kernel.py",
        ),
    ),
    "catalogue": Command(
        "Shows the formulas that were found, how they transfer, or measures them on other models.",
        CatalogueRequest,
        lazy("gpmetric.pruning.transfer:run_catalogue"),
        lazy("gpmetric.terminal.bench:print_catalogue"),
        lazy("gpmetric.terminal.reports:BenchReport"),
        timed=True,
        work=lazy("gpmetric.pruning.transfer:catalogue_work"),
        next=lazy("gpmetric.terminal.next_steps:after_catalogue"),
        examples=(
            "gpmetric catalogue",
            "gpmetric catalogue fisher_dense",
            "gpmetric catalogue --model DIR --calibration c.txt --text t.txt --json mine.json",
        ),
    ),
    "reproduce": Command(
        "Measures published figures again by their protocol, and puts ours beside theirs.",
        ReproduceRequest,
        lazy("gpmetric.pruning.reproduce:run_reproduce"),
        lazy("gpmetric.terminal.reproduce:print_reproduce"),
        lazy("gpmetric.terminal.reports:BenchReport"),
        timed=True,
        next=lazy("gpmetric.terminal.next_steps:after_reproduce"),
        examples=(
            "gpmetric reproduce --list",
            "gpmetric reproduce llama-7b",
        ),
    ),
    "allocate": Command(
        "Searches how sparse each layer should be: the front between sparsity and loss, and one allocation of it.",
        AllocateRequest,
        lazy("gpmetric.allocation.allocate:run_allocation"),
        lazy("gpmetric.terminal.tables:print_allocation"),
        lazy("gpmetric.terminal.reports:AllocateReport"),
        work=lazy("gpmetric.allocation.prepare:allocate_work"),
        timed=True,
        write=lazy("gpmetric.allocation.allocate:write_pages"),
        next=lazy("gpmetric.terminal.next_steps:after_allocate"),
        examples=(
            "gpmetric allocate DIR --calibration c.txt --sparsity 0.7 -o allocation.json --plot front.png",
            "gpmetric allocate DIR --calibration c.txt --update admm --fit dense --sparsity 0.6 -o allocation.json",
        ),
    ),
    "tune": Command(
        "Finds the best pruned model at a sparsity: metric, update and allocation together, chosen on validation text."
        "\n\nWith --structured, the best model without some of its channels, heads and layers.",
        TuneRequest,
        lazy("gpmetric.tuning.tune:run_tune"),
        lazy("gpmetric.terminal.tables:print_tune"),
        lazy("gpmetric.terminal.reports:TuneReport"),
        work=lazy("gpmetric.tuning.tune:tune_work"),
        timed=True,
        next=lazy("gpmetric.terminal.next_steps:after_tune"),
        examples=(
            "gpmetric tune DIR --calibration c.txt --sparsity 0.6 --minutes 60 -o tuned",
            "gpmetric tune DIR --calibration c.txt --sparsity 2:4 --no-evolve -o tuned",
            "gpmetric tune DIR --calibration c.txt --sparsity 0.3 --structured --minutes 30 -o smaller",
        ),
    ),
    "prune": Command(
        "Prunes a model, writes it as a standard Hugging Face checkpoint, and verifies what was written.",
        PruneRequest,
        lazy("gpmetric.pruning.prune:run_prune"),
        lazy("gpmetric.terminal.tables:print_prune"),
        lazy("gpmetric.terminal.reports:PruneReport"),
        work=lazy("gpmetric.pruning.prune:prune_work"),
        timed=True,
        next=lazy("gpmetric.terminal.next_steps:after_prune"),
        examples=(
            "gpmetric prune DIR --calibration c.txt --metric wanda --target 0.5 -o pruned",
            "gpmetric prune DIR --calibration c.txt --metric campaign.sqlite --target 2:4 --permute -o pruned",
            "gpmetric prune DIR --calibration c.txt --recipe tuned/recipe.toml -o again",
        ),
    ),
    "slim": Command(
        "Removes channels, heads, layers, blocks or experts for good, by a search that needs forward passes only.",
        SlimRequest,
        lazy("gpmetric.structured.slim:run_slim"),
        lazy("gpmetric.terminal.tables:print_slim"),
        lazy("gpmetric.terminal.reports:SlimReport"),
        work=lazy("gpmetric.structured.open_units:slim_work"),
        timed=True,
        next=lazy("gpmetric.terminal.next_steps:after_slim"),
        examples=(
            "gpmetric slim DIR --calibration c.txt --sparsity 0.3 -o smaller",
            "gpmetric slim DIR --granularity expert --sparsity 0.25 --start reap --steps 0 -o fewer",
        ),
    ),
    "verify": Command(
        "Re-reads a checkpoint: files, finite values, sparsity, pattern, untouched tensors, perplexity.",
        VerifyRequest,
        lazy("gpmetric.pruning.verify:run_verify"),
        lazy("gpmetric.terminal.tables:print_verify"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        timed=True,
        failure=lazy("gpmetric.pruning.verify:first_problem"),
        next=lazy("gpmetric.terminal.next_steps:after_verify"),
        examples=(
            "gpmetric verify pruned",
            "gpmetric verify pruned --against DIR",
        ),
    ),
    "evaluate": Command(
        "Perplexity of a model on texts, and its figures on tasks of lm-eval.",
        EvaluateRequest,
        lazy("gpmetric.session.evaluate:run_evaluate"),
        lazy("gpmetric.terminal.tables:print_evaluation"),
        lazy("gpmetric.terminal.reports:EvaluateReport"),
        timed=True,
        live=True,
        work=lazy("gpmetric.session.evaluate:evaluate_work"),
        next=lazy("gpmetric.terminal.next_steps:after_evaluate"),
        examples=(
            "gpmetric evaluate DIR --text t.txt",
            "gpmetric evaluate pruned --text t.txt --windows 64",
            "gpmetric evaluate DIR --tasks arc_easy,hellaswag --limit 100",
        ),
    ),
    "calibrate": Command(
        "Collects what the score of an exported formula reads, layer by layer, in one file.",
        CalibrateRequest,
        lazy("gpmetric.session.calibrate:run_calibrate"),
        lazy("gpmetric.terminal.calibrate:print_calibrate"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        timed=True,
        work=lazy("gpmetric.session.calibrate:calibrate_work"),
        next=lazy("gpmetric.terminal.next_steps:after_calibrate"),
        examples=(
            "gpmetric calibrate DIR --calibration c.txt --operands X,F -o statistics.safetensors",
            "gpmetric calibrate --operands X -o statistics.safetensors",
        ),
    ),
    "pack": Command(
        "Packs a checkpoint into one smaller file, without the loss of a bit: zeros take one each.",
        PackRequest,
        lazy("gpmetric.packing.pack:run_pack"),
        lazy("gpmetric.terminal.packing:print_pack"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        next=lazy("gpmetric.terminal.next_steps:after_pack"),
        examples=("gpmetric pack pruned -o pruned.pack",),
    ),
    "unpack": Command(
        "Restores the folder that was packed, bit by bit.",
        UnpackRequest,
        lazy("gpmetric.packing.unpack:run_unpack"),
        lazy("gpmetric.terminal.packing:print_unpack"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        next=lazy("gpmetric.terminal.next_steps:after_unpack"),
        examples=("gpmetric unpack pruned.pack -o again",),
    ),
    "layers": Command(
        "Shows which layers of a model are pruned, what stays dense, and why.",
        LayersRequest,
        lazy("gpmetric.session.layers:run_layers"),
        lazy("gpmetric.terminal.layers:print_layers"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        next=lazy("gpmetric.terminal.next_steps:after_layers"),
        examples=(
            "gpmetric layers DIR",
            'gpmetric layers DIR --exclude "lm_head|layers.0"',
        ),
    ),
    "status": Command(
        "Shows where a campaign is, from another terminal: step, progress, speed, best formulas, failures, owner.",
        StatusRequest,
        lazy("gpmetric.evolution.status:run_status"),
        lazy("gpmetric.terminal.status:print_status"),
        lazy("gpmetric.terminal.status:StatusReport"),
        next=lazy("gpmetric.terminal.next_steps:after_status"),
        examples=(
            "gpmetric status campaign.sqlite",
            "gpmetric status campaign.sqlite --watch 10",
        ),
    ),
    "list": Command(
        "Lists the metrics, operands, primitives, targets, updates and other names that options and formulas know.",
        ListRequest,
        lazy("gpmetric.listing:run_list"),
        lazy("gpmetric.terminal.listing:print_list"),
        next=lazy("gpmetric.terminal.next_steps:after_list"),
        examples=("gpmetric list metrics", "gpmetric list operands", "gpmetric list updates --json updates.json"),
    ),
    "analyse": Command(
        "Shows which operands, operations, sub-expressions and masks go with good fitness in a campaign.",
        AnalyseRequest,
        lazy("gpmetric.analysis.analyse:run_analysis"),
        lazy("gpmetric.terminal.tables:print_analysis"),
        next=lazy("gpmetric.terminal.next_steps:after_analyse"),
        examples=("gpmetric analyse campaign.sqlite -o campaign.png",),
    ),
    "report": Command(
        "Writes one self-contained page of a campaign or of a result, to be opened in any browser, offline.",
        ReportRequest,
        lazy("gpmetric.reporting.report:run_report"),
        lazy("gpmetric.terminal.report:print_report"),
        next=lazy("gpmetric.terminal.next_steps:after_report"),
        examples=(
            "gpmetric report campaign.sqlite -o page.html",
            "gpmetric report bench.json",
        ),
    ),
    "ledger check": Command(
        "Tells everything that is wrong with a campaign's ledger, also while a driver has it.",
        LedgerRequest,
        lazy("gpmetric.evolution.ledger_check:run_check"),
        lazy("gpmetric.terminal.ledger:print_check"),
        failure=lazy("gpmetric.evolution.ledger_check:first_problem"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_check"),
        examples=("gpmetric ledger check campaign.sqlite",),
    ),
    "ledger repair": Command(
        "Saves what is sound of a damaged ledger in a new one, which discover --resume goes on with.",
        LedgerRepairRequest,
        lazy("gpmetric.evolution.ledger_repair:run_repair"),
        lazy("gpmetric.terminal.ledger:print_repair"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_repair"),
        examples=("gpmetric ledger repair campaign.sqlite -o sound.sqlite",),
    ),
    "ledger export": Command(
        "Writes a campaign's candidates with their figures as CSV, JSON Lines or Parquet.",
        LedgerExportRequest,
        lazy("gpmetric.evolution.ledger_export:run_ledger_export"),
        lazy("gpmetric.terminal.ledger:print_ledger_export"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_export"),
        examples=("gpmetric ledger export campaign.sqlite -o candidates.csv",),
    ),
    "ledger merge": Command(
        "Puts campaigns of one model, its texts and options together, to be exported, analysed or forked.",
        LedgerMergeRequest,
        lazy("gpmetric.evolution.ledger_merge:run_merge"),
        lazy("gpmetric.terminal.ledger:print_merge"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_merge"),
        examples=("gpmetric ledger merge one.sqlite two.sqlite -o both.sqlite",),
    ),
    "ledger free": Command(
        "Takes a ledger from a driver that has ended in another container or on another host.",
        LedgerRequest,
        lazy("gpmetric.evolution.ledger_check:run_free"),
        lazy("gpmetric.terminal.ledger:print_free"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_free"),
        examples=("gpmetric ledger free campaign.sqlite",),
    ),
}


def listener_of(request: type[Request]) -> Callable[..., Any] | None:
    """The listener of the command that is asked for by this request, None where it shows no progress."""
    return next((command.listener for command in COMMANDS.values() if command.request is request), None)
