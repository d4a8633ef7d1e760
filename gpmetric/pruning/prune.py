"""`gpmetric prune`: a model pruned by one metric to one target or allocation, written as a checkpoint, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.options import as_function
from gpmetric.pruning.allocation import Allocation, check_allocation, mean_sparsity, read_allocation
from gpmetric.pruning.bench import BenchListener
from gpmetric.pruning.checkpoint import check_folder, replacing, round_weights, write_checkpoint, write_masks
from gpmetric.pruning.protocol import Protocol, Rule, check_targets
from gpmetric.pruning.requests import PruneRequest, VerifyRequest
from gpmetric.pruning.verify import run_verify
from gpmetric.session.session import Session, open_session
from gpmetric.targets import Target, parse_target

__all__ = ["prune", "run_prune"]


def run_prune(request: PruneRequest, listener: BenchListener | None = None) -> dict[str, Any]:
    """Prunes a model under the protocol of `bench`, writes it and verifies what was written.

    Args:
        request: what to prune and how. Weights are written in the dtype that the model is stored in.
        listener: told of calibration and of the dense perplexity.

    Returns:
        The manifest without its lists of files and tensors, with `output`, `dense` and `seconds`. `perplexity` is that
        of the written checkpoint, loaded again.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: pruning failed, or the files cannot be written or do not verify; `output` is then as it was.
    """
    assert request.output is not None
    told, folder, masks = listener or BenchListener(), request.output, request.save_masks
    allocation = None if request.allocation is None else read_allocation(request.allocation)
    inputs = (request.model, request.calibration, request.text, request.allocation, masks and masks.parent)
    check_folder(folder, request.force, [Path(str(name)) for name in inputs if name is not None])
    session = open_session(request)
    model, (text,) = session.model, session.evaluated
    rule = _rule(session, request, allocation)
    targets = {layer.name: rule.target(layer.name) for layer in model.layers}
    protocol = Protocol(session, one_shot=request.one_shot, progress=told.progress)

    dense = perplexity(mean_loss(model, text.tokens))
    told.dense({text.text.name: dense})
    made = _made(session, request, rule, targets) | {"text": text.describe(), "dense": dense}
    zeros = {layer.name: int((layer.weight == 0).sum()) for layer in model.layers}
    protocol.prepare([rule.metric], rule.update)
    walk = protocol.walk([rule], [])
    copies = {name: weight for _, (pruned,) in walk for name, weight in pruned.items()}
    (measured,) = walk.measured()
    if measured.error:
        raise measured.error
    seconds = measured.seconds
    for layer in model.layers:
        if layer.name in copies:
            layer.weight.copy_(copies[layer.name])
    session.forget()
    round_weights(model)
    made["perplexity"] = perplexity(mean_loss(model, text.tokens))
    with replacing(folder, request.force) as partial:
        manifest = write_checkpoint(model, partial, made, targets, zeros)
        again = VerifyRequest(folder=str(partial), against=str(model.folder), device=request.device)
        found = run_verify(again, text.tokens)
        if not found["ok"]:
            raise GpmetricError(f"the written checkpoint does not verify: {found['problems'][0]}")
    if masks is not None:
        write_masks(model, masks)
    result = {key: value for key, value in manifest.items() if key not in ("files", "tensors")}
    return result | {"output": str(folder), "perplexity": found["perplexity"], "seconds": seconds}


prune = as_function("prune", PruneRequest, run_prune, "model")


def _rule(session: Session, request: PruneRequest, allocation: Allocation | None) -> Rule:
    """How the layers are pruned, which they all allow."""
    metric = session.metric(request.metric)
    target = parse_target(request.target or "0.5")
    if allocation is None:
        check_targets(session.model, [target])
        return Rule(metric, target, request.update)
    check_allocation(session.model.layers, allocation, target.resolved(metric.granularity) if request.target else None)
    return Rule(metric, allocation, request.update)


def _made(session: Session, request: PruneRequest, rule: Rule, targets: Mapping[str, Target]) -> dict[str, Any]:
    """What the manifest says of source, metric, target and protocol."""
    allocation = rule.plan if isinstance(rule.plan, Allocation) else None
    mean = f"{mean_sparsity(session.model.layers, targets):.4g}"
    return {name: value for name, value in session.describe().items() if name != "device"} | {
        "digest": session.model.digest,
        "metric": request.metric,
        "formula": str(rule.metric.expression),
        "target": request.target or ("0.5" if allocation is None else mean),
        "allocation": allocation and {"file": Path(str(request.allocation)).name, "sha256": allocation.digest},
        "update": rule.metric.update or rule.update,
        "protocol": "one-shot" if request.one_shot else "sequential",
        "calibration": session.windows["calibration"].describe(),
    }
