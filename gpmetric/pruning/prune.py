"""`gpmetric prune`: a model pruned by one metric to one target or allocation, written as a checkpoint, read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpmetric.data import Windows
from gpmetric.digests import weight_stamps
from gpmetric.errors import GpmetricError, InputError, TimeOverError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.functions import as_function
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.allocation import Allocation, check_allocation, mean_sparsity, read_allocation
from gpmetric.pruning.checkpoint import CheckpointWriter, stored_layers, write_masks
from gpmetric.pruning.listeners import PruneListener
from gpmetric.pruning.output_folder import check_folder, file_digest
from gpmetric.pruning.protocol import Protocol, Rule, check_targets
from gpmetric.pruning.recipe import Recipe, read_recipe
from gpmetric.pruning.requests import PruneRequest, VerifyRequest, check_permute
from gpmetric.pruning.unfinished import Record, Unfinished, is_begun, unfinished
from gpmetric.pruning.updaters import needed_statistics, resolve_target
from gpmetric.pruning.verify import verify_files
from gpmetric.results import PruneResult
from gpmetric.session.caveats import few_tokens
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.listeners import Progress
from gpmetric.session.memory import retried
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work
from gpmetric.targets import Target, parse_target
from gpmetric.tensor_file import weight_bytes

RECIPE = "recipe.toml"  # in the checkpoint that was made by one

__all__ = ["RECIPE", "prune", "prune_work", "run_prune"]


def run_prune(
    request: PruneRequest, listener: PruneListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Prunes a model under the protocol of `bench`, writes it block by block and verifies what was written.

    Killed at any moment, or stopped by `minutes` behind a block, the same request goes on where it was: the files are
    those of an uninterrupted run.

    Args:
        request: what to prune and how. Weights are written in the dtype that the model is stored in.
        listener: told of calibration, of the dense perplexity and of blocks.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        The manifest without its lists of files and tensors, with `output`, `dense` and `seconds`, those of pruning
        since it was last gone on with. `perplexity` is that of the written checkpoint, loaded again.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: pruning failed or has no time left, or the files cannot be written or do not verify; `output` is
            then as it was.
    """
    assert request.output is not None
    deadline = Deadline.starting(request.minutes, started)
    told, folder, masks = listener or PruneListener(), request.output, request.save_masks
    recipe = None if request.recipe is None else read_recipe(request.recipe).with_options(vars(request))
    allocation = None if recipe is None else recipe.allocation
    if request.allocation is not None:
        allocation = read_allocation(request.allocation)
    if request.permute:
        check_permute([parse_target(request.target or "0.5")] if allocation is None else allocation.targets.values())
    read = (request.model, request.calibration, request.text, request.allocation, request.recipe)
    inputs = (*read, masks and masks.parent)
    needed = [Path(str(name)) for name in inputs if name is not None]
    check_folder(folder, request.force or is_begun(folder), needed)
    session = open_session(request, work=prune_work, listener=told)
    stored_layers(session.model)  # what cannot be written is not pruned first
    if recipe is not None:
        _check_calibration(recipe, request, session)
    rule = _rule(session, request, allocation)
    targets = {layer.name: rule.target(layer.name) for layer in session.model.layers}
    protocol = Protocol(
        session, one_shot=request.one_shot, progress=deadline.watching(told.progress), passed=told.progress
    )
    made = _made(session, request, rule, targets, recipe)
    if allocation is not None:
        used = {name: made[name] for name in ("formula", "update", "fit")}
        other = [name for name, value in allocation.made_for.items() if used[name] != value]
        if other:
            told.other_use(*({name: one[name] for name in other} for one in (allocation.made_for, used)))
    with unfinished(folder, _identity(session, made, targets), resume=request.resume) as partial:
        if not partial.placed:
            check_folder(folder, request.force)

            def begin_anew() -> None:  # what was saved is of other batches
                partial.forget()
                session.forget()

            retried(
                session.model,
                lambda: _write(partial, protocol, rule, targets, made, told, deadline, recipe),
                begin_anew,
            )
            partial.place(request.force)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if masks is not None:
            write_masks(folder, manifest["layers"], masks)
        found = partial.record
    result = {key: value for key, value in manifest.items() if key not in ("files", "tensors", "moves")}
    ended = {"output": str(folder), "dense": found.dense, "perplexity": found.verified, "seconds": found.seconds}
    return result | ended | {"warnings": few_tokens(session, needed_statistics([rule.metric], rule.update))}


prune = as_function("prune", PruneRequest, run_prune, "model", result=PruneResult)


