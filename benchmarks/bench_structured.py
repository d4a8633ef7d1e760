"""Which units should go, and what is it worth? `python benchmarks/bench_structured.py MODEL --calibration T --test T`

For every model, sparsity and seed, baselines and policy gradients choose at the same number of parameters, from the
same statistics, with the same repair, and are judged on the test texts, which nobody has read before. A seed draws the
windows and is the search's own. Every case goes to the JSON file as soon as it is over (--resume goes on there), the
outcome to results.csv.

magnitude_sp, wanda_sp          the same share of every layer
taylor2, flap, random, block_influence   all layers against each other
start                           what the policy gradient begins with: its own start, chosen from at once
exchange                        the search as `slim` does it by default, which takes more forward passes for a step
rloo                            the policy gradient by antithetic pairs
rloo on the loss, paper         either estimator on the log-loss, at the same number of forward passes (rloo beside: one
                                more for each window, once, while the dense model's predictions fit into 1 GiB)
uniform                         rloo with as many heads and channels in every layer
start:METRIC                    rloo that begins from another metric, named by --start

The tables of Bypass Back-propagation (perplexity of WikiText-2 at 128 tokens, 30 to 50 % of the blocks gone), for who
has the weights, c4.txt being some 100 MB of C4 (all of it would be read before any of it is cut):

    python benchmarks/bench_structured.py meta-llama/Llama-2-7b-hf lmsys/vicuna-7b-v1.5 mistralai/Mistral-7B-v0.1 \\
        --calibration c4.txt --test hf:Salesforce/wikitext/wikitext-2-raw-v1:test --samples 128 \\
        --sequence-length 128 --search-windows 120000 --batch 8 --steps 15000 --sparsity 0.3 0.4 0.5 --repair none \\
        --json llama2.json

--speed measures something else: parameters, file size, peak memory and tokens per second in prefill, before and after,
of a random Llama of --width and --blocks written by `slim`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cases import finished, one_thread, opened, save, told
from matplotlib import pyplot
from results import RESULTS, append, row
from structured_runs import METHODS, make_request, run_case
from structured_speed import measure, speed_rows

from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import check_output, check_picture
from gpmetric.loading import check_path
from gpmetric.session.splits import open_text
from gpmetric.structured.request import REPAIRS

OUTSIDE = (
    "models",
    "sparsity",
    "seeds",
    "jobs",
    "json",
    "resume",
    "csv",
    "plot",
    "speed",
    "repeats",
    "blocks",
    "width",
)
OUTSIDE += ("measured",)  # options that change no figure of a case


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed, 2 bad input."""
    options = read_options(arguments)
    one_thread()
    try:
        if options.measured is not None:
            print(json.dumps(measure(options.measured, options.repeats)))
        elif options.speed is not None:
            if options.width < 256 or options.width % 256:
                raise InputError(f"--width must be a multiple of 256, but got {options.width}")
            add(speed_rows(options.blocks, options.width, options.speed, options.repeats), options.csv)
        else:
            check(options)
            compare(options)
    except GpmetricError as error:
        print(f"bench_structured: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def compare(options: argparse.Namespace) -> None:
    """The benchmark itself."""
    settings = {name: value for name, value in vars(options).items() if name not in OUTSIDE}
    document = opened(options.json, options.resume, settings, ("runs",))
    done = {(run["model"], run["sparsity"], run["seed"]) for run in document["runs"]}
    cases = [
        (m, sparsity, seed) for seed, m, sparsity in product(range(options.seeds), options.models, options.sparsity)
    ]
    failures = []
    for case, made in finished(run_case, settings, [case for case in cases if case not in done], options.jobs):
        name = f"{short(case[0])}, {case[1]:g}, seed {case[2]}"
        if isinstance(made, GpmetricError):
            failures.append((name, made))
            continue
        document["runs"] += made["runs"]
        save(document, options.json)
        print(f"{name}: {made['seconds']:.0f} s", flush=True)
    if failures and not document["runs"]:
        raise told(failures, len(cases))
    table = summarise(document["runs"])
    report(table)
    add(rows(table, document["device"]), options.csv)
    if options.plot:
        draw(table, options.plot)
    if failures:
        raise told(failures, len(cases))


Table = dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]]  # (model, text, sparsity) -> method -> a run per seed


def summarise(runs: list[dict[str, Any]]) -> Table:
    table: Table = {}
    for run in sorted(runs, key=lambda run: (run["model"], run["text"], run["sparsity"], run["seed"])):
        methods = table.setdefault((run["model"], run["text"], run["sparsity"]), {})
        methods.setdefault(run["method"], []).append(run)
    return table


