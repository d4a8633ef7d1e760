"""What a command takes, before it is begun: memory of device and host, disk, time; and how it is to go about it.

Sizes are counted from shapes: of weights, statistics, hidden states, and of what a step has besides for a moment. What
the numbers were compared with is in benchmarks/results.csv (`plan`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gpmetric.blockwise.ends import logits_at_once
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.cache import estimate_bytes
from gpmetric.errors import InputError
from gpmetric.files import scratch_folder
from gpmetric.models import Model
from gpmetric.operands import CROSS, GRAM, OPERANDS, is_regional, needs_gradients
from gpmetric.placement import BATCH_TOKENS, FRONT, HEAD
from gpmetric.session.memory import free_device, free_disk, free_host, resident_bytes
from gpmetric.session.work import Work

__all__ = ["Plan", "make_plan"]

_MARGIN = 0.08  # of the memory, which is left to others, and to what allocators keep
_ROOM = 2 * 10**9  # bytes that move between memory and disk; files of beyond that are in the system's cache anyway
_READ = 1.5e9  # bytes a second that weights are read at from a disk's cache


@dataclass(frozen=True)
class Plan:
    """How a command goes about its work, and what that takes.

    Attributes:
        memory_bytes: peak on the device; on a CPU, the process's.
        host_bytes: peak of the process.
        disk_bytes: scratch files, the statistics cache, and what is written.
        seconds: by a short measurement of this machine; a rough figure.
        resident: whether all weights are on the device for good, or each block while it is needed.
        kept: whether statistics of all layers are on the device together.
        room: bytes of hidden states, and of statistics, that are kept in memory; beyond, they go to disk.
        together: pruned models that pass through the blocks at once.
        states: whether hidden states stay on the device.
        inputs: whether what the layers of one block read in the dense model is kept while it is pruned.
        workers: processes that do the work at the same time.
        held_models: models that each of them holds at once.
        aside: whether pruned weights that are kept are in files.
    """

    memory_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    resident: bool = True
    kept: bool = True
    room: int | None = None
    together: int = 1
    states: bool = True
    inputs: bool = True
    workers: int = 1
    held_models: int = 1
    aside: bool = False

    def describe(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def times(self, workers: int) -> Plan:
        """The same for so many processes, and the one that they work for."""
        memory, host = (one * (workers + 1) for one in (self.memory_bytes, self.host_bytes))
        return replace(self, memory_bytes=memory, host_bytes=host, seconds=self.seconds / workers, workers=workers)

    def shelf(self) -> Shelf:
        """Takes what moves between memory and disk."""
        return Shelf(self.room, None if self.room is None else torch.device("cpu"))


def make_plan(model: Model, work: Work, limit: int | None) -> Plan:
    """The fastest way that keeps to a limit: everything on the device, or weights alone, or block by block.

    There are fewer models at once than the work has where that keeps their weights on the device, or is the only way.

    Args:
        model: opened, on whatever device.
        limit: bytes on the device (on a CPU, of the process); None is what is free, less a margin.

    Raises:
        InputError: no way keeps to it; named are what it would take, and what takes less.
    """
    found: list[Plan] = []
    for models in range(work.models, 0, -1):
        try:
            found.append(replace(_plan_of(model, replace(work, models=models), limit), held_models=models))
        except InputError:
            if models == 1 and not found:
                raise
    return next((plan for plan in found if plan.resident), found[0])


def _plan_of(model: Model, work: Work, limit: int | None) -> Plan:
    sizes = _Sizes(model, work)
    part = (1 - _MARGIN) * work.share / work.models
    free = int((limit or free_device(model.device)) * part)
    host = free if model.device.type == "cpu" else int(free_host() * part)
    ways = {True: [(True, True)], False: [(False, False)], None: [(True, True), (True, False), (False, False)]}
    for workers in range(work.workers, 1, -1):  # on one device, only what is quickest pays
        shares = math.ceil(workers / work.devices) + 1  # there is the process that they work for, too
        for resident, kept in ways[work.resident] if work.devices > 1 else [(True, True)]:
            plan = sizes.way(resident, kept, free // shares, host // (workers + 1))
            if plan is not None:
                return replace(plan, together=1).times(workers)
    for resident, kept in ways[work.resident]:
        plan = sizes.way(resident, kept, free, host)
        if plan is not None:
            return sizes.with_database(plan, host)
    given = "allowed by --memory" if limit is not None else "free"
    whole = bool(work.resident)
    least = sizes.device(resident=whole, kept=whole) + (sizes.moving(resident=True, kept=True) if whole else 0)
    raise InputError(
        f"{model.name!r} needs at least {_told(least)} here, of {_told(free)} {given}: allow more, take a shorter "
        "--sequence-length, metrics of fewer operands, or --dtype bfloat16"
    )


def _told(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what a command holds, by a model's shapes."""

    model: Model
    work: Work

    def way(self, resident: bool, kept: bool, free: int, host: int) -> Plan | None:
        """The plan of one way, None where it needs more than is free.

        Raises:
            InputError: the disk has no room for what has none in memory.
        """
        plan, on_cpu = Plan(resident=resident, kept=kept), self.model.device.type == "cpu"
        least, moving = self.device(resident=resident, kept=kept), self.moving(resident=resident, kept=kept)
        if least + (moving if kept else 0) > free:
            return None
        seconds = self.seconds(plan)
        if kept:
            whole = least + moving
            inputs = whole + self.inputs <= free
            whole += self.inputs if inputs else 0
            own = whole if on_cpu else resident_bytes() + self.model.placement.bytes(FRONT)  # type: ignore[union-attr]
            return replace(
                plan, memory_bytes=whole, host_bytes=own, disk_bytes=self.written, seconds=seconds, inputs=inputs
            )
        room = min(_ROOM, max(0, free - least if on_cpu else host - resident_bytes()))
        held = min(moving, room)
        aside, scratch = moving - held, scratch_folder()
        if aside > free_disk(scratch):
            raise InputError(
                f"{self.model.name!r} needs {_told(aside)} of disk in {str(scratch)!r}, which has "
                f"{_told(free_disk(scratch))}: allow more --memory, take fewer --samples, or name another place by "
                "XDG_CACHE_HOME"
            )
        together = max(1, min(self.work.rules, room // max(1, 2 * self.per_rule)))
        states = not on_cpu and least + self.hidden <= free
        if states:
            least, together = least + self.hidden, 1
        return replace(
            plan, memory_bytes=least + held if on_cpu else least, disk_bytes=aside + self.written, seconds=seconds,
            room=room // 2, host_bytes=least + held if on_cpu else resident_bytes() + held, together=together,
            states=states, inputs=False,
        )  # fmt: skip

    def with_database(self, plan: Plan, host: int) -> Plan:
        """The plan with pruned weights in what memory is left, or on disk; InputError where neither has room."""
        size, scratch, left = self.work.database, scratch_folder(), max(0, host - plan.host_bytes)
        if size <= left:
            device = size if self.model.device.type == "cpu" else 0
            return replace(plan, memory_bytes=plan.memory_bytes + device, host_bytes=plan.host_bytes + size)
        if size > free_disk(scratch) - plan.disk_bytes:
            raise InputError(
                f"the pruned weights of {self.model.name!r} at all levels are {_told(size)}; memory has {_told(left)} "
                f"left, {str(scratch)!r} {_told(free_disk(scratch))}: take fewer --levels, --lowest and --highest "
                "closer to each other, or another place by XDG_CACHE_HOME"
            )
        return replace(plan, disk_bytes=plan.disk_bytes + size, aside=True)

    def moving(self, *, resident: bool, kept: bool) -> int:
        """What need not be on the device all the time: hidden states, statistics of other blocks, codes of weights."""
        inputs = 0 if kept else len(self.model.blocks) * self.states(self.work.backward)
        stored = 0 if kept or self.work.cached else self.statistics(self.work.dense)
        if not kept and needs_gradients(self.work.dense):  # put aside until the gradients of their block come
            stored += self._statistics([name for name in self.work.dense if is_regional([name])], self.model.layers)
        return max(self.hidden + (0 if resident else self.codes), inputs) + stored

    def device(self, *, resident: bool, kept: bool) -> int:
        """What must be on the device at the same moment; hidden states that can be elsewhere are left out."""
        placement = self.model.placement
        assert placement is not None
        calibrating, pruning = self.calibrating(kept), self.pruning(resident=resident, kept=kept)
        fixed = resident_bytes(self.model.device)
        if self.model.device.type == "cpu":
            fixed -= placement.held_bytes  # weights that are in memory by now are among the others
        if resident:  # the graphs of all blocks are there while the logits are
            working = self.codes + max(calibrating, pruning) + self.logits
            return fixed + placement.total_bytes + max(self.work.fixed + working, self.work.after)
        ends = max(placement.bytes(FRONT), placement.bytes(HEAD)) + self.logits
        return fixed + self.work.fixed + max(self.block + max(calibrating, pruning), ends)

    def calibrating(self, kept: bool) -> int:
        """What collecting statistics of the dense model takes, with the statistics, which are fp32 until they are kept.

        Of gradients, those of all layers are accumulated at once where they are kept together.
        """
        work = self.work
        names = work.dense | (work.block if needs_gradients(work.block) else frozenset())
        if not needs_gradients(names):
            earlier = self.statistics(work.dense) if kept else 0
            return earlier + self.block_accumulators(names) + max(self.activations, self.regional(names))
        together = self._statistics(_accumulated(names), self.model.layers)
        found = together if kept else self.block_accumulators(names)
        return found + (len(self.model.blocks) if kept else 1) * self.graph + 2 * self.widest

    def pruning(self, *, resident: bool, kept: bool) -> int:
        """What choosing masks, solving and measuring take, the statistics that are there meanwhile included."""
        work = self.work
        dense = self.statistics(work.dense) + work.kept if kept else self.block_statistics(work.dense)
        copies = work.copied * self.model.placement.total_bytes if resident else 0  # type: ignore[union-attr]
        blocks = len(self.model.blocks) if resident and not work.one_graph else 1
        graphs = blocks * self.graph if work.differentiated else 0
        inside = max(self.activations, self.regional(work.block), self.fitting)
        block = self.block_accumulators(work.block) + work.copies * self.block + self.workspace + inside
        return dense + copies + max(block, graphs + 2 * self.widest)

    def regional(self, names: Collection[str]) -> int:
        """Of one window's graph in one block, and a gradient, where statistics are regional."""
        return self.graph + 2 * self.widest if is_regional(names) else 0

    @property
    def fitting(self) -> int:
        """Of one window's graph in one block, and what a step has of its weights: six copies in fp32 and masks."""
        if not self.work.fits_blocks:
            return 0
        return self.graph + 26 * max(sum(layer.weight.numel() for layer in block.layers) for block in self.model.blocks)

    @cached_property
    def block(self) -> int:
        """Of the largest block's weights."""
        assert self.model.placement is not None
        return max(self.model.placement.bytes(index) for index in range(len(self.model.blocks)))

    @cached_property
    def prunable(self) -> int:
        """Prunable weights."""
        return sum(layer.weight.numel() for layer in self.model.layers)

    @cached_property
    def widest(self) -> int:
        """Of the largest prunable weight, in fp32."""
        return 4 * max(layer.weight.numel() for layer in self.model.layers)

    @cached_property
    def itemsize(self) -> int:
        return int(getattr(torch, self.model.dtype).itemsize)

    @property
    def codes(self) -> int:
        """Of what is kept of every prunable weight besides."""
        return self.work.per_weight * self.prunable

    @property
    def written(self) -> int:
        """Of files that are written in any case."""
        return self.work.disk + (self.statistics(self.work.dense) if self.work.cached else 0)

    def statistics(self, names: Collection[str]) -> int:
        """Of statistics of all layers, as they are kept."""
        return self._statistics(names, self.model.layers, self.work.dtype)

    def block_statistics(self, names: Collection[str]) -> int:
        """The same of the block that has most."""
        return max(self._statistics(names, block.layers, self.work.dtype) for block in self.model.blocks)

    def block_accumulators(self, names: Collection[str]) -> int:
        """Of that block's statistics while they are collected."""
        return max(self._statistics(_accumulated(names), block.layers) for block in self.model.blocks)

    def _statistics(self, names: Collection[str], layers: Collection[Any], dtype: torch.dtype | None = None) -> int:
        return estimate_bytes(layers, names, dtype)

    def states(self, tokens: int) -> int:
        """Of hidden states."""
        width = self.model.module.get_input_embeddings().weight.shape[1]
        return int(tokens * width * self.itemsize)

    @cached_property
    def inputs(self) -> int:
        """Of what a block's layers read of the calibration windows in the dense model, and of what the block gives.

        Three places at most have the width of the hidden states: attention, its output, and the MLP.
        """
        if CROSS not in self.work.block:
            return 0
        hidden = self.states(1) // self.itemsize
        wide = [[layer.weight.shape[1] for layer in block.layers] for block in self.model.blocks]
        most = max(
            sum(one for one in widths if one != hidden) + hidden * min(3, widths.count(hidden)) for widths in wide
        )
        return self.states(self.work.calibration // 2) + self.work.calibration // 2 * most * self.itemsize

    @cached_property
    def per_rule(self) -> int:
        """Of what a pruned model has of its own on its way."""
        return self.states(self.work.rule_tokens or self.work.calibration + self.work.texts) + self.block

    @cached_property
    def hidden(self) -> int:
        """Of all windows on their way: what the first block reads, and what one pruned model makes of it."""
        return self.states(self.work.calibration + self.work.texts) + self.per_rule

    @cached_property
    def _features(self) -> int:
        """Outputs of a block's linear layers for one token, whether they are pruned or not."""
        return max(
            sum(
                one.weight.shape[1 if isinstance(one, Conv1D) else 0]
                for one in block.module.modules()
                if isinstance(one, (nn.Linear, Conv1D))
            )
            for block in self.model.blocks
        )

    @cached_property
    def activations(self) -> int:
        """Of a batch inside a block, without gradients."""
        return int(max(BATCH_TOKENS, self.work.length) * self._features * self.itemsize)

    @cached_property
    def graph(self) -> int:
        """Of a window inside a block, as its backward pass needs it."""
        return int(3 * self.work.length * self._features * self.itemsize)

    @cached_property
    def logits(self) -> int:
        """Of a batch's predictions: logits, their log-softmax, and what is computed of it."""
        entries = max(self.work.length, BATCH_TOKENS) * self.model.vocabulary
        return 3 * 4 * max(1, min(logits_at_once(self.model), entries))

    @cached_property
    def workspace(self) -> int:
        """Of choosing masks and solving: copies of one weight, and of its inputs' products."""
        inputs = 4 * max(layer.weight.shape[1] for layer in self.model.layers) ** 2
        pairs = {"D", GRAM} & (self.work.block | self.work.dense)
        copies = 4 + 7 * (self.work.solved - 1) if self.work.solves else 0
        solving = (4 + copies) * self.widest + (4 * inputs if pairs else 0)
        if not self.work.permutes:
            return solving
        names = _accumulated(self.work.block | self.work.dense)
        return solving + self.widest + max(self._statistics(names, [layer]) for layer in self.model.layers)

    def seconds(self, plan: Plan) -> float:
        """Of the passes, by the speed of one product of matrices here, and of reading weights where they are read."""
        work, model = self.work, self.model
        assert model.placement is not None
        again = 1 if plan.kept else 2
        tokens = work.forward + (2 + again) * work.backward
        inside = sum(weight.numel() for block in model.blocks for weight in block.module.parameters())
        flops = 2 * tokens * (inside + model.vocabulary * self.states(1) // self.itemsize)
        walks = -(-work.rules // plan.together) + 3
        read = 0.0 if plan.resident else walks * model.placement.total_bytes / _READ
        return float(flops / _speed(model.device, getattr(torch, model.dtype)) + read)


def _accumulated(names: Collection[str]) -> frozenset[str]:
    """Statistics with what they are made of: D is read off the Gram matrix."""
    pairs = any(name in OPERANDS and OPERANDS[name].source == "gram" for name in names)
    return frozenset(names) | ({GRAM} if pairs else frozenset())


@cache
def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of matrices, measured in a tenth of a second, once in a process."""
    size = 1024 if device.type == "cpu" else 8192
    first = torch.ones(size, size, device=device, dtype=dtype)
    done, start = 0, time.perf_counter()
    while done < 2 or time.perf_counter() - start < 0.1:
        first @ first
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 2 * size**3 * done / (time.perf_counter() - start)