def _write(
    partial: Unfinished,
    protocol: Protocol,
    rule: Rule,
    targets: Mapping[str, Target],
    made: Mapping[str, Any],
    told: PruneListener,
    deadline: Deadline,
    recipe: Recipe | None,
) -> None:
    """Writes and verifies the files, from where they are on.

    Raises:
        TimeOverError: time is over before all blocks are pruned.
        GpmetricError: pruning failed, or what was written does not verify.
        OSError: something cannot be written.
    """
    session, record = protocol.session, partial.record
    (text,) = session.evaluated
    writer = CheckpointWriter(session.model, partial.files, targets, update=made["update"] != "none")
    if writer.copy_files() and record.block:  # some were lost
        partial.forget()
        writer.copy_files()
        record = partial.record
    started = deadline.now()
    if record.dense is None:
        record = replace(record, dense=perplexity(text_loss(session.model, text.tokens, protocol.progress)))
    else:
        told.resumed(record.block, len(session.model.blocks))
    assert record.dense is not None
    reading = deadline.now() - started  # as long as verifying takes
    told.dense({text.text.name: record.dense})
    if record.perplexity is None:
        record = _prune_blocks(partial, record, protocol, rule, writer, told, deadline)
    session.forget()
    if record.manifest is None:
        ends = {"text": text.describe(), "dense": record.dense, "perplexity": record.perplexity}
        if experts := session.experts():
            experts["experts"]["starved"] = [layer["name"] for layer in record.layers if layer.get("starved")]
            ends |= experts
        if rule.permute:
            ends |= _permuted(record, targets)
        writer.finish({**made, **ends}, record.layers, {} if recipe is None else {RECIPE: recipe.text or ""})
        partial.save(record := replace(record, manifest=file_digest(partial.files / MANIFEST)))
    if record.verified is None:
        if deadline.left < reading:
            raise TimeOverError(f"--minutes {deadline.minutes:g} are over, all being written but not verified yet")
        partial.save(replace(record, verified=_verified(partial.files, session, text, protocol.progress)))


def _permuted(record: Record, targets: Mapping[str, Target]) -> dict[str, Any]:
    """What the manifest says of orders: how many of the layers under N:M have their columns in another, and which."""
    axes = {
        one["name" if "pieces" in one else "tensor"]: 0 if one["transposed"] else 1
        for one in record.layers
        if targets[one["name"]].group
    }
    moved = {name for move in record.moves for name, axis in move["tensors"].items() if axes.get(name) == axis}
    return {"permuted": {"layers": len(moved), "of": len(axes)}, "moves": record.moves}


def _verified(files: Path, session: Session, text: Windows, progress: Progress) -> float:
    """Perplexity of a checkpoint that was written, loaded again.

    Raises:
        GpmetricError: it does not verify.
    """
    request = VerifyRequest(folder=str(files), against=str(session.model.folder), device=session.inputs.device)
    found = verify_files(  # digests were taken from the same files
        request, text.tokens, progress=progress, reading=session.told.progress, digests=False
    )
    if not found["ok"]:
        raise GpmetricError(f"the written checkpoint does not verify: {found['problems'][0]}")
    reached: float = found["perplexity"]
    return reached


def _prune_blocks(
    partial: Unfinished,
    record: Record,
    protocol: Protocol,
    rule: Rule,
    writer: CheckpointWriter,
    told: PruneListener,
    deadline: Deadline,
) -> Record:
    """Prunes and writes the blocks that are left and measures the pruned model; the record, saved now and then."""
    session = protocol.session
    blocks, layers, moves = session.model.blocks, list(record.layers), list(record.moves)
    placement = session.model.placement
    assert placement is not None
    if record.block:
        placement.batch_tokens = record.batch
    if partial.due and record != partial.record:  # the dense model took long
        partial.save(record)
    protocol.prepare([rule.metric], rule.update, partial.statistics)
    walk = protocol.walk([rule], [one.tokens for one in session.evaluated], writer.dtypes)
    if record.block:
        walk.restore(record.block, partial.state())
    told.progress("blocks", record.block, len(blocks))
    before = deadline.now()
    for index, (pruned,) in walk:
        (moved,), starved = walk.moves(), session.starved | session.starved_pruned
        for layer in blocks[index].layers:
            told_layer = writer.write_layer(layer, pruned.get(layer.name), moved)
            layers.append(told_layer | ({"starved": True} if layer.name in starved else {}))
        moves += writer.write_moves(moved, blocks[index].layers)
        told.progress("blocks", index + 1, len(blocks))
        before, spent = (now := deadline.now()), now - before
        over = deadline.left < spent  # the next one would not end in time
        if (partial.due or over) and index + 1 < len(blocks):
            reached = replace(record, block=index + 1, batch=placement.batch_tokens, layers=[*layers], moves=[*moves])
            partial.save(reached, walk.state())
            if over:
                raise TimeOverError(f"--minutes {deadline.minutes:g} are over at block {index + 1} of {len(blocks)}")
    (measured,) = walk.measured()
    if measured.error is not None:
        raise measured.error
    ppl = perplexity(measured.losses[0])
    reached = replace(record, block=len(blocks), layers=layers, moves=moves)
    partial.save(record := replace(reached, seconds=measured.seconds, perplexity=ppl))
    return record


