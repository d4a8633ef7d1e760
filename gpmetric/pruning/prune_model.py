"""`gpmetric prune`: a model pruned by one metric to one target or allocation, written as a checkpoint, read again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import check_length, default_text, open_text, read_windows
from gpmetric.models import Model, load_model
from gpmetric.provenance import check_output, versions
from gpmetric.pruning.allocation import Allocation, check_allocation, mean_sparsity, read_allocation
from gpmetric.pruning.bench import Bench, BenchListener, check_targets
from gpmetric.pruning.checkpoint import check_folder, replacing, round_weights, write_checkpoint, write_masks
from gpmetric.pruning.metrics import Metric, Update, check_update, resolve_metric
from gpmetric.pruning.prune import layer_rule, rules_of
from gpmetric.pruning.target import Target, parse_target
from gpmetric.pruning.verify import verify

__all__ = ["prune_model"]


def prune_model(
    model: str | None = None,
    *,
    output: str | Path,
    calibration: str | None = None,
    text: str | None = None,
    metric: str = "wanda",
    target: str | None = None,
    allocation: str | Path | None = None,
    update: str = "none",
    one_shot: bool = False,
    samples: int = 128,
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    save_masks: str | Path | None = None,
    force: bool = False,
    listener: BenchListener | None = None,
) -> dict[str, Any]:
    """Prunes a model under the protocol of `bench`, writes it and verifies what was written.

    Args:
        model: a directory or Hub name; None is the demo model.
        output: folder to write; its weights are in the dtype that the model is stored in.
        calibration: text the statistics are measured on, `samples` windows of it.
        text: text that the perplexity is measured on, `windows` windows of it (all by default); the calibration text by
            default.
        metric: a name of BASELINES or a formula.
        target: a sparsity, `layer:` or `block:` sparsity, or N:M; 0.5 by default. With an allocation, its comparison
            group and budget, which are not checked by default.
        allocation: file that sets each layer, as `gpmetric.pruning.allocation.read_allocation` reads it.
        update, one_shot, sequence_length, shuffle, seed, device, dtype, include, exclude: as for `bench`.
        save_masks: safetensors file to write, with what is kept, boolean [out, in] by layer name.
        force: replace a checkpoint of gpmetric at `output`.
        listener: told of calibration and of the dense perplexity.

    Returns:
        The manifest without its lists of files and tensors, with `output`, `dense` and `seconds`. `perplexity` is that
        of the written checkpoint, loaded again.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: pruning failed, or the files cannot be written or do not verify; `output` is then as it was.
    """
    told = listener or BenchListener()
    rule = resolve_metric(metric)
    chosen, folder = check_update(update), Path(output)
    asked = None if allocation is None else read_allocation(allocation)
    wanted = None if asked and target is None else parse_target("0.5" if target is None else target)
    masks = None if save_masks is None else Path(save_masks)
    named = [Path(name) for name in (model, calibration, text, allocation) if name is not None]
    check_folder(folder, force, named if masks is None else [*named, masks.parent])
    check_output("--save-masks", masks)
    calibration_text = open_text(default_text(model, calibration, "--calibration", "calibration"))
    evaluated = calibration_text if text is None else open_text(text)

    loaded = load_model(model, device=device, dtype=dtype, include=include, exclude=exclude)
    plan = _checked(loaded, rule, wanted, asked)
    length = check_length(loaded, sequence_length)
    shuffle_seed = seed if shuffle else None
    sample = read_windows(loaded, calibration_text, length, samples, shuffle_seed)
    read = read_windows(loaded, evaluated, length, windows, shuffle_seed)
    rule = resolve_metric(metric, *sample.tokens.shape)
    used = rule.update or chosen
    rules = _rules(loaded, rule, plan, used)

    made: dict[str, Any] = {
        "model": loaded.name,
        "digest": loaded.digest,
        "dtype": loaded.dtype,
        "metric": metric,
        "formula": str(rule.expression),
        "target": wanted.text if wanted else f"{mean_sparsity(loaded.layers, rules):.4g}",
        "allocation": asked and {"file": Path(str(allocation)).name, "sha256": asked.digest},
        "update": used,
        "protocol": "one-shot" if one_shot else "sequential",
        "seed": seed,
        "shuffle": shuffle,
        "calibration": sample.describe(),
        "text": read.describe(),
        "versions": versions(),
    }
    dense = perplexity(mean_loss(loaded, read.tokens))
    told.dense({evaluated.name: dense})
    zeros = {layer.name: int((layer.weight == 0).sum()) for layer in loaded.layers}
    runner = Bench(loaded, sample.tokens, one_shot=one_shot, progress=told.progress)
    runner.prepare([rule], chosen)
    start = time.perf_counter()
    runner.prune(rule, plan, chosen)
    seconds = time.perf_counter() - start
    del runner  # with what it holds of the model's activations
    round_weights(loaded)
    made |= {"perplexity": perplexity(mean_loss(loaded, read.tokens)), "dense": dense}

    with replacing(folder, force) as partial:
        manifest = write_checkpoint(loaded, partial, made, rules, zeros)
        found = verify(partial, against=str(loaded.folder), device=device, windows=read.tokens)
        if not found["ok"]:
            raise GpmetricError(f"the written checkpoint does not verify: {found['problems'][0]}")
    if masks is not None:
        write_masks(loaded, masks)
    result = {key: value for key, value in manifest.items() if key not in ("files", "tensors")}
    return result | {"output": str(folder), "perplexity": found["perplexity"], "seconds": seconds}


def _checked(model: Model, metric: Metric, target: Target | None, allocation: Allocation | None) -> Target | Allocation:
    """What the layers are pruned to, which they all allow; without an allocation there is a target."""
    if allocation is None:
        assert target is not None
        check_targets(model, [target])
        return target
    check_allocation(model.layers, allocation, rules_of(metric, [target])[0] if target else None)
    return allocation


def _rules(model: Model, metric: Metric, plan: Target | Allocation, update: Update) -> dict[str, Target]:
    """What each layer is pruned to, by name."""
    rules = {layer.name: layer_rule(metric, plan, layer.name) for layer in model.layers}
    if update != "obs-blockwise":
        return rules
    # its solver goes by blocks whatever was asked for
    return {name: rule if rule.group else rule.with_granularity("block") for name, rule in rules.items()}
