"""Kernels compiled for sm_80 and sm_90 without a GPU, within budgets; `test_kernels.py` runs this file on its own.

Registers and stack are read off the cubin by the cuobjdump that ships with Triton.
"""

from __future__ import annotations

import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from gpmetric.evolution.variation import Variation
from gpmetric.export.triton import load_functions
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.kernels import launch, layer, pattern, reduce, rows
from gpmetric.operands import OPERANDS
from gpmetric.pruning.metrics import BASELINES, resolve_metric

pytestmark = pytest.mark.aot

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = [80, 90]
RANDOM = 20


def compiled(kernel: Any, types: dict[str, Any], constants: dict[str, Any], capability: int, warps: int, path: Path):
    """(registers, bytes of stack, bytes of shared memory) of a kernel."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for place, kind in enumerate(signature.values()):
        inner = [(place, index) for index in range(len(kind))] if isinstance(kind, tuple) else []
        whole = [(place,)] if not isinstance(kind, tuple) and kind.startswith("*") else []
        aligned |= {spot: [["tt.divisibility", 16]] for spot in inner + whole}
    if "n_in" in signature:
        aligned[(list(signature).index("n_in"),)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in built.asm["ptx"]
    cubin = path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)}
    return found["REG"], found["STACK"], built.metadata.shared


def types_of(layout: reduce.Layout) -> dict[str, Any]:
    """Signature of the operands of a formula: bf16 matrices, fp32 vectors."""
    return {
        "W": "*bf16",
        "OUT": "*bf16",
        "BAD": "*i64",
        "matrices": ("*bf16",) * len(layout.matrices),
        "columns": ("*fp32",) * (len(layout.columns) + layout.sums),
        "rows": ("*fp32",) * layout.rows,
        "numbers": ("*fp32",) * layout.numbers,
        "which": "i32",
        "n_in": "i32",
    }


def random_formulas() -> list[str]:
    variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, random.Random(0))
    return [str(variation.random_expression()) for _ in range(RANDOM)]


BASELINE_FORMULAS = [str(resolve_metric(name, 128, 2048).expression) for name in BASELINES]


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("width", [1024, 4096, 8192, 11008, 28672])
@pytest.mark.parametrize("gradients", [False, True])
def test_rows_stay_in_registers(width: int, gradients: bool, capability: int, tmp_path: Path) -> None:
    """With and without gradients, at the widths of Llama-2-7B and 70B; 28,672 columns may spill a little."""
    formula = "W*W*G" if gradients else "abs(W)*X"
    functions = load_functions([parse(formula)], tmp_path)
    block, chunks, warps = rows._plan(width)
    types = types_of(functions.LAYOUT) | {"removed": "i32"}
    constants = {"SCORE": functions.score, "BITS": False, "BLOCK": block, "CHUNKS": chunks}
    registers, stack, shared = compiled(rows._prune_rows, types, constants, capability, warps, tmp_path)
    assert registers * warps * 32 <= 65536
    assert stack <= (128 if width > 16384 else 32)
    assert shared <= 48 * 1024


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("formula", ["abs(W)*X", "W*W*G"])
def test_patterns_take_few_registers(formula: str, keep: int, group: int, capability: int, tmp_path: Path) -> None:
    functions = load_functions([parse(formula)], tmp_path)
    constants = {"SCORE": functions.score, "BITS": False, "REMOVED": group - keep, "GROUP": group, "BLOCK": 2048}
    types = types_of(functions.LAYOUT)
    registers, stack, shared = compiled(pattern._prune_pattern, types, constants, capability, 4, tmp_path)
    assert registers <= 64
    assert stack <= (32 if group == 16 else 0)
    assert shared <= 2048


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("formula", [*BASELINE_FORMULAS, *random_formulas()])
def test_formulas_compile_into_every_kernel(formula: str, capability: int, tmp_path: Path) -> None:
    functions = load_functions([parse(formula)], tmp_path)
    types = types_of(functions.LAYOUT)
    constants = {"SCORE": functions.score, "BITS": False, "BLOCK": 4096, "CHUNKS": 1}
    registers, stack, _ = compiled(rows._prune_rows, types | {"removed": "i32"}, constants, capability, 8, tmp_path)
    assert registers <= 255
    assert stack <= 64
    constants = {"SCORE": functions.score, "BITS": False, "REMOVED": 2, "GROUP": 4, "BLOCK": 2048}
    compiled(pattern._prune_pattern, types, constants, capability, 4, tmp_path)
    scalars = {"total": "i64", "threshold": "i32", "ties": "i32"}
    constants = {"SCORE": functions.score, "BITS": False, "RANKED": True, "TILE": 2048}
    compiled(layer._apply, types | scalars | {"BEFORE": "*i64"}, constants, capability, 4, tmp_path)


@pytest.mark.parametrize("capability", TARGETS)
def test_the_other_kernels_compile(capability: int, tmp_path: Path) -> None:
    types = {"W": "*bf16", "matrices": (), "columns": ("*fp32",), "rows": (), "numbers": (), "n_in": "i32"}
    types |= {"which": "i32"}
    types |= {"total": "i64", "count": "i32", "room": "i32", "low": "i32", "high": "i32", "threshold": "i32"}
    types |= {"KEYS": "*i32", "PLACES": "*i64", "FOUND": "*i32", "COUNTS": "*i64", "TIES": "*i32"}
    types |= {"SUM": "*fp32", "LOW": "*fp32", "HIGH": "*fp32", "PART": "*fp32", "mean": "*fp32", "reach": "*fp32"}
    types |= {"n_out": "i32", "share": "i32"}
    for kernel in (layer._sample, layer._gather, layer._count_ties):
        compiled(kernel, types, {"SCORE": launch.wanda, "TILE": 2048}, capability, 4, tmp_path)
    for squares in (False, True):
        constants = {"SCORE": launch.wanda, "SQUARES": squares, "BLOCK": 1024}
        compiled(reduce._reduce_rows, types, constants, capability, 4, tmp_path)
    compiled(reduce._sum_columns, types, {"SCORE": launch.wanda, "BLOCK": 256}, capability, 4, tmp_path)
