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
from gpmetric.export.request import ExportRequest
from gpmetric.lazy import lazy
from gpmetric.options import Request
from gpmetric.packing.requests import PackRequest, UnpackRequest
from gpmetric.pruning.requests import (
    BenchRequest,
    CatalogueRequest,
    PruneRequest,
    ReproduceRequest,
    VerifyRequest,
)
from gpmetric.session.requests import EvaluateRequest, LayersRequest
from gpmetric.structured.request import SlimRequest
from gpmetric.tuning.request import TuneRequest

__all__ = ["COMMANDS", "GROUPS", "Command"]


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
    ),
    "export": Command(
        "Writes a formula, or the winner of a campaign, as a self-contained file.",
        ExportRequest,
        lazy("gpmetric.evolution.export:run_export"),
        lazy("gpmetric.terminal.tables:print_export"),
        next=lazy("gpmetric.terminal.next_steps:after_export"),
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
    ),
    "reproduce": Command(
        "Measures published figures again by their protocol, and puts ours beside theirs.",
        ReproduceRequest,
        lazy("gpmetric.pruning.reproduce:run_reproduce"),
        lazy("gpmetric.terminal.reproduce:print_reproduce"),
        lazy("gpmetric.terminal.reports:BenchReport"),
        timed=True,
        next=lazy("gpmetric.terminal.next_steps:after_reproduce"),
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
    ),
    "pack": Command(
        "Packs a checkpoint into one smaller file, without the loss of a bit: zeros take one each.",
        PackRequest,
        lazy("gpmetric.packing.pack:run_pack"),
        lazy("gpmetric.terminal.packing:print_pack"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        next=lazy("gpmetric.terminal.next_steps:after_pack"),
    ),
    "unpack": Command(
        "Restores the folder that was packed, bit by bit.",
        UnpackRequest,
        lazy("gpmetric.packing.unpack:run_unpack"),
        lazy("gpmetric.terminal.packing:print_unpack"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        next=lazy("gpmetric.terminal.next_steps:after_unpack"),
    ),
    "layers": Command(
        "Shows which layers of a model are pruned, what stays dense, and why.",
        LayersRequest,
        lazy("gpmetric.session.layers:run_layers"),
        lazy("gpmetric.terminal.layers:print_layers"),
        lazy("gpmetric.terminal.reports:PlainReport"),
        next=lazy("gpmetric.terminal.next_steps:after_layers"),
    ),
    "status": Command(
        "Shows where a campaign is, from another terminal: step, progress, speed, best formulas, failures, owner.",
        StatusRequest,
        lazy("gpmetric.evolution.status:run_status"),
        lazy("gpmetric.terminal.status:print_status"),
        lazy("gpmetric.terminal.status:StatusReport"),
        next=lazy("gpmetric.terminal.next_steps:after_status"),
    ),
    "analyse": Command(
        "Shows which operands, operations, sub-expressions and masks go with good fitness in a campaign.",
        AnalyseRequest,
        lazy("gpmetric.analysis.analyse:run_analysis"),
        lazy("gpmetric.terminal.tables:print_analysis"),
        next=lazy("gpmetric.terminal.next_steps:after_analyse"),
    ),
    "ledger check": Command(
        "Tells everything that is wrong with a campaign's ledger, also while a driver has it.",
        LedgerRequest,
        lazy("gpmetric.evolution.ledger_check:run_check"),
        lazy("gpmetric.terminal.ledger:print_check"),
        failure=lazy("gpmetric.evolution.ledger_check:first_problem"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_check"),
    ),
    "ledger repair": Command(
        "Saves what is sound of a damaged ledger in a new one, which discover --resume goes on with.",
        LedgerRepairRequest,
        lazy("gpmetric.evolution.ledger_repair:run_repair"),
        lazy("gpmetric.terminal.ledger:print_repair"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_repair"),
    ),
    "ledger export": Command(
        "Writes a campaign's candidates with their figures as CSV, JSON Lines or Parquet.",
        LedgerExportRequest,
        lazy("gpmetric.evolution.ledger_export:run_ledger_export"),
        lazy("gpmetric.terminal.ledger:print_ledger_export"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_export"),
    ),
    "ledger merge": Command(
        "Puts campaigns of one model, its texts and options together, to be exported, analysed or forked.",
        LedgerMergeRequest,
        lazy("gpmetric.evolution.ledger_merge:run_merge"),
        lazy("gpmetric.terminal.ledger:print_merge"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_merge"),
    ),
    "ledger free": Command(
        "Takes a ledger from a driver that has ended in another container or on another host.",
        LedgerRequest,
        lazy("gpmetric.evolution.ledger_check:run_free"),
        lazy("gpmetric.terminal.ledger:print_free"),
        next=lazy("gpmetric.terminal.next_steps:after_ledger_free"),
    ),
}
