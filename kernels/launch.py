"""What every kernel here shares: how a score reads its operands, and what a launcher checks and makes before it starts.

A score is a jit function like `wanda`: of weights in fp32, the pointers of each field of `Operands`, the place that it
is to read them at, and the number of the formula where it holds several. It gives fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Job",
    "Layout",
    "Operands",
    "check",
    "from_column",
    "from_matrix",
    "from_number",
    "from_row",
    "gathered",
    "on",
    "outputs",
    "pieces",
    "processors",
    "scored",
    "sent",
    "table",
    "together",
    "told",
    "wanda",
    "weight_itself",
]


class Operands(NamedTuple):
    """What a score reads besides the weight [out, in]; contiguous, fp32, bf16 or fp16, on the weight's device.

    Attributes:
        matrices: [out, in] each.
        columns: [in] each.
        rows: [out] each.
        numbers: [1] each.
        which: the number of the formula, for a score that holds several.
    """

    matrices: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = ()
    numbers: tuple[Tensor, ...] = ()
    which: int = 0


class Layout(NamedTuple):
    """Which operands some formulas need, and which reductions are computed before a score (`reduce.prepare`).

    Attributes:
        matrices, columns: names of those operands, in their order among `Operands`.
        rows, sums, numbers: how many vectors [out] and [in] and numbers the reductions result in; the vectors [in]
            follow the columns.
        part: a score whose formulas are what the reductions go over, squared already for a norm.
        steps: for each formula, in order, (`which` of the part, reduction, place among the rows, the columns or the
            numbers); the first place where a reduction has several results.
    """

    matrices: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: int = 0
    sums: int = 0
    numbers: int = 0
    part: triton.JITFunction | None = None
    steps: tuple[tuple[tuple[int, str, int], ...], ...] = ()


class Job(NamedTuple):
    """One of several weights that a launch prunes; tensors are as for a launch of its own, all of them given.

    Attributes:
        weight: [out, in].
        out: what is written to.
        bad: [1], int64.
        removed: how many entries go of what competes.
        operands: of the weight.
    """

    weight: Tensor
    out: Tensor
    bad: Tensor
    removed: int
    operands: Operands

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, the operands' last."""
        return (self.weight, self.out, self.bad, *(one for field in self.operands[:4] for one in field))

    @property
    def kind(self) -> tuple[object, ...]:
        """What those have in common that a launch can take."""
        return self.weight.shape[1], self.operands.which, self.weight.device, *(one.dtype for one in self.tensors)


def together(jobs: Sequence[Job]) -> list[list[int]]:
    """The places of jobs that a launch each can take."""
    found: dict[object, list[int]] = {}
    for place, job in enumerate(jobs):
        aligned = all(one.data_ptr() % 16 == 0 for one in job.tensors)
        found.setdefault(job.kind if aligned else place, []).append(place)
    return list(found.values())