def report(table: Table) -> None:
    for (model, text, sparsity), methods in table.items():
        one = next(iter(methods.values()))[0]
        print(f"\n{short(model)}, {sparsity:g} of the blocks gone, {short(text)}: dense perplexity {one['dense']:.2f}")
        print(
            f"  {'':28s}{'perplexity':>11s}{'excess':>9s}   {'seeds':17s}{'removed':>8s}{'M tokens':>9s}{'seconds':>9s}"
        )
        for method, found in sorted(methods.items(), key=lambda item: mean(item[1], "excess")):
            low, high = (bound(run["excess"] for run in found) for bound in (min, max))
            print(
                f"  {method:28.28s}{np.exp(mean(found, 'loss')):11.2f}{mean(found, 'excess'):9.4f}   "
                f"{f'[{low:.3f}, {high:.3f}]':17s}{mean(found, 'removed'):8.4f}{mean(found, 'tokens') / 1e6:9.2f}"
                f"{mean(found, 'seconds'):9.1f}"
            )


def rows(table: Table, device: str) -> list[dict[str, str]]:
    """Rows of results.csv: values are seeds, the baseline is wanda_sp's mean."""
    found = []
    for (model, text, sparsity), methods in table.items():
        against = mean(methods["wanda_sp"], "excess") if "wanda_sp" in methods else None
        for method, runs in methods.items():
            values = np.array([run["excess"] for run in runs])
            case = f"{short(model)} {sparsity:g} {runs[0]['repair']} {short(text)}: {method}"
            found.append(row("structured", case, values, against, "nats", device))
    return found


def draw(table: Table, path: Path) -> None:
    """Excess along the sparsity with the range of the seeds: a panel for each model and text."""
    matplotlib.use("agg")
    panels = list(dict.fromkeys(case[:2] for case in table))
    methods = list(dict.fromkeys(method for found in table.values() for method in found))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.5 + 4 * len(panels), 4), layout="constrained", squeeze=False
    )  # fmt: skip
    for axis, panel in zip(axes.flat, panels, strict=True):
        lowest = 1.0
        for number, method in enumerate(methods):
            shown = [(case[2], found[method]) for case, found in table.items() if case[:2] == panel and method in found]
            places = [sparsity for sparsity, _ in shown]
            style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^Dv"[number % 5], "ms": 4}
            figures = [[run["excess"] for run in runs] for _, runs in shown]
            means, lows, highs = (np.array([of(values) for values in figures]) for of in (np.mean, np.min, np.max))
            axis.errorbar(places, means, (means - lows, highs - means), label=method, lw=1, **style)
            lowest = min([lowest, *lows])
        axis.set_title(f"{short(panel[0])}, {short(panel[1])}", fontsize=9)
        axis.set_yscale("log" if lowest > 0 else "linear")
        axis.grid(axis="y", lw=0.4)
    figure.supxlabel("share of the parameters inside the blocks that is gone", fontsize=10)
    figure.supylabel("excess log-loss, nats", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def mean(runs: list[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([run[name] for run in runs]))


def short(name: str) -> str:
    """The last part of a path or name."""
    return Path(name).name or name


def add(rows: list[dict[str, str]], path: Path | None) -> None:
    if path is not None:
        append(rows, path)


def check(options: argparse.Namespace) -> None:
    """Refuses what is wrong before anything is computed.

    Raises:
        InputError: naming option, value and what is accepted.
    """
    if not options.models or options.calibration is None or not options.test:
        raise InputError("a MODEL, --calibration and --test are needed")
    for option in ("json", "csv", "plot"):
        check_output(f"--{option}", getattr(options, option))
    if options.plot is not None:
        check_picture("--plot", options.plot)
    if options.resume and options.json is None:
        raise InputError("--resume goes on with a --json FILE, which is not named")
    for name in ("seeds", "jobs", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, but got {getattr(options, name)}")
    for model, sparsity in product(options.models, options.sparsity):
        check_path(model)
        for start in ("wanda_sp", *options.start):
            replace(make_request(vars(options), model, sparsity, 0), start=start).check()
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
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--start", action="append", default=[], help="begin from this metric too; may be given again")
    parser.add_argument("--repair", default="bias", choices=REPAIRS)
    parser.add_argument("--no-bias", action="store_true", help="give no bias to outputs that have none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="of a search, two forward passes each")
    parser.add_argument("--batch", type=int, default=2, help="windows of a step")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--search-windows", type=int, default=256)
    parser.add_argument("--windows", type=int, help="test windows of each text; all by default")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--json", type=Path, help="every case, as soon as it is over")
    parser.add_argument("--resume", action="store_true", help="go on with the cases in --json")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows are appended here at the end; - for nowhere")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a page: .png or .pdf")
    parser.add_argument(
        "--speed", type=float, nargs="?", const=0.3, metavar="SPARSITY", help="measure size and speed instead, at 0.3"
    )
    parser.add_argument("--repeats", type=int, default=7, help="of --speed")
    parser.add_argument("--blocks", type=int, default=4, help="of --speed's random Llama")
    parser.add_argument("--width", type=int, default=1024, help="of --speed's random Llama")
    parser.add_argument("--measured", metavar="DIR", help=argparse.SUPPRESS)  # one model, in its own process
    options = parser.parse_args(arguments)
    options.csv = None if str(options.csv) == "-" else options.csv
    for name in ("models", "test", "sparsity", "method", "start"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    return options


if __name__ == "__main__":
    sys.exit(main())
