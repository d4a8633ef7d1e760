"""Kernels compiled for sm_80 and sm_90 without a GPU, within budgets; `test_kernels.py` runs this file on its own.

Registers and stack are read off the cubin by the cuobjdump that ships with Triton; what spills is on the stack. Where
formulas are compiled, the variants of a kernel (dtypes, mask bits, 32 or 64 bits, odd widths) take turns.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from gpmetric.codegen.loading import load_functions, load_remaining_score
from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.kernels import launch, layer, layers, pattern, reduce, rows, solver
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.operands import OPERANDS

pytestmark = [
    pytest.mark.aot,
    # Triton's own, of Python 3.13, which it would make a failed compilation of
    pytest.mark.filterwarnings("ignore:AnnAssign.__init__ missing 1 required positional argument:DeprecationWarning"),
]

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = [80, 90]
ALONE = 11  # random formulas on their own
TOGETHER = 8  # random formulas of one score
DTYPES = ["bf16", "fp16", "fp32"]
WANDA = launch.Layout(columns=("X",))
TYPES = {  # what is no operand, as the launchers give it
    **dict.fromkeys(("which", "n_in", "n_out", "removed", "count", "room", "share"), "i32"),
    "total": "i64",
    **dict.fromkeys(("BAD", "PLACES", "COUNTS", "CHOSEN", "BEFORE"), "*i64"),
    **dict.fromkeys(("KEYS", "BOUNDS", "TIES"), "*i32"),
    **dict.fromkeys(("first", "size", "copies", "next_kept"), "i32"),
    **dict.fromkeys(("next_removed",), "i64"),
    **dict.fromkeys(("QUOTA", "EXTREMES", "ENDS"), "*i32"),
    **dict.fromkeys(("TABLE", "PICKS"), "*i64"),
    **dict.fromkeys(("REMOVED", "SHARES"), "*fp32"),
    **dict.fromkeys(("KEPT",), "*u8"),
    **dict.fromkeys(("SUM", "LOW", "HIGH", "PART", "mean", "reach"), "*fp32"),
}
# Compiled anew where 16 divides them, or where they are 1
SIZES = ("n_in", "n_out", "total", "count", "share", "first", "next_kept", "next_removed")

counted: Counter[tuple[str, int]] = Counter()  # (kernel, capability) -> compilations
seen: set[str] = set()


class Usage(NamedTuple):
    """Registers of a thread, and bytes of stack of a thread and of shared memory of a program."""

    registers: int
    stack: int
    shared: int


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache: a kernel found in one would not be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TRITON_ALWAYS_COMPILE", raising=False)
        yield


def types_of(layout: launch.Layout, weight: str = "bf16", matrix: str = "bf16") -> dict[str, Any]:
    """The signature of a kernel with the operands of some formulas; vectors are fp32."""
    return TYPES | {
        "W": f"*{weight}",
        "OUT": f"*{weight}",
        "matrices": (f"*{matrix}",) * len(layout.matrices),
        "columns": ("*fp32",) * (len(layout.columns) + layout.sums),
        "rows": ("*fp32",) * layout.rows,
        "numbers": ("*fp32",) * layout.numbers,
    }


def compiled(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    warps: int,
    capability: int,
    path: Path,
    odd: bool = False,
    registers: int | None = None,
) -> Usage:
    """What a compiled kernel takes, its pointers divisible by 16, its sizes too unless `odd`; `registers` at most."""
    if constants.get("BITS"):
        types = types | {"OUT": "*u8"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for place, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            spots = [(place, index) for index in range(len(kind)) if name != "numbers"]
        else:
            spots = [(place,)] if kind.startswith("*") or (kind != "constexpr" and name in SIZES and not odd) else []
        aligned |= {spot: [["tt.divisibility", 16]] for spot in spots}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": False}
    built = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in built.asm["ptx"]
    assert built.metadata.hash not in seen, "compiled before: what a test asks for twice tells nothing"
    seen.add(built.metadata.hash)
    counted[kernel.fn.__name__, capability] += 1
    cubin = path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)}
    return Usage(found["REG"], found["STACK"], built.metadata.shared)


def within(usage: Usage, registers: int = 208, stack: int = 32, shared: int = 16 * 1024) -> None:
    """Every budget at once, of Triton 3.6 to 3.9; a few bytes of stack may be the frame of a call, as of a division."""
    budget = Usage(registers, stack, shared)
    assert all(taken <= most for taken, most in zip(usage, budget, strict=True)), f"{usage} exceeds {budget}"


def random_formulas() -> list[str]:
    variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, random.Random(0))
    return [str(variation.random_expression()) for _ in range(ALONE + TOGETHER)]


BASELINE_FORMULAS = list(dict.fromkeys(str(resolve_metric(name, 128, 2048).expression) for name in BASELINES))
FORMULAS = [*BASELINE_FORMULAS, *random_formulas()[:ALONE]]


WIDE = [(width, formula, False) for width in (1024, 4096, 8192, 11008) for formula in ("abs(W)*X", "W*W*G")]
WIDE += [(8192, "W*W*G", True), (11008, "abs(W)*X", True), (28672, "W*W*G", False)]


@pytest.mark.parametrize("number", range(len(WIDE)), ids=map(str, WIDE))
def test_rows_stay_in_registers(number: int, tmp_path: Path) -> None:
    """With and without gradients, at the widths of Llama-2-7B and 70B; 28,672 columns may spill a little.

    Architectures in turn.
    """
    (width, formula, bits), capability = WIDE[number], TARGETS[(number + number // 2) % 2]
    functions = load_functions([parse(formula)], tmp_path)
    block, chunks, warps, registers = rows._plan(width)
    constants = {"SCORE": functions.score, "BITS": bits, "BLOCK": block, "CHUNKS": chunks}
    types = types_of(functions.LAYOUT)
    usage = compiled(rows._prune_rows, types, constants, warps, capability, tmp_path, registers=registers)
    within(usage, registers, 192 if width > 16384 else 64, 1024)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("keep", "group"), [(1, 2), (2, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize(("formula", "bits"), [("abs(W)*X", False), ("W*W*G", True)])
def test_patterns_take_few_registers(
    formula: str, bits: bool, keep: int, group: int, capability: int, tmp_path: Path
) -> None:
    functions = load_functions([parse(formula)], tmp_path)
    constants = {"SCORE": functions.score, "BITS": bits, "REMOVED": group - keep, "GROUP": group, "BLOCK": 2048}
    usage = compiled(pattern._prune_pattern, types_of(functions.LAYOUT), constants, 4, capability, tmp_path)
    within(usage, 64, 32, 4096)


@pytest.mark.parametrize("number", range(len(FORMULAS)), ids=FORMULAS)
def test_formulas_compile_into_every_kernel(number: int, tmp_path: Path) -> None:
    """Architectures in turn, as dtypes are."""
    capability = TARGETS[number // 2 % 2]
    functions = load_functions([parse(FORMULAS[number])], tmp_path)
    types = types_of(functions.LAYOUT, DTYPES[number % 3], DTYPES[number % 2 * 2])
    types["total"] = ("i64", "i32")[number // 4 % 2]
    bits, odd, group = number % 4 == 1, number % 4 == 2, (4, 2, 8)[number % 3]

    block, chunks, warps, registers = rows._plan(4096)
    constants = {"SCORE": functions.score, "BITS": bits, "BLOCK": block, "CHUNKS": chunks}
    within(compiled(rows._prune_rows, types, constants, warps, capability, tmp_path, odd, registers), registers, 448)
    constants = {"SCORE": functions.score, "BITS": not bits, "REMOVED": group // 2, "GROUP": group, "BLOCK": 2048}
    within(compiled(pattern._prune_pattern, types, constants, 4, capability, tmp_path, odd))
    constants = {"SCORE": functions.score, "BITS": bits, "RANKED": number % 5 > 1, "TILE": 2048}
    within(compiled(layer._apply, types, constants, 4, capability, tmp_path, odd))


@pytest.mark.parametrize("capability", TARGETS)
def test_formulas_together(capability: int, tmp_path: Path) -> None:
    """As many as share a compilation, in every kind of kernel that computes a score or a part of one."""
    functions = load_functions([parse(formula) for formula in random_formulas()[ALONE:]], tmp_path)
    types, score, part = types_of(functions.LAYOUT), {"SCORE": functions.score}, {"SCORE": functions.part}
    assert len({which for steps in functions.LAYOUT.steps for which, _, _ in steps}) > 1
    for kernel, warps, constants in [
        (rows._prune_rows, 8, score | {"BITS": True, "BLOCK": 2048, "CHUNKS": 2}),
        (pattern._prune_pattern, 4, score | {"BITS": True, "REMOVED": 2, "GROUP": 4, "BLOCK": 2048}),
        (layer._gather, 4, score | {"TILE": 2048}),
        (layer._apply, 4, score | {"BITS": True, "RANKED": True, "TILE": 2048}),
        (reduce._reduce_rows, 4, part | {"SQUARES": False, "BLOCK": 1024}),
        (reduce._reduce_rows, 4, part | {"SQUARES": True, "BLOCK": 1024}),
        (reduce._sum_columns, 4, part | {"BLOCK": 256}),
    ]:
        within(compiled(kernel, types, constants, warps, capability, tmp_path))


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("total", ["i32", "i64"])
def test_passes_over_a_layer(total: str, capability: int, tmp_path: Path) -> None:
    types = types_of(WANDA, {"i32": "fp32", "i64": "bf16"}[total]) | {"total": total}
    constants = {"SCORE": launch.wanda, "TILE": 2048}
    kernels = [layer._gather, layer._count_ties] + ([layer._sample] if total == "i64" else [])
    for kernel in kernels:
        within(compiled(kernel, types, constants, 4, capability, tmp_path))
    for ranked in (False, True):
        usage = compiled(layer._apply, types, constants | {"BITS": False, "RANKED": ranked}, 4, capability, tmp_path)
        within(usage)


@pytest.mark.parametrize("capability", TARGETS)
def test_the_key_is_picked_by_one_program(capability: int, tmp_path: Path) -> None:
    for total in ("i32", "i64"):
        types = TYPES | {"total": total, "removed": total}
        within(compiled(layer._pick, types, {"PICKED": layer.PICKED}, 16, capability, tmp_path), 128)


@pytest.mark.parametrize("capability", TARGETS)
def test_many_weights_in_one_launch(capability: int, tmp_path: Path) -> None:
    """Their pointers come from a table; what they point at is read and written by 16 bytes all the same."""
    types = types_of(WANDA) | {"KEYS": "*i32", "place": "i32"}
    score = {"SCORE": launch.wanda}
    plan = rows._plan(1024)
    held = {"BITS": False, "BLOCK": plan.block, "CHUNKS": plan.chunks}
    for kernel, constants, warps, most in (
        (rows._prune_rows_together, score | held, plan.warps, plan.registers),
        (pattern._prune_pattern_together, score | {"BITS": False, "GROUP": 4, "BLOCK": 1024}, 4, None),
        (layers._write_keys, score | {"TILE": 2048}, 4, None),
    ):
        within(compiled(kernel, types, constants, warps, capability, tmp_path, registers=most), 80)
    for bits in (False, True):
        its = types | {"numbers": ("*i32",)}
        within(compiled(layers._mask_many, its, {"BITS": bits, "TILE": 2048}, 4, capability, tmp_path), 80)
    within(compiled(layers._pick_many, types, {"PICKED": layer.PICKED}, 16, capability, tmp_path), 128)


REMAINING = [  # tokens of a formula, where its parts without W are, and an M
    (("mul", "abs", "W", "part0"), {"part0": "columns"}, 2),
    (
        ("div", "mul", "pow", "W", "part0", "part1", "part2"),
        {"part0": "numbers", "part1": "matrices", "part2": "rows"},
        8,
    ),
]


@pytest.mark.parametrize("capability", TARGETS)
def test_the_solver(capability: int, tmp_path: Path) -> None:
    """Given masks, thresholds, and N:M, of scores that read each kind of operand."""
    solving = {"ROWS": solver._ROWS, "PART": solver._PART}
    scoring = {"ROWS": solver._ROWS, "BLOCK": solver.COLUMNS}
    types = TYPES | {"W": "*fp32", "matrices": (), "columns": (), "rows": (), "numbers": (), "total": "i32"}
    for rule in ("Given", "Threshold"):
        constants = solving | {"SCORE": None, "RULE": rule, "STEP": solver._STEP}
        within(compiled(solver._remove, types, constants, 1, capability, tmp_path), 255)
    one = {"SCORE": None, "RULE": "Given", "STEP": solver._STEP, "copies": 1, "n_out": 1, "n_in": 1}
    within(compiled(solver._remove, types, solving | one, 1, capability, tmp_path, odd=True), 255)
    within(compiled(solver._pick_block, types, {"PICKED": layer.PICKED}, 16, capability, tmp_path), 128)
    for tokens, fields, group in REMAINING:
        score = {"SCORE": load_remaining_score(tokens, fields).score}
        its = types | dict.fromkeys(fields.values(), ("*fp32",))
        within(compiled(solver._score_block, its, scoring | score, 8, capability, tmp_path), 128)
        constants = solving | score | {"RULE": "Pattern", "STEP": group if capability == 80 else 4}
        within(compiled(solver._remove, its, constants, 1, capability, tmp_path), 255, 128)


@pytest.mark.parametrize("capability", TARGETS)
def test_reductions(capability: int, tmp_path: Path) -> None:
    for squares in (False, True):
        constants = {"SCORE": launch.wanda, "SQUARES": squares, "BLOCK": 1024}
        within(compiled(reduce._reduce_rows, types_of(WANDA), constants, 4, capability, tmp_path))
    constants = {"SCORE": launch.wanda, "BLOCK": 256}
    within(compiled(reduce._sum_columns, types_of(WANDA), constants, 4, capability, tmp_path))


@pytest.mark.parametrize("capability", TARGETS)
def test_small_matrices(capability: int, tmp_path: Path) -> None:
    """Few columns, and sizes of 1, which Triton compiles in as constants."""
    types, score = types_of(WANDA) | {"total": "i32"}, {"SCORE": launch.wanda}
    one, whole = {"n_in": 1}, {"n_in": 1, "n_out": 1, "share": 1}
    for kernel, constants in [
        (rows._prune_rows, {"BITS": True, "BLOCK": 16, "CHUNKS": 1}),
        (pattern._prune_pattern, {"BITS": True, "REMOVED": 1, "GROUP": 2, "BLOCK": 128}),
        (layer._sample, one | {"TILE": 2048}),
        (layer._gather, one | {"TILE": 2048}),
        (layer._count_ties, one | {"TILE": 2048}),
        (layer._apply, one | {"BITS": True, "RANKED": True, "TILE": 2048}),
        (reduce._reduce_rows, one | {"SQUARES": True, "BLOCK": 1}),
        (reduce._sum_columns, whole | {"BLOCK": 1}),
    ]:
        within(compiled(kernel, types, score | constants, 4, capability, tmp_path, odd=True))


def test_enough_was_compiled() -> None:
    """The last test: at least 140 different compilations, spread over the kernels and both architectures."""
    print(*sorted(counted.items()), sep="\n")
    assert sum(counted.values()) >= 140
    for capability in TARGETS:
        for kernel in ("_prune_rows", "_prune_pattern", "_apply"):
            assert counted[kernel, capability] >= 15
        assert counted["_remove", capability] >= 4
        for kernel in ("_prune_rows_together", "_prune_pattern_together", "_write_keys", "_pick_many", "_mask_many"):
            assert counted[kernel, capability] >= 1
        for kernel in ("_score_block", "_pick_block"):
            assert counted[kernel, capability] >= 1
        for kernel in ("_sample", "_gather", "_pick", "_count_ties", "_reduce_rows", "_sum_columns"):
            assert counted[kernel, capability] >= 2