def table(jobs: Sequence[Job], programs: int, tile: int = 0) -> tuple[Tensor, int]:
    """What tells each program of a launch its rows, int64, one number after the other; and how many programs.

    For every program: where its job's numbers are here, its first row, and how many rows on its next one is. Then for
    every job: how many rows there are, `removed`, its place, and the addresses of `Job.tensors`.

    Args:
        programs: that are to share the rows evenly; each job has one at least, and no more than it has rows.
        tile: entries that are taken in place of a row; then the rows of the weight stand where `removed` does.
    """
    heights = [-(-job.weight.numel() // tile) if tile else job.weight.shape[0] for job in jobs]
    shares = [min(height, max(1, programs * height // sum(heights))) for height in heights]
    begin, fields = 3 * sum(shares), 3 + len(jobs[0].tensors)
    numbers = [
        number
        for place, share in enumerate(shares)
        for first in range(share)
        for number in (begin + place * fields, first, share)
    ]
    for place, (job, height) in enumerate(zip(jobs, heights, strict=True)):
        number = job.weight.shape[0] if tile else job.removed
        numbers += [height, number, place, *(one.data_ptr() for one in job.tensors)]
    return sent(torch.tensor(numbers), jobs[0].weight.device), sum(shares)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, from pinned memory, so that the host need not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def processors(weight: Tensor) -> int:
    """Multiprocessors of the CUDA device that it is on."""
    count: int = torch.cuda.get_device_properties(weight.device).multi_processor_count
    return count


def gathered(weight: Tensor, named: Mapping[str, Tensor | None], layout: Layout) -> Operands:
    """The operands of a score; what its reductions result in is made, but not computed.

    Args:
        weight: [out, in].
        named: operands by name, of any float dtype, those that the layout names at least.
        layout: of the formulas.

    Raises:
        ValueError: an operand is missing or has another shape.
    """

    def given(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = named.get(name)
        if tensor is None:
            raise ValueError(f"this metric needs the operand {name}, {list(shape)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"operand {name} must be {list(shape)} to go with W, but got {list(tensor.shape)}")
        kept = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return tensor.detach().to(weight.device, None if kept else torch.float32).contiguous()

    def empty(count: int, size: int) -> tuple[Tensor, ...]:
        aligned = -(-size // 4) * 4  # at 16 bytes each, as `together` wants them
        return torch.empty(count, aligned, dtype=torch.float32, device=weight.device)[:, :size].unbind()

    height, width = weight.shape
    return Operands(
        tuple(given(name, (height, width)) for name in layout.matrices),
        tuple(given(name, (width,)) for name in layout.columns) + empty(layout.sums, width),
        empty(layout.rows, height),
        empty(layout.numbers, 1),
    )


def outputs(
    weight: Tensor, operands: Operands, out: Tensor | None, bits: tuple[int, ...] | None, bad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a launcher writes to, (`out`, or the mask of shape `bits`; `bad`), made where it is not given.

    Raises:
        ValueError: as `check`.
    """
    check(weight, operands, None if bits is not None else out)
    if out is None:
        out = torch.empty_like(weight) if bits is None else torch.empty(bits, dtype=torch.uint8, device=weight.device)
    elif bits is not None and (out.shape != bits or out.dtype != torch.uint8 or not out.is_contiguous()):
        raise ValueError(
            f"out must be uint8 {list(bits)} where bits are asked for, but got {out.dtype} {list(out.shape)}"
        )
    return out, torch.zeros(1, dtype=torch.int64, device=weight.device) if bad is None else bad


def check(weight: Tensor, operands: Operands, out: Tensor | None = None) -> None:
    """Refuses what the kernels, which go by bare pointers, would read or write wrongly.

    Raises:
        ValueError: naming the tensor and what it must be.
    """
    if weight.device.type != "cuda" and isinstance(scored, triton.JITFunction):
        raise ValueError(f"weight must be on a CUDA device, but is on {weight.device} (TRITON_INTERPRET=1 runs there)")
    height, width = weight.shape
    wanted = {"matrices": (height, width), "columns": (width,), "rows": (height,), "numbers": (1,)}
    tensors = [("weight", weight, (height, width))]
    tensors += [(field, one, shape) for field, shape in wanted.items() for one in getattr(operands, field)]
    tensors += [] if out is None else [("out", out, (height, width))]
    for name, tensor, shape in tensors:
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != weight.device:
            raise ValueError(
                f"{name} must be contiguous, {list(shape)}, on {weight.device}, but got {list(tensor.shape)} with "
                f"strides {tensor.stride()} on {tensor.device}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, but got {tensor.dtype}")
    if out is not None and out.dtype != weight.dtype:
        raise ValueError(f"out must be {weight.dtype} as the weight, but got {out.dtype}")


def pieces(weight: Tensor, operands: Operands, width: int) -> list[tuple[Tensor, Operands]]:
    """Copies of each `width` consecutive columns of a weight, the last of them maybe fewer, with their operands."""
    cut = [tensor.split(width, dim=-1) for tensor in (weight, *operands.matrices, *operands.columns)]
    count = len(operands.matrices)
    found = []
    for one, *others in zip(*cut, strict=True):
        its = tuple(other.contiguous() for other in others)
        found.append((one.contiguous(), operands._replace(matrices=its[:count], columns=its[count:])))
    return found


def on(weight: Tensor) -> AbstractContextManager[object]:
    """The weight's device as the current one, which Triton launches on."""
    return torch.cuda.device(weight.device) if weight.device.type == "cuda" else nullcontext()


@triton.jit
def _pointers(place, like):
    """The addresses from a place of a table on, divisible by 16 each, as pointers of the types of others."""
    found = ()
    for i in tl.static_range(len(like)):
        found = found + (tl.multiple_of(tl.load(place + i).to(like[i].dtype), 16),)
    return found


@triton.jit
def told(TABLE, tensors, matrices, columns, rows, numbers):
    """What `table` tells this program: (first row, rows to the next, rows, how many go, place, pointers by kind)."""
    program = TABLE + 3 * tl.program_id(0)
    job = TABLE + tl.load(program)
    first, second = job + 3 + len(tensors), job + 3 + len(tensors) + len(matrices)
    third = second + len(columns)
    pointers = (
        _pointers(job + 3, tensors), _pointers(first, matrices), _pointers(second, columns), _pointers(third, rows),
        _pointers(third + len(rows), numbers),
    )  # fmt: skip
    return (
        tl.load(program + 1).to(tl.int32), tl.load(program + 2).to(tl.int32), tl.load(job).to(tl.int32),
        tl.load(job + 1).to(tl.int32), tl.load(job + 2), pointers,
    )  # fmt: skip


@triton.jit
def from_matrix(pointer, place):
    """What an operand [out, in] has at a place (row, column, row * in + column, inside), in fp32."""
    return tl.load(pointer + place[2], mask=place[3], other=0.0).to(tl.float32)


@triton.jit
def from_column(pointer, place):
    """What an operand [in] has at a place, in fp32."""
    return tl.load(pointer + place[1], mask=place[3], other=0.0).to(tl.float32)


@triton.jit
def from_row(pointer, place):
    """What an operand [out] has at a place, in fp32."""
    return tl.load(pointer + place[0] + place[1] * 0, mask=place[3], other=0.0).to(tl.float32)


@triton.jit
def from_number(pointer, place):
    """What an operand [1] has, in fp32."""
    return tl.load(pointer + place[1] * 0, mask=place[3], other=0.0).to(tl.float32)


@triton.jit
def scored(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE: tl.constexpr):
    """(weights as they are stored, their scores) at some places; `row` may be one number or as many as `column`."""
    place = (row, column, row * n_in + column, inside)
    w = tl.load(W + place[2], mask=inside, other=0.0)
    return w, SCORE(w.to(tl.float32), matrices, columns, rows, numbers, place, which)


@triton.jit
def wanda(w, matrices, columns, rows, numbers, place, which):
    """abs(W)*X, where X is the first of `columns`."""
    return tl.abs(w) * from_column(columns[0], place)


@triton.jit
def weight_itself(w, matrices, columns, rows, numbers, place, which):
    """W, for weights that are scores already."""
    return w