def prune_work(session: Session) -> Work:
    """What `prune` does with a session's model, verifying included; each block is read a few times."""
    request, (text,) = session.inputs, session.evaluated
    assert isinstance(request, PruneRequest)
    protocol = Protocol(session, one_shot=request.one_shot)
    tokens = text.tokens.numel()
    metric = session.metric(request.metric)
    work = protocol.work([metric], request.update, fit=request.fit, texts=tokens, permute=request.permute)
    assert session.model.folder is not None
    disk = weight_bytes(session.model.folder)
    return replace(work, resident=False, cached=True, disk=disk, forward=work.forward + tokens)


def _rule(session: Session, request: PruneRequest, allocation: Allocation | None) -> Rule:
    """How the layers are pruned, which they all allow."""
    metric = session.metric(request.metric)
    target = parse_target(request.target or "0.5")
    if allocation is None:
        check_targets(session.model, [target])
        return Rule(metric, target, request.update, request.fit, request.permute)
    asked = resolve_target(target, metric, request.update) if request.target else None
    rule = Rule(metric, allocation, request.update, request.fit, request.permute)
    check_allocation(session.model.layers, _in_its_groups(allocation, rule), asked)
    return rule


def _check_calibration(recipe: Recipe, request: PruneRequest, session: Session) -> None:
    """Refuses other calibration windows than a recipe names.

    Raises:
        InputError: naming both.
    """
    windows = session.windows["calibration"]
    if recipe.calibration_digest not in (None, windows.tokens_digest):
        raise InputError(
            f"--calibration {windows.text.name!r} gives windows of digest {windows.tokens_digest[:12]}, but --recipe "
            f"{str(request.recipe)!r} was chosen on {recipe.calibration_digest:.12}: take the text, tokenizer and "
            "number of windows that it was chosen on, or leave calibration_digest out of it"
        )


def _in_its_groups(allocation: Allocation, rule: Rule) -> Allocation:
    """An allocation in the comparison groups that the rule's updater chooses in, where it has its own."""
    own = rule.updater.granularity
    if own is None or allocation.granularity == "n:m":
        return allocation
    return replace(allocation, granularity=own, targets={name: rule.target(name) for name in allocation.targets})


def _identity(session: Session, made: Mapping[str, Any], targets: Mapping[str, Target]) -> dict[str, Any]:
    """All that determines the files that are written, but for the names of what is read: its content does."""
    folder, texts = session.model.folder, {"calibration": session.windows["calibration"], "text": session.evaluated[0]}
    assert folder is not None  # load_model knows it
    return {
        **{name: _unnamed(value) for name, value in made.items() if name != "model"},
        "statistics_dtype": session.inputs.statistics_dtype,
        "device": str(session.model.device),
        "layers": {name: [target.text, target.granularity] for name, target in targets.items()},
        "tokens": {name: hashlib.sha256(one.tokens.numpy().tobytes()).hexdigest() for name, one in texts.items()},
        "files": [[Path(path).name, *found[:2]] for path, *found in weight_stamps(folder)],
        "text": _unnamed(texts["text"].describe()),
    }


def _unnamed(told: Any) -> Any:
    """What the manifest says of something that is read, without its name."""
    return {key: one for key, one in told.items() if key not in ("file", "text")} if isinstance(told, dict) else told


def _named(file: str | Path | None, digest: str | None) -> dict[str, Any]:
    return {"file": Path(str(file)).name, "sha256": digest}


def _allocated(allocation: Allocation) -> dict[str, Any]:
    """Which allocation it was, and what it was made for where it says so."""
    named = _named(allocation.file, allocation.digest)
    return named | ({"made_for": dict(allocation.made_for)} if allocation.made_for else {})


def _made(
    session: Session, request: PruneRequest, rule: Rule, targets: Mapping[str, Target], recipe: Recipe | None
) -> dict[str, Any]:
    """What the manifest says of source, metric, target and protocol."""
    allocation = rule.plan if isinstance(rule.plan, Allocation) else None
    mean = f"{mean_sparsity(session.model.layers, targets):.4g}"
    made = {name: value for name, value in session.describe().items() if name != "device"} | {
        "digest": session.model.digest,
        "metric": request.metric,
        "formula": str(rule.metric.expression),
        "target": request.target or ("0.5" if allocation is None else mean),
        "allocation": allocation and _allocated(allocation),
        "update": rule.metric.update or rule.update,
        "fit": rule.metric.fit or rule.fit,
        "protocol": "one-shot" if request.one_shot else "sequential",
        "include": request.include,
        "exclude": request.exclude,
        "calibration": session.windows["calibration"].describe(),
    }
    made |= {"permute": True} if rule.permute else {}
    return made if recipe is None else made | {"recipe": _named(request.recipe, recipe.digest)}
