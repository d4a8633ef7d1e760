"""Everything that gpmetric reads and others can have written, one row each, read as the product reads it.

A reader makes valid inputs by the product itself, in a folder that it may write in, and gives what reads one of them.
`gpmetric.errors` are what it may end with.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import typer
from bit_flips import KINDS, Detected
from file_readers import (
    GOLDEN,
    Opened,
    existing,
    manifest,
    of_file,
    of_model,
    of_text,
    of_texts,
    packed,
    taken_over,
    unfinished_one,
    verified,
)
from safetensors.torch import save_file

from gpmetric import cli, digests
from gpmetric.allocation.evaluation_log import EvaluationLog
from gpmetric.allocation.levels import LevelTable
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.cache import Sample, cached_statistics, load_statistics
from gpmetric.commands import COMMANDS
from gpmetric.config import load_config
from gpmetric.evaluation.tasks import check_tasks
from gpmetric.evolution.ledger import Ledger, result_of
from gpmetric.evolution.sqlite_schema import TABLES
from gpmetric.expression.canonical import canonical
from gpmetric.expression.parse import parse
from gpmetric.formula_files import is_ledger, read_formula
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.options import check_request, described, make_request
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.allocation import Allocation, read_allocation
from gpmetric.pruning.bench_log import BenchLog, BenchRow
from gpmetric.pruning.recipe import Recipe, read_recipe, recipe_text
from gpmetric.reporting.blocks import Page
from gpmetric.reporting.page import render
from gpmetric.reporting.source import page_of
from gpmetric.results import load_result
from gpmetric.structured.search_log import SearchLog, State
from gpmetric.targets import parse_target
from gpmetric.tensor_file import TensorFile
from gpmetric.tuning.trial_log import TrialLog

__all__ = ["READERS", "Reader"]

_FORMULAS = (
    *BASELINES,
    "abs(W)*X",
    "layer:W*W*F",
    "catalogue:x",
    r"\left|W\right| \cdot \sqrt{X}",
    "|W|*||X||_2",
    "W² + √X",
    "-W**-0.5/(X+1e-3)",
    "torch.abs(W)*X",
    "mms(sqrt(H))*rowsum(abs(W))",
    "log(exp(tanh(W)))-max(W,X)",
)
_TARGETS = ("0.5", "2:4", "row:0.5", "layer:5e-1", "block:0.999", " 16:32 ")
_COMMANDS = (
    "prune m -o out --metric wanda --target 2:4 --memory 12GB --samples 8",
    "bench --metric 'abs(W)*X' --target 0.5 --text a.txt",
    "discover --operands W,X --forbid 'exp(log)' --minutes 5 --population 10 --ledger a.sqlite",
    "tune --sparsity 0.5 -o out",
    "slim -o out --sparsity 0.3 --granularity channel,head --start wanda --draws 4",
    "export wanda --format python -o w.py",
    "allocate --budget 0.5 --metric wanda -o a.json --csv a.csv --plot a.png",
    "verify out --against m",
    "analyse a.sqlite",
    "evaluate m --text a.txt --preset quick --sequence-length 64",
    "unpack a -o b",
    "pack . -o c",
    "layers --include 'mlp.*'",
    "catalogue --target 0.5",
    "calibrate m --operands X,G -o x.safetensors",
    "reproduce --list",
    "plan prune -o out --json x.json --config in.toml",
)
_OF_FORMULAS = (*r"W X H abs( ) ** * / - , 1e30 9**9 layer: √ ² | \frac{ }".split(), "(" * 70)  # noqa: SIM905


@dataclass(frozen=True)
class Reader:
    """A reader: what opens it in an empty folder, the shape of its inputs, and words that stand in them."""

    open: Callable[[Path], Opened]
    shape: str
    words: tuple[str, ...] = ()
    every: float = (
        1.0  # of so many inputs of the others, one is its share: some take microseconds, some a tenth of a second
    )


def _formula(folder: Path) -> Opened:
    def read(text: str) -> None:
        metric = resolve_metric(text)
        again = parse(str(metric.expression))
        assert str(again) == str(metric.expression), "what is printed is read as another formula"

    return of_text(_FORMULAS, read)


def _canonical(folder: Path) -> Opened:
    return of_text(_FORMULAS, lambda text: canonical(resolve_metric(text).expression))


def _target(folder: Path) -> Opened:
    return of_text(_TARGETS, lambda text: parse_target(text).removes((4, 64)))


def _ledger(folder: Path) -> Opened:
    path, golden = KINDS["ledger"](folder).path, sorted(GOLDEN.glob("*.sqlite"))

    def read() -> None:
        for side in ("-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)
        is_ledger(str(path))
        result_of(path)
        with Ledger.read(path) as ledger:
            for row in [*ledger.candidates(), *ledger.evaluations(), *ledger.measurements(), *ledger.generations()]:
                vars(row)
            assert set(ledger.comparable_tables()) == set(TABLES)
            ledger.settings, ledger.counts(), ledger.held_out("test", ""), ledger.find_canonical("W")

    return of_file(path, read, [path.read_bytes(), *(one.read_bytes() for one in golden)])


def _resumed(folder: Path) -> Opened:
    store = KINDS["ledger"](folder)

    def read() -> None:
        for side in ("-wal", "-shm"):
            store.path.with_name(store.path.name + side).unlink(missing_ok=True)
        store.read()

    return of_file(store.path, read)


def _of_bits(kind: str) -> Callable[[Path], Opened]:
    def opened(folder: Path) -> Opened:
        digests._SETTLED = -1.0  # as for files that have not changed for a while
        store = KINDS[kind](folder)
        found = of_file(store.path, store.read)
        return Opened(found.seeds, found.read, (Detected,))

    return opened


def _statistics(folder: Path) -> Opened:
    sample = Sample({"a.up": (6, 4), "a.down": (4, 6)}, frozenset("XG"), 8, 16)
    blocks = [{name: LayerStatistics(X=torch.rand(i), G=torch.rand(o, i)) for name, (o, i) in sample.shapes.items()}]

    def read() -> None:
        found = load_statistics(cached_statistics(folder, "key", sample, lambda: blocks))
        assert set(found.layers) == set(sample.shapes)

    path = cached_statistics(folder, "key", sample, lambda: blocks)
    return of_file(path, read)


def _tensor_file(folder: Path) -> Opened:
    path = folder / "a.safetensors"
    save_file(
        {"a": torch.rand(3, 4), "b": torch.rand(2).bfloat16(), "m": torch.ones(2, 2, dtype=torch.bool)},
        path,
        {"format": "pt"},
    )

    def read() -> None:
        for _ in TensorFile(path).values():
            pass

    return of_file(path, read)


def _formula_file(folder: Path) -> Opened:
    """What stands for a metric: exports, and results of campaigns."""
    path = folder / "a.json"
    seeds = [
        b'{"formula": "abs(W)*X", "group": "layer"}',
        b'{"winner": {"formula": "W"}, "update": "admm", "fit": "own"}',
    ]
    return of_file(path, lambda: resolve_metric(read_formula(str(path)).metric), seeds)


def _config(folder: Path) -> Opened:
    command = cast(Any, typer.main.get_command(cli.app)).commands["discover"]
    path = folder / "a.toml"

    def read() -> None:
        context = command.make_context("discover", [])
        load_config(context, path)
        command.parse_args(context, [])
        shown = {name: value for name, value in context.params.items() if name not in ("json", "config", "force")}
        request = COMMANDS["discover"].request
        make_request(request, cli._given(context, cli._placed(described(request)), shown)).check()

    seed = 'target = ["0.5", "2:4"]\npopulation = 40\nminutes = 1.5\nresume = true\noperands = "W,X"\nmemory = "12GB"\n'
    found = of_file(path, read, [seed.encode()])
    return Opened(found.seeds, found.read, (cli._ClickException,))


def _command_line(folder: Path) -> Opened:
    os.chdir(folder)
    group = cast(Any, typer.main.get_command(cli.app))
    (folder / "m").mkdir()
    (folder / "m" / "config.json").write_text("{}")
    (folder / "in.toml").write_text('target = "0.5"\n')
    (folder / "a").write_text("x")

    def read(text: str) -> None:
        try:
            name, *words = shlex.split(text)
        except ValueError:  # no shell would start it
            return
        command = group.commands.get(name)
        if name == "plan" and words:
            command = group.commands["plan"].commands.get(words.pop(0))
        if command is None or command.name not in COMMANDS or "--help" in words:
            return
        with command.make_context(name, words) as context:
            options = dict(context.params)
            json, config = options.pop("json", None), options.pop("config", None)
            request = COMMANDS[command.name].request
            given = cli._given(context, cli._placed(described(request)), options)
            force = given.pop("force", False) if "force" not in vars(request).get("__dataclass_fields__", {}) else False
            check_request(make_request(request, given).completed(), json, config=config, force=force)

    found = of_text(_COMMANDS, read)
    return Opened(found.seeds, found.read, (cli._ClickException,))


def _recipe(folder: Path) -> Opened:
    path = folder / "recipe.toml"
    targets = {"a.b": parse_target("0.25").resolved("row"), "a.c": parse_target("0.75").resolved("row")}
    seeds = [Recipe("wanda", "0.5"), Recipe("layer:W*W*F", "2:4", "admm", "dense", sequence_length=64, seed=3)]
    seeds += [Recipe("wanda", "0.5", allocation=Allocation("row", targets))]
    return of_file(path, lambda: read_recipe(path).document(), [recipe_text(one).encode() for one in seeds])


def _report(folder: Path) -> Opened:
    path, results = folder / "a.json", sorted((GOLDEN / "report").glob("*.json"))
    render(Page("", "", (), ()))  # jinja compiles our templates once, before anything is read
    return of_file(path, lambda: render(page_of(path)), [one.read_bytes() for one in results])


def _report_of_journal(folder: Path) -> Opened:
    path, journals = folder / "a.jsonl", [*sorted((GOLDEN / "report").glob("*.jsonl")), GOLDEN / "slim.jsonl"]
    render(Page("", "", (), ()))
    return of_file(path, lambda: render(page_of(path)), [one.read_bytes() for one in journals])


def _report_of_ledger(folder: Path) -> Opened:
    path, golden = KINDS["ledger"](folder).path, sorted(GOLDEN.glob("*.sqlite"))
    render(Page("", "", (), ()))

    def read() -> None:
        for side in ("-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)
        render(page_of(path))

    return of_file(path, read, [path.read_bytes(), *(one.read_bytes() for one in golden)])


def _result(folder: Path) -> Opened:
    path, row = folder / "r.json", {"metric": "wanda", "target": "0.5", "update": "none", "formula": "abs(W)*X"}
    row |= {"ppl": {"a": 20.0}, "sparsity": 0.5, "seconds": 1.0, "error": None}
    bench = {"model": "m", "protocol": "sequential", "dense": {"a": 10.0}, "results": [row]}
    tested = {"formula": "W*X", "nodes": 3, "excess": {"0.5": 0.2}, "mean_excess": 0.2, "ppl": {"0.5": 12.0}}
    campaign = {"targets": ["0.5"], "best_gradient_free": None, "regrouped": None, "winner": tested, "front": [tested]}
    several = {"models": [bench, {"model": "n", "error": "no"}], "transfer": []}
    slimmed = {"model": "m", "begun": "wanda", "parameters_before": 9, "widths": [{"heads": 2, "channels": 4}]}

    def read() -> None:
        found = load_result(path)
        repr(found), found._repr_html_(), found.to_pandas()

    documents = [bench, several, campaign | {"baselines": {"wanda": tested}}, slimmed]
    return of_file(path, read, [json.dumps({"gpmetric": "1"} | one).encode() for one in documents])


def _allocation(folder: Path) -> Opened:
    path, seeds = folder / "a.json", sorted(GOLDEN.glob("allocation-*.json"))
    return of_file(path, lambda: read_allocation(path).document(), [one.read_bytes() for one in seeds])


class _Unmeasured:
    """Stands for an objective: what a journal holds is read, and nothing is measured."""

    tokens = (64, 64)

    def __len__(self) -> int:
        return 2


def _archive(folder: Path) -> Opened:
    targets = tuple(parse_target(f"{level / 8}").resolved("row") for level in range(8))
    table = LevelTable(("a", "b"), ((4, 8), (4, 8)), ((0,), (1,)), (targets, targets), "row")
    path = folder / "a.jsonl"

    def log() -> EvaluationLog:
        return EvaluationLog(table, cast(Any, _Unmeasured()), path, {"seed": 1}, focus=0.5, resume=True)

    with log() as made:
        made.write({"minutes": 2.0, "search": 1.5})
        for level in range(4):
            made.write({"levels": [level, 3], "first": 0, "values": [1 / (3 + level), None]})
            made.write({"levels": [level, 3], "batches": 2, "slopes": [[0.5] * 8, [0.25] * 8]})
            made.write({"seconds": level / 3})

    def read() -> None:
        with log() as found:
            assert found.seconds >= 0

    return of_file(path, read)


def _journal(name: str, made: Callable[[Path], Any], fill: Callable[[Any], None]) -> Callable[[Path], Opened]:
    def opened(folder: Path) -> Opened:
        path = folder / name
        with made(path) as log:
            fill(log)

        def read() -> None:
            with made(path):
                pass

        return of_file(path, read)

    return opened


def _fill_slim(log: SearchLog) -> None:
    for step in range(3):
        log.add({"step": step, "loss": 0.25}, State(step, torch.full((4,), 0.5, dtype=torch.float64), 0.25, 1.5, 7))


def _fill_trials(log: TrialLog[Any]) -> None:
    log.keep("wanda", {"sparsity": {"a": 0.25}})
    told = {"recipe": "r", "share": 0.25, "losses": [0.5, None], "document": {"metric": "W"}}
    log.write(told | {"seconds": 0.5, "error": None, "split": "search"})


def _fill_bench(log: BenchLog) -> None:
    log.write({"of": "a", "row": vars(BenchRow("wanda", "0.5", "none", "abs(W)*X", {"t": 2.0}, 0.5, 0.5))})


def _tasks(folder: Path) -> Opened:
    path = folder / "a.yaml"
    return of_file(path, lambda: check_tasks(["x"], folder), [b"task: x\ndataset_path: json\n"])


def _none(*_: Any) -> Any:
    return cast(Any, None)


_LINES = '{"text": "one two\\n"}\n{"text": "three"}\n'
READERS: dict[str, Reader] = {
    "formula": Reader(_formula, "text", _OF_FORMULAS, 0.2),
    "canonical form": Reader(_canonical, "text", _OF_FORMULAS, 10),
    "file of a formula": Reader(_formula_file, "json", ("formula", "winner", "group", "update", "{", "null"), 5),
    "target": Reader(_target, "text", ("0.5", ":", "2:4", "row:", "e", "-", "+", "9999:9999", "٣"), 0.2),
    "command line": Reader(
        _command_line, "text", (" --", "-1", " nan", " 1e999", " --memory 9", "'", " ~/x", "../", "\\0", " --seed "), 5
    ),
    "config": Reader(_config, "toml", ("target", "=", "[[", "]]", '"""', "1979-05-27", "inf", "seed")),
    "recipe": Reader(_recipe, "toml", ("allocation", "pattern", "n:m", "=", '"', "metric", "bos"), 5),
    "allocation": Reader(_allocation, "json", ("pattern", "2:4", "NaN", "dense", '"', "{", "layer", "block")),
    "manifest": Reader(manifest, "json", ("files", "../", "slim", "null", "widths"), 5),
    "result": Reader(_result, "json", ("gpmetric", "results", "winner", "models", "null", "NaN", "1e999", "<b>")),
    "ledger": Reader(_ledger, "sqlite", ("SQLite format 3", "CREATE TABLE", "json_valid", "[]", "{}"), 10),
    "ledger resumed": Reader(_resumed, "sqlite", ("SQLite format 3", "CHECK", "rng", "[]"), 30),
    "report of a result": Reader(_report, "json", ("excess", "NaN", "null", "1e999", "</script>", "formula", "{"), 20),
    "report of a journal": Reader(_report_of_journal, "lines", ("row", "losses", "step", "null", "1e999"), 20),
    "report of a ledger": Reader(_report_of_ledger, "sqlite", ("figures", "loss", "winner", "[]", "{}", "<b>"), 50),
    "archive of allocate": Reader(_archive, "lines", ("levels", "slopes", "values", "NaN", "seconds")),
    "ledger of slim": Reader(
        _journal("s.jsonl", lambda path: SearchLog(path, {"seed": 1}, resume=True), _fill_slim),
        "lines",
        ("state", "=", "A"),
    ),
    "ledger of tune": Reader(
        _journal(
            "t.jsonl", lambda path: TrialLog(_none(), _none(), _none(), path, {"seed": 1}, resume=True), _fill_trials
        ),
        "lines",
        ("searched", "losses", "null"),
    ),
    "ledger of bench": Reader(
        _journal("b.jsonl", lambda path: BenchLog(path, resume=True), _fill_bench), "lines", ("row", "of")
    ),
    "statistics cache": Reader(_statistics, "tensors", ("F32", "digest", "data_offsets", "a.up/X"), 10),
    "tensor file": Reader(_tensor_file, "tensors", ("F64", "BOOL", "__metadata__", "data_offsets", "shape")),
    "remembered digest": Reader(_of_bits("remembered digest"), "json", ("digests", "checksum"), 4),
    "checkpoint on its way": Reader(unfinished_one, "tensors", ("record", "block", "gpmetric"), 20),
    "archive of pack": Reader(packed, "zip", ("PK\1\2", "PK\3\4", "../", "spans"), 10),
    "existing output": Reader(existing, "json", ("gpmetric", "W", "%", "{", "method,sparsity,"), 20),
    "plain text": Reader(of_texts("a", "One two.\n\nThree.\n", _LINES), "text", ("\ufeff", "\r\n", '{"text": ', "[{")),
    "text of JSON Lines": Reader(of_texts("a.jsonl", _LINES), "lines", ("text", "\\ud800", "NaN", "[")),
    "text of a JSON array": Reader(
        of_texts("a.json", '[{"text": "a"}, {"text": "b"}]'), "json", ("text", "\\ud800", "[")
    ),
    "text of CSV": Reader(
        of_texts("a.csv", 'text,b\n"a ""b"" c",2\nd,3\n', "b;text\n1;2\n"),
        "text",
        ("text", '"', ",", "\r", "\n", ";", "\0"),
    ),
    "text of gzip": Reader(of_texts("a.jsonl.gz", _LINES), "gzip", ("text", "\x1f\x8b")),
    "text of Parquet": Reader(of_texts("a.parquet", {"text": ["a", "b"], "n": [1, 2]}), "table", ("PAR1", "text"), 2),
    "task folder": Reader(_tasks, "text", ("!function", "class:", "!!python")),
    "model card": Reader(taken_over, "text", ("license: ", "---\n", "auto_map", "<script>", "../", "`", "|"), 2),
    "model's config": Reader(of_model("config.json"), "json", ("llama", "hidden_size", "auto_map", "slim_llama"), 100),
    "slim model's config": Reader(
        of_model("config.json", GOLDEN / "slimmed"), "json", ("widths", "heads", "slim_gpt2"), 100
    ),
    "model's weights": Reader(of_model("model.safetensors"), "tensors", ("F32", "I4", "shape", "BF16"), 100),
    "model's index": Reader(
        of_model("model.safetensors.index.json"), "json", ("weight_map", "../", "model-00001"), 100
    ),
    "model's tokenizer": Reader(of_model("tokenizer.json"), "json", ("vocab", "merges", "Regex", "BPE"), 200),
    "tokenizer's config": Reader(
        of_model("tokenizer_config.json"), "json", ("tokenizer_class", "auto_map", "chat_template"), 100
    ),
    "adapter's config": Reader(of_model("adapter_config.json"), "json", ("base_model_name_or_path",)),
    "verified manifest": Reader(verified(MANIFEST), "json", ("layers", "0.5", "2:4", "pieces"), 100),
    "verified config": Reader(verified("config.json"), "json", ("gpmetric", "vocab_size"), 100),
}
