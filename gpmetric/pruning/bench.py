"""Pruning metrics under one protocol, on one model or several: `gpmetric bench --metric wanda --metric "abs(W)*G"`."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

from gpmetric.errors import GpmetricError, OutOfMemoryError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.functions import as_function
from gpmetric.loading import check_path
from gpmetric.metrics import Metric
from gpmetric.pruning.bench_log import BenchLog, BenchRow
from gpmetric.pruning.bench_workers import bench_executor, shared_rows
from gpmetric.pruning.listeners import BenchListener
from gpmetric.pruning.protocol import Measured, Protocol, Rule, check_targets
from gpmetric.pruning.requests import BenchRequest
from gpmetric.pruning.updaters import needed_statistics
from gpmetric.pruning.win_loss import win_loss
from gpmetric.results import BenchResult
from gpmetric.session.caveats import few_tokens
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.memory import retried
from gpmetric.session.session import Session, open_session
from gpmetric.session.splits import Sources, open_sources
from gpmetric.session.work import Work
from gpmetric.session.workers import meet, shared, torch_threads
from gpmetric.targets import Target, parse_target

__all__ = [
    "BenchRow",
    "bench",
    "bench_failures",
    "bench_rows",
    "bench_work",
    "first_failure",
    "measured_row",
    "run_bench",
]


_UNKNOWN = 4.0  # times the others, what the first row of another updater is thought to take; see evolution.tasks


def bench_rows(
    protocol: Protocol,
    metrics: Sequence[Metric],
    targets: Sequence[Target],
    update: str,
    deadline: Deadline | None = None,
    first: bool = True,
    fit: str = "own",
    permute: bool = False,
    known: Mapping[tuple[str, str], BenchRow] = {},
) -> Iterator[BenchRow]:
    """One row for each distinct (metric, target); one that fails costs the others nothing.

    What needs fewer statistics of the dense model comes first, so that what can be measured is, before more is
    collected; of those that need the same, target by target. A row that would not end in time, if it takes as long as
    others of its updater, is not begun: it has an error. The `first` of all is measured whatever the time. A row that
    is `known`, by target and metric, is not measured.
    """
    check_targets(protocol.session.model, targets)
    model, limit = protocol.session.model, deadline or Deadline.starting(None)
    together = protocol.session.plan.together
    seconds: dict[str, float] = {}  # of the longest row by updater
    for alike in _by_needs(protocol, metrics, update):
        pairs = _rules(alike, targets, update, fit, permute)
        yield from (known[pair] for pair in pairs if pair in known)
        rules = [rule for pair, rule in pairs.items() if pair not in known]
        if not rules:
            continue
        failure = GpmetricError(limit.refusal) if not first and limit.left <= 0 else None
        try:
            if failure is None:
                retried(model, partial(protocol.prepare, alike, update), protocol.session.forget_calls)
        except GpmetricError as error:
            failure = error
        for start in range(0, len(rules), together):
            group = rules[start : start + together]
            kinds = [rule.metric.update or update for rule in group]
            unknown = _UNKNOWN * max(seconds.values(), default=0.0)
            if not first and limit.left < sum(seconds.get(kind, unknown) for kind in kinds):
                yield from _rows(protocol, group, failure or GpmetricError(limit.refusal))
                continue
            first, started = False, limit.now()
            yield from _rows(protocol, group, failure)
            spent = (limit.now() - started) / len(group)
            seconds |= {kind: max(seconds.get(kind, 0.0), spent) for kind in kinds}


def _rules(
    metrics: Sequence[Metric], targets: Sequence[Target], update: str, fit: str, permute: bool
) -> dict[tuple[str, str], Rule]:
    """By target and metric."""
    return {
        (target.text, metric.name): Rule(metric, target, update, fit, permute and target.group > 0)
        for target in targets
        for metric in metrics
    }


def _by_needs(protocol: Protocol, metrics: Sequence[Metric], update: str) -> list[list[Metric]]:
    """Metrics by what they share of the dense model's statistics, those that need least first."""
    groups: dict[frozenset[str], list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(protocol.shared([metric], update), []).append(metric)
    return [groups[needs] for needs in sorted(groups, key=lambda needs: (len(needs), sorted(needs)))]


def measured_row(protocol: Protocol, rule: Rule) -> BenchRow:
    """The row of one rule, whose error is what went wrong."""
    failure = None
    try:
        prepare = partial(protocol.prepare, [rule.metric], rule.update)
        retried(protocol.session.model, prepare, protocol.session.forget_calls)
    except GpmetricError as error:
        failure = error
    return next(_rows(protocol, [rule], failure))


def _rows(protocol: Protocol, rules: Sequence[Rule], failure: GpmetricError | None) -> Iterator[BenchRow]:
    session = protocol.session
    texts = session.evaluated
    nothing = Measured([math.inf] * len(texts), math.nan, math.nan, failure)
    found = [nothing] * len(rules)
    if failure is None:
        try:
            tokens = [text.tokens for text in texts]
            found = retried(session.model, partial(protocol.measure, rules, tokens), session.forget_calls)
        except OutOfMemoryError as error:
            found = [replace(nothing, error=error)] * len(rules)
    for rule, one in zip(rules, found, strict=True):
        ppl = {text.text.name: perplexity(loss) for text, loss in zip(texts, one.losses, strict=True)}
        metric, update = rule.metric, rule.metric.update or rule.update
        assert isinstance(rule.plan, Target)
        told = None if one.error is None else str(one.error)
        formula, fit = str(metric.expression), "dense" if rule.follows_dense and not protocol.one_shot else "own"
        yield BenchRow(
            metric.name, rule.plan.text, update, formula, ppl, one.seconds, one.sparsity, told, fit, one.permuted > 0
        )


def bench_work(session: Session) -> Work:
    """What `bench` does with a session's model."""
    request = session.inputs
    assert isinstance(request, BenchRequest)
    protocol = Protocol(session, one_shot=request.one_shot)
    metrics = [session.metric(text) for text in request.metrics]
    rules = len(metrics) * len(set(request.target))
    texts = sum(part.tokens.numel() for part in session.evaluated)
    work = protocol.work(metrics, request.update, fit=request.fit, rules=rules, texts=texts, permute=request.permute)
    return shared(work, request, session.model)


def run_bench(
    request: BenchRequest, listener: BenchListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Every metric at every target under one protocol, the dense model first.

    Args:
        request: what to measure on what; rows that its ledger has are taken from there.
        listener: told of progress and of every row.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        The JSON document of `gpmetric bench`. A metric that cannot be applied at a target, its scores not being finite
        for instance, has a row with the reason as `error`. For two models or more: `models`, such a document for each,
        and `transfer`, what `gpmetric.pruning.win_loss` makes of them. There, a model that fails has the reason as
        `error` in its document, beside whatever was measured before; the others are measured all the same.

    Raises:
        InputError: for anything that cannot be used, before the model runs; with several models, for what is wrong
            without loading any, or when all of them fail: then the first one's error.
    """
    told, deadline = listener or BenchListener(), Deadline.starting(request.minutes, started)
    meet(request, told.progress)
    sources = open_sources(request)
    with BenchLog(request.ledger, resume=request.resume) as log:
        if len(request.models) > 1:
            return _bench_several(request, sources, told, deadline, log)
        document: dict[str, Any] = {}
        _bench_model(request, request.models[0], sources, told, document, deadline, log)
        return document


bench = as_function("bench", BenchRequest, run_bench, "model", result=BenchResult)


def _bench_model(
    request: BenchRequest,
    name: str | None,
    sources: Sources,
    told: BenchListener,
    document: dict[str, Any],
    deadline: Deadline,
    log: BenchLog,
    first: bool = True,
) -> None:
    """Fills the document of one model; its `results` grow row by row, so that what stops it leaves them there."""
    session = open_session(request, name, sources, work=bench_work, listener=told)
    targets = [parse_target(text) for text in dict.fromkeys(request.target)]
    check_targets(session.model, targets)
    protocol = Protocol(
        session, one_shot=request.one_shot, progress=deadline.watching(told.progress), passed=told.progress
    )
    metrics = [session.metric(text) for text in request.metrics]
    dense = {
        part.text.name: perplexity(text_loss(session.model, part.tokens, protocol.progress))
        for part in session.evaluated
    }
    told.dense(dense)
    read = frozenset[str]().union(*(needed_statistics([metric], request.update) for metric in metrics))
    document |= _described(session, request) | {"dense": dense, "warnings": few_tokens(session, read), "results": []}
    order = {(target.text, metric.name): place for place, (target, metric) in enumerate(product(targets, metrics))}
    named = {metric.name: metric for metric in metrics}
    known = log.known(session, metrics, [target.text for target in targets])
    if request.shared_out:
        rules = _rules(metrics, targets, request.update, request.fit, request.permute)
        rows = _shared_rows(protocol, name, rules, deadline, known)
    else:
        rows = bench_rows(
            protocol, metrics, targets, request.update, deadline, first, request.fit, request.permute, known
        )
    for row in rows:
        if (row.target, row.metric) not in known:
            log.keep(session, named[row.metric], row)
        told.row(row)
        document["results"].append(asdict(row))
        document["results"].sort(key=lambda one: order[one["target"], one["metric"]])
    document |= session.experts()


def _shared_rows(
    protocol: Protocol,
    name: str | None,
    rules: Mapping[tuple[str, str], Rule],
    deadline: Deadline,
    known: Mapping[tuple[str, str], BenchRow],
) -> Iterator[BenchRow]:
    """What `bench_rows` gives of rules by target and metric, by workers that open the model of that name."""
    session = protocol.session

    def failed(rule: Rule, error: str) -> BenchRow:
        return next(_rows(protocol, [rule], GpmetricError(error)))

    yield from (known[pair] for pair in rules if pair in known)
    missing = [rule for pair, rule in rules.items() if pair not in known]
    with torch_threads(), bench_executor(session, name, measured_row) as executor:
        yield from shared_rows(executor, session, missing, deadline, failed)


def _described(session: Session, request: BenchRequest) -> dict[str, Any]:
    """What the figures depend on."""
    return session.describe() | {
        "protocol": "one-shot" if request.one_shot else "sequential",
        "sequence_length": session.tokens.shape[1],
        "calibration": session.windows["calibration"].describe(),
        "texts": [part.describe() for part in session.evaluated],
        "layers": len(session.model.layers),
    }


def _bench_several(
    request: BenchRequest, sources: Sources, told: BenchListener, deadline: Deadline, log: BenchLog
) -> dict[str, Any]:
    names = [name for name in request.models if name is not None]
    for name in names:
        check_path(name)
    documents: list[dict[str, Any]] = []
    failures = []
    for name in names:
        told.model(name)
        documents.append({"model": name})
        if len(documents) > 1 and deadline.left <= 0:
            documents[-1]["error"] = deadline.refusal
            continue
        try:
            _bench_model(request, name, sources, told, documents[-1], deadline, log, first=len(documents) == 1)
        except (GpmetricError, RuntimeError) as failure:  # RuntimeError: torch's
            documents[-1]["error"] = str(failure)
            failures.append(failure.with_traceback(None))  # whose frames hold the model
        if any(row["error"] == deadline.refusal for row in documents[-1].get("results", ())):
            documents[-1]["error"] = deadline.refusal  # a row that is missing is no lost one
        gc.collect()  # models are in reference cycles: the next one would be loaded beside this one
    if not any(document.get("results") for document in documents):
        raise failures[0]
    return {"models": documents, "transfer": win_loss(documents)}


def bench_failures(result: Mapping[str, Any]) -> list[str]:
    """Why metrics or models failed in what `bench` returned, one line each; with the model where there are several."""
    if "models" in result:
        return [f"{one['model']}: {failure}" for one in result["models"] for failure in bench_failures(one)]
    rows = [*result.get("results", ()), result]
    return [row["error"] for row in rows if row.get("error")]


def first_failure(result: Mapping[str, Any]) -> str | None:
    """The first of `bench_failures`, if there is one."""
    return next(iter(bench_failures(result)), None)
