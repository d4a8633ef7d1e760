"""Which allocator is best for the same tokens? `python benchmarks/bench_allocation.py MODEL --calibration T --test T`

For every model, metric and seed, the levels at which each weight goes are prepared once and shared; then each allocator
makes its allocations at all sparsities, from a log of its own, and all are brought to the weights that the uniform
mask removes. A seed draws the windows and is the search's own. Test texts are read to judge, never to search. Every
(model, metric, seed) goes to the JSON file as soon as it is over (--resume goes on there), the outcome to results.csv.

nsga2        one search of --tokens around --focus; the allocations at all sparsities are of that one front
evopress     --tokens for each sparsity, since it searches one; --evopress-sparsity says which
sensitivity, arithmetic, owl
             rules; they cost what they cost
uniform      the uniform mask, always measured: what the others are compared with

A token is one of a forward pass; one of a backward pass counts for three.

The tables of the NSGA-II thesis, perplexity against the weights kept, for who has the weights of GPT-2 (a directory or
a Hub name; about 25 bytes per weight of memory):

    python benchmarks/bench_allocation.py gpt2-medium gpt2-large gpt2-xl --metric "W*W*H" \\
        --calibration wikitext2-valid.txt --test wikitext2-test.txt --test ptb-test.txt --protocol one-shot \\
        --sparsity 0.1 0.2 0.3 0.4 0.5 0.6 0.7 --focus 0.5 --allocator nsga2 uniform --json gpt2.json

Texts may be files or `hf:` sources, as hf:Salesforce/wikitext/wikitext-2-raw-v1:test. Two more modes measure costs,
--memory that of calibration at once and block by block, --split that of the steps of one evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from allocation_costs import WAYS, measure_calibration, memory_rows, split_rows
from allocation_report import draw, report, report_sizes, rows, short, summarise
from allocation_runs import make_request, run_case
from cases import finished, one_thread, opened, save, told
from results import RESULTS, append

from gpmetric.allocation.request import ALLOCATORS
from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import check_output, check_picture
from gpmetric.loading import check_path
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.splits import open_text

PROTOCOLS = ("one-shot", "sequential")
OUTSIDE = ("models", "metric", "seeds", "jobs", "json", "resume", "csv", "plot", "memory", "memory_of", "split")
OUTSIDE += ("repeats", "blocks", "width")  # options that change no figure of a case


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed, 2 bad input."""
    options = read_options(arguments)
    one_thread()
    try:
        if options.memory_of is not None:
            print(json.dumps(measure_calibration(options.blocks, options.width, options.memory_of)))
        elif options.memory:
            add(memory_rows(options.blocks, options.width, options.repeats), options.csv)
        else:
            check(options)
            (run_split if options.split else compare)(options)
    except GpmetricError as error:
        print(f"bench_allocation: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def compare(options: argparse.Namespace) -> None:
    """The benchmark itself."""
    settings = {name: value for name, value in vars(options).items() if name not in OUTSIDE}
    document = opened(options.json, options.resume, settings, ("runs", "allocations"))
    done = {(run["model"], run["metric"], run["seed"]) for run in document["runs"]}
    # the seed is the outer loop: what else the machine does falls on all alike
    cases = [(m, metric, seed) for seed, m, metric in product(range(options.seeds), options.models, options.metric)]
    failures = []
    for case, made in finished(run_case, settings, [case for case in cases if case not in done], options.jobs):
        name = f"{short(case[0])}, {case[1]}, seed {case[2]}"
        if isinstance(made, GpmetricError):
            failures.append((name, made))
            continue
        document["runs"] += made["runs"]
        document["allocations"] += made["allocations"]
        save(document, options.json)
        print(f"{name}: {len(made['allocations'])} allocations, {made['seconds']:.0f} s", flush=True)
    if failures and not document["runs"]:
        raise told(failures, len(cases))
    summaries = summarise(document["runs"])
    report(summaries)
    report_sizes(document["runs"])
    add(rows(summaries, document["device"]), options.csv)
    if options.plot:
        draw(summaries, options.plot)
    if failures:
        raise told(failures, len(cases))


def run_split(options: argparse.Namespace) -> None:
    """--split: the seconds of each step of an evaluation, for every model with the first metric."""
    settings = vars(options)
    for model in options.models:
        add(split_rows(make_request(settings, model, options.metric[0], 0), options.repeats), options.csv)


def add(rows: list[dict[str, str]], path: Path | None) -> None:
    if path is not None:
        append(rows, path)


def check(options: argparse.Namespace) -> None:
    """Refuses what is wrong before anything is computed, and fills in what follows from other options.

    Raises:
        InputError: naming option, value and what is accepted.
    """
    if not options.models or options.calibration is None:
        raise InputError("a MODEL and --calibration are needed")
    if not options.test and not options.split:
        raise InputError("--test is needed: the texts that allocations are judged on")
    for option in ("json", "csv", "plot"):
        check_output(f"--{option}", getattr(options, option))
    if options.plot is not None:
        check_picture("--plot", options.plot)
    if options.resume and options.json is None:
        raise InputError("--resume goes on with a --json FILE, which is not named")
    for name in ("seeds", "jobs", "windows", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, but got {value}")
    for sparsity in (options.focus, *options.sparsity):
        if not 0 < sparsity < 1:
            raise InputError(f"--sparsity and --focus must be above 0 and below 1, but got {sparsity}")
    if options.evopress_sparsity is None:
        options.evopress_sparsity = [min(options.sparsity, key=lambda one: abs(one - options.focus))]
    for sparsity in options.evopress_sparsity:
        if sparsity not in options.sparsity:
            raise InputError(f"--evopress-sparsity {sparsity} must be one of --sparsity {options.sparsity}")
    for model in options.models:
        check_path(model)
        for metric in options.metric:
            make_request(vars(options), model, metric, 0).check()
    texts = {open_text(options.calibration).digest: "--calibration"}
    for source in options.test:
        digest = open_text(source).digest
        if digest in texts:
            raise InputError(f"--test {source!r} is the same text as {texts[digest]}")
        texts[digest] = f"--test {source!r}"


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="directories or Hub names")
    parser.add_argument(
        "--calibration", help="cut into three: for statistics, for the searches, and a part nobody reads"
    )
    parser.add_argument("--test", action="append", default=[], help="a text to judge on; may be given again")
    parser.add_argument("--metric", action="append", help="may be given again; wanda by default")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--focus", type=float, default=0.7, help="sparsity that nsga2 looks at most")
    parser.add_argument("--allocator", nargs="+", default=list(ALLOCATORS), choices=ALLOCATORS)
    parser.add_argument("--evopress-sparsity", type=float, nargs="+", help="the one nearest to --focus by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of a search")
    parser.add_argument("--update", nargs="+", default=["none"], choices=UPDATERS)
    parser.add_argument("--protocol", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--search-windows", type=int, default=32)
    parser.add_argument("--windows", type=int, help="test windows of each text; all by default")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--json", type=Path, help="every case, as soon as it is over")
    parser.add_argument("--resume", action="store_true", help="go on with the cases in --json")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows are appended here at the end; - for nowhere")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a page: .png or .pdf")
    parser.add_argument("--memory", action="store_true", help="measure the memory of calibration instead")
    parser.add_argument("--split", action="store_true", help="measure the steps of one evaluation instead")
    parser.add_argument("--repeats", type=int, default=3, help="of --memory and --split")
    parser.add_argument("--blocks", type=int, default=12, help="of --memory's random GPT-2")
    parser.add_argument("--width", type=int, default=768, help="of --memory's random GPT-2")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)  # one measurement, in its own process
    options = parser.parse_args(arguments)
    options.metric = list(dict.fromkeys(options.metric or ["wanda"]))
    options.csv = None if str(options.csv) == "-" else options.csv
    for name in ("models", "test", "update", "protocol", "sparsity", "allocator"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    if "uniform" not in options.allocator:
        options.allocator.append("uniform")
    return options


if __name__ == "__main__":
    sys.exit(main())
