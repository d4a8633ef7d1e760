"""What allocation costs: memory of calibration at once and block by block, seconds of the steps of one evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocation_report import short
from results import peak_memory, row
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.level_masks import level_codes
from gpmetric.allocation.levels import Levels, level_table
from gpmetric.allocation.prepare import calibrate
from gpmetric.allocation.request import AllocateRequest
from gpmetric.calibration.collect import collect_blocks
from gpmetric.errors import GpmetricError, InputError
from gpmetric.metrics import resolve_metric
from gpmetric.models import Block, Layer, Model, find_parts
from gpmetric.placement import Placement

WINDOWS, LENGTH = 4, 64  # of calibration
WAYS = {"all blocks at once": True, "block by block": False}  # whether the model is resident
STEP = 4  # levels that a gene moves by


def memory_rows(blocks: int, width: int, repeats: int) -> list[dict[str, str]]:
    """Peak memory of second-order calibration beyond the model's, at once and by block, a fresh process each time.

    Raises:
        InputError: no such model.
    """
    if blocks < 1 or width < 64 or width % 64 or repeats < 1:
        raise InputError("--blocks and --repeats must be at least 1, --width a multiple of 64")
    found: list[dict[str, str]] = []
    whole: float | None = None
    for way in WAYS:
        measured = [_calibrated_in_process(blocks, width, way) for _ in range(repeats)]
        peaks = np.array([one["peak"] for one in measured])
        seconds = float(np.median([one["seconds"] for one in measured]))
        case = f"GPT-2 {blocks}x{width}, {way}"
        found.append(row("calibration memory", case, peaks, whole, "MiB"))
        whole = float(np.median(peaks)) if whole is None else whole
        print(
            f"{case}: {np.median(peaks):.0f} MiB beyond the {measured[0]['before']:.0f} before it, "
            f"{found[-1]['ratio'] or '1'} of all at once, {seconds:.0f} s",
            flush=True,
        )
    return found


def _calibrated_in_process(blocks: int, width: int, way: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).with_name("bench_allocation.py"))]
    command += ["--memory-of", way, "--blocks", str(blocks), "--width", str(width)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GpmetricError(f"measuring {way} failed: {done.stderr[-400:]}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure_calibration(blocks: int, width: int, way: str) -> dict[str, float]:
    """MiB and seconds of one calibration of a random GPT-2, as `gpmetric allocate` does it for W*W*H.

    Args:
        way: a key of WAYS.
    """
    model = random_gpt2(blocks, width, resident=WAYS[way])
    metric = resolve_metric("W*W*H")
    table = level_table(model, "row")
    layers = {layer.name: (index, layer) for index, layer in enumerate(model.layers)}
    tokens = torch.randint(model.vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    codes = {}
    _forget_peak()  # of building the model: 140 MiB above what it takes at 12x768
    before, start = peak_memory(), time.perf_counter()
    for block in collect_blocks(model, tokens, metric.operands):
        for name in list(block):
            index, layer = layers[name]
            score = metric(layer.weight, **block.pop(name).operands)
            codes[index] = level_codes(score, table.targets[index], nested=True)
    seconds = time.perf_counter() - start
    return {"peak": peak_memory() - before, "before": before, "seconds": seconds}


def random_gpt2(blocks: int, width: int, *, resident: bool = True) -> Model:
    """A GPT-2 of random weights, which are in memory in any case; it has no tokenizer, and needs none."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=blocks, n_embd=width, n_head=width // 64, use_cache=False)
    module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    found = [
        Block(
            block,
            tuple(
                Layer(f"transformer.h.{index}.{name}", child)
                for name, child in block.named_modules()
                if isinstance(child, Conv1D)
            ),
        )
        for index, block in enumerate(module.transformer.h)
    ]
    placement = None if resident else Placement(find_parts(module, found), torch.device("cpu"))
    return Model("random GPT-2", module, None, tuple(found), placement=placement)


def _forget_peak() -> None:
    """Linux sets the peak back to what is resident now; elsewhere it stays, and what follows is underrated by it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def split_rows(request: AllocateRequest, repeats: int) -> list[dict[str, str]]:
    """Seconds of masks, forward and backward of one candidate on all search windows.

    Raises:
        GpmetricError: model, text or metric cannot be used.
    """
    calibrated = calibrate(request, lambda *told: None)
    assert request.sparsity is not None
    windows, table = calibrated.session.windows, calibrated.table
    objective = CandidateObjective(calibrated.pruned, windows["search"].tokens, request.objective)
    near = table.nearest([request.sparsity] * len(table.genes))
    away = tuple(level - STEP for level in near)
    genes = len(near)
    one = _measured(objective, [near, (*near[:-1], away[-1])], repeats)
    every = _measured(objective, [near, away], repeats)
    back = {"backward": []} | {step: values for step, values in every.items() if step == "forward"}
    for _ in range(repeats):
        before = objective.seconds["backward"]
        objective.slopes(near, len(objective))
        back["backward"].append(objective.seconds["backward"] - before)
    name = f"{short(str(request.model))} {request.metric}"
    tokens = sum(objective.tokens)
    forward = f"forward of {tokens:,} tokens"
    return [
        _told(f"{name}: masks, one gene of {genes}", one["masks"], every["masks"]),
        _told(f"{name}: masks, all {genes} genes", every["masks"]),
        _told(f"{name}: {forward}, last block changed", one["forward"], every["forward"]),
        _told(f"{name}: {forward}, all changed", every["forward"]),
        _told(f"{name}: slopes by backward of {tokens:,} tokens", back["backward"], every["forward"]),
    ]


def _measured(objective: CandidateObjective, candidates: Sequence[Levels], repeats: int) -> dict[str, list[float]]:
    """By step, its seconds each time one candidate takes the other's place."""
    found: dict[str, list[float]] = {"masks": [], "forward": []}
    for number, levels in enumerate(islice(cycle(candidates), repeats + 1)):
        before = dict(objective.seconds)
        objective.measure(levels, 0, len(objective))
        for step, values in found.items():
            if number:  # the first has nothing to differ from
                values.append(objective.seconds[step] - before[step])
    return found


def _told(case: str, values: Sequence[float], baseline: Sequence[float] | None = None) -> dict[str, Any]:
    found = row("allocation step", case, np.array(values), None if baseline is None else float(np.median(baseline)))
    ratio = f", {found['ratio']} of {float(found['baseline']):.3g} s" if found["ratio"] else ""
    print(f"{case}: {float(found['median']):.3g} s{ratio}", flush=True)
    return found
