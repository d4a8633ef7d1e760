"""What a command takes, told beforehand: by hand, by counting for a model of 7B, and against what processes took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric import cli, prune
from gpmetric.blocks import find_blocks
from gpmetric.calibration.cache import cache_key, estimate_bytes
from gpmetric.commands import COMMANDS
from gpmetric.data import Text, Windows
from gpmetric.errors import InputError, OutOfMemoryError, TimeOverError
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model, find_parts
from gpmetric.operands import OPERANDS
from gpmetric.options import described, make_request
from gpmetric.placement import Placement
from gpmetric.pruning import prune as pruning
from gpmetric.pruning import verify as verifying
from gpmetric.pruning.bench import bench, first_failure
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.requests import VerifyRequest
from gpmetric.pruning.verify import run_verify, verify
from gpmetric.session import memory, plan
from gpmetric.session import session as session_module
from gpmetric.session.deadline import Deadline
from gpmetric.session.listeners import Listener
from gpmetric.session.memory import LEVERS, retried
from gpmetric.session.plan import Plan, make_plan
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work
from gpmetric.targets import parse_target

WORKING = {name: row for name, row in COMMANDS.items() if row.work is not None}
WRITING = dict.fromkeys(("calibrate", "prune", "slim", "tune"), ("-o", "out"))
COMPUTED = ("memory_bytes", "host_bytes", "disk_bytes", "seconds")
GB = 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's speed that need not be measured."""
    monkeypatch.setattr(plan, "_speed", lambda device, dtype: 1e12)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return load_model(str(tiny_llama), device="cpu")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes nothing yet."""
    monkeypatch.setattr(plan, "resident_bytes", lambda device=None: 0)


# The ways


WORK = Work(dense=frozenset({"X", "G"}), block=frozenset({"X"}), length=32, calibration=6400, backward=6400, texts=320)


def room_for(size: int) -> int:
    """A limit that leaves so much."""
    return int(size / (1 - plan._MARGIN)) + 2


def least(model: Model, work: Work, *, resident: bool, kept: bool) -> int:
    sizes = plan._Sizes(model, work)
    moving = sizes.moving(resident=resident, kept=kept) if kept else 0
    return sizes.device(resident=resident, kept=kept) + moving


def test_the_fastest_way_that_there_is_room_for(llama: Model, bare: None) -> None:
    """Everything on the device, then the weights alone, then nothing, each down to the last bytes that it needs."""
    whole, alone = (least(llama, WORK, resident=True, kept=kept) for kept in (True, False))
    block = least(llama, WORK, resident=False, kept=False)
    assert whole > alone > block
    for limit, resident, kept in (
        (10**12, True, True), (room_for(whole), True, True), (room_for(whole) - 4, True, False),
        (room_for(alone), True, False), (room_for(alone) - 4, False, False), (room_for(block), False, False),
    ):  # fmt: skip
        found = make_plan(llama, WORK, limit)
        assert (found.resident, found.kept) == (resident, kept), limit
        assert found.memory_bytes <= limit
        assert found.memory_bytes == found.host_bytes or resident
        assert (found.disk_bytes > 0) is (not kept)
        assert (found.room is None) is kept
    with pytest.raises(InputError) as caught:
        make_plan(llama, WORK, room_for(block) - 4)
    assert str(caught.value) == (
        f"{llama.name!r} needs at least {block / 1e9:.3g} GB here, of {block / 1e9:.3g} GB allowed by --memory: "
        "allow more, take a shorter --sequence-length, metrics of fewer operands, or --dtype bfloat16"
    )


def test_without_a_limit_it_is_what_is_free(llama: Model, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = least(llama, WORK, resident=True, kept=True)
    for free, resident in ((room_for(whole), True), (room_for(least(llama, WORK, resident=False, kept=False)), False)):
        monkeypatch.setattr(plan, "free_device", lambda device, free=free: free)
        assert make_plan(llama, WORK, None).resident is resident
    monkeypatch.setattr(plan, "free_device", lambda device: 1000)
    with pytest.raises(InputError, match=r"GB here, of 9\.2e-07 GB free: allow more"):
        make_plan(llama, WORK, None)


def test_a_model_that_must_be_resident_or_must_not(llama: Model, bare: None) -> None:
    assert not make_plan(llama, replace(WORK, resident=False), 10**12).resident
    whole = least(llama, WORK, resident=True, kept=True)
    assert make_plan(llama, replace(WORK, resident=True), room_for(whole)).resident
    with pytest.raises(InputError, match=f"needs at least {whole / 1e9:.3g} GB here"):
        make_plan(llama, replace(WORK, resident=True), room_for(whole) - 4)


def test_what_has_no_room_goes_to_disk(llama: Model, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that moves is in memory or on disk; with statistics that are kept in a file anyway, that is on disk, too."""
    sizes, limit = plan._Sizes(llama, WORK), room_for(least(llama, WORK, resident=False, kept=False) + 5000)
    found = make_plan(llama, replace(WORK, resident=False, disk=77), limit)
    held = found.memory_bytes - sizes.device(resident=False, kept=False)
    assert 5000 <= held < 5010
    assert found.disk_bytes == sizes.moving(resident=False, kept=False) - held + 77
    cached = replace(WORK, cached=True)
    kept = make_plan(llama, cached, 10**12)
    assert kept.disk_bytes == estimate_bytes(llama.layers, "XG")
    assert kept.memory_bytes == make_plan(llama, WORK, 10**12).memory_bytes
    monkeypatch.setattr(plan, "free_disk", lambda folder: 10)
    with pytest.raises(InputError, match=r"GB of disk in '.*scratch', which has 1e-08 GB: .* XDG_CACHE_HOME$"):
        make_plan(llama, replace(WORK, resident=False), limit)
    assert make_plan(llama, WORK, 10**12).disk_bytes == 0  # where it is not needed, it is not asked for


def test_too_little_memory_is_told_before_a_window_is_read(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "prepare_model", lambda *model, **way: pytest.fail("read"))
    for once in (False, True):
        with pytest.raises(InputError, match=r"needs at least .* GB here, of 9\.2e-06 GB allowed by --memory"):
            bench(str(tiny_llama), text=str(tiny_text), calibration=str(tiny_text), one_shot=once, memory="10kB")


def test_what_is_written_of_a_plan() -> None:
    """Booleans are booleans."""
    told = json.loads(json.dumps(Plan(resident=False, kept=False, room=5).describe()))
    assert told == dict.fromkeys(COMPUTED, 0) | {
        "resident": False,
        "kept": False,
        "room": 5,
        "together": 1,
        "states": True,
        "inputs": True,
        "workers": 1,
        "held_models": 1,
        "aside": False,
    }
    assert (type(told["resident"]), type(told["kept"])) == (bool, bool)


# gpmetric plan


@pytest.mark.parametrize("name", WORKING)
def test_every_command_is_planned_and_nothing_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session_module, "prepare_model", lambda *model, **way: pytest.fail("read"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sys, "argv", ["gpmetric", "plan", name, *WRITING.get(name, ()), "--device", "cpu", "--json", "-"]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    told = json.loads(out)
    assert all(told[key] >= 0 for key in COMPUTED)
    assert told["memory_bytes"] > 0
    assert told["seconds"] > 0
    assert (type(told["resident"]), type(told["kept"])) == (bool, bool)
    assert "needs about" in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "out").exists()


# A model of 7B on a GPU of 80 GB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama of 7B in bfloat16 without a weight, said to be on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        module = LlamaForCausalLM(config).to(torch.bfloat16)
    blocks = find_blocks(module)
    placement = Placement(find_parts(module, blocks), torch.device("cuda"))
    folder = tmp_path_factory.mktemp("7b")
    (folder / "model.safetensors").touch()
    return Model("7b", module, None, blocks, folder, placement)


def plan_of(model: Model, command: str, limit: int = 80 * GB, **options: Any) -> Plan:
    """Of a command on 128 windows of 2,048 tokens."""
    request: Any = make_request(COMMANDS[command].request, options)
    tokens = torch.zeros(1, 2048, dtype=torch.int64)

    def windows(count: int | None) -> Windows:
        return Windows(Text("text", ""), tokens.expand(count or 128, -1))

    asked = request.texts.windows
    splits = {name: windows(asked.get(name)) for name in ("calibration", "search", "validation", "test")}
    work = COMMANDS[command].work
    assert work is not None
    return make_plan(model, work(Session(request, model, splits, [windows(128)])), limit)


FORMULAS = ("abs(W)", "abs(W)*X", "abs(W)*G", "W*W*H", "W*W*D", "W*W*F", "abs(W)*X*G*H*D*F", "sparsegpt")
OPERAND_SETS = (*(tuple(dict.fromkeys(("W", name))) for name in OPERANDS), tuple(OPERANDS))
ASKED: list[tuple[str, dict[str, Any]]] = [
    *(("bench", {"metric": one, "update": update, "one_shot": once})
      for one in FORMULAS for update in ("none", "obs") for once in (False, True)),
    ("bench", {}),
    ("bench", {"one_shot": True}),
    *(("bench", {"metric": "abs(W)*G*H*F", "statistics_dtype": dtype}) for dtype in ("float32", "bfloat16")),
    *(("prune", {"metric": one, "update": "obs", "output": "out"}) for one in FORMULAS),
    *(("discover", {"operands": one, "update": update, "target": ("0.5", "2:4")})
      for one in OPERAND_SETS for update in ("none", "obs")),
    *(("allocate", {"metric": one}) for one in FORMULAS if one != "sparsegpt"),
    *(("slim", {"output": "out", "start": one}) for one in ("auto", "wanda_sp", "flap")),
    ("slim", {"output": "out", "start": "abs(W)*G", "repair": "bias"}),
    ("evaluate", {}),
]  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("command", dict(ASKED))
def test_seven_billion_parameters_in_80_gb(large: Model, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_host", lambda: 200 * GB)
    monkeypatch.setattr(plan, "free_disk", lambda folder: 1000 * GB)
    assert large.placement is not None
    assert large.placement.total_bytes == pytest.approx(13.5 * GB, rel=0.01)
    for asked, options in ASKED:
        if asked == command:
            found = plan_of(large, command, **options)
            assert 0 < found.memory_bytes < 74 * GB, options  # a margin of 8 % is left
            assert found.memory_bytes > large.placement.total_bytes or not found.resident
            assert found.host_bytes < 10 * GB, options
            assert found.disk_bytes < 250 * GB, options


def test_statistics_of_all_layers_by_hand(large: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6.48 G weights, G takes 25.9 GB in fp32, three such matrices 77.7, which go to the host, and half in bf16."""
    monkeypatch.setattr(plan, "free_host", lambda: 200 * GB)
    monkeypatch.setattr(plan, "free_disk", lambda folder: 1000 * GB)
    one = plan_of(large, "bench", metric="abs(W)*G")
    assert one.kept
    assert one.memory_bytes > (13.5 + 25.9) * GB
    three, half = (
        plan_of(large, "bench", metric="abs(W)*G*H*F", statistics_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert (three.resident, three.kept, half.kept) == (True, False, False)
    for limit in (6, 12, 24, 48):
        assert plan_of(large, "bench", limit * GB, metric="abs(W)*G").memory_bytes <= limit * GB
    assert three.disk_bytes - half.disk_bytes == pytest.approx(77.7 / 2 * GB, rel=0.01)


# What a process takes


def write_model(folder: Path, tokenizer: Any) -> None:
    """A Llama of 60 M random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=640, intermediate_size=1728, num_hidden_layers=12,
        num_attention_heads=10, max_position_embeddings=256, **ends,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PEAK = """
import json, sys
from pathlib import Path
from gpmetric.commands import COMMANDS
from gpmetric.options import make_request
from gpmetric.pruning.listeners import BenchListener
from gpmetric.pruning.listeners import PruneListener

command, options = json.loads(sys.argv[1])

class Listener(BenchListener, PruneListener):
    def needs(self, plan):
        told.update(plan.describe())

told = {}
COMMANDS[command].run(make_request(COMMANDS[command].request, options), Listener())
(line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps(told | {"peak": int(line.split()[1]) * 1024}))
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("medium")
    write_model(folder, tiny_tokenizer)
    return folder


@pytest.mark.every(2)
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("command", "metric", "bound"),
    [("prune", "wanda", 720), ("bench", "abs(W)*G", None)],
)
def test_a_process_takes_what_was_told(
    medium: Path, tiny_text: Path, tmp_path: Path, command: str, metric: str, bound: int | None
) -> None:
    """Within a quarter, of which most is what Python and torch take; and at most a twentieth above the bound."""
    options: dict[str, Any] = {"model": str(medium), "metric": metric, "text": str(tiny_text), "device": "cpu"}
    options |= {"calibration": str(tiny_text), "samples": 8, "sequence_length": 128, "windows": 8}
    options |= {"output": str(tmp_path / "out")} if command == "prune" else {}
    options |= {} if bound is None else {"memory": f"{bound}MB"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps([command, options])], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] is (bound is None and command == "bench")
    assert found["peak"] == pytest.approx(found["memory_bytes"], rel=0.25)
    assert bound is None or found["peak"] < 1.05 * bound * 10**6


# Statistics in bfloat16


SHARE = 0.0015  # of weights whose mask may differ; measured: 0.00033 by W*W*F, 0.00074 by abs(W)*G


@pytest.fixture(scope="module")
def demo() -> tuple[Session, Session]:
    """The demo model, its statistics kept in fp32 and in bfloat16."""
    found = []
    for dtype in ("float32", "bfloat16"):
        options = {"samples": 16, "sequence_length": 128, "device": "cpu", "statistics_dtype": dtype}
        found.append(open_session(make_request(COMMANDS["bench"].request, options)))
    return found[0], found[1]


@pytest.mark.parametrize("formula", ["W*W*F", "abs(W)*G"])
def test_masks_of_statistics_in_bfloat16(demo: tuple[Session, Session], formula: str) -> None:
    """A rounding of 2^-9 moves few weights across the threshold of their row."""
    metric, target = resolve_metric(formula), parse_target("row:0.5")
    exact, rounded = (session.statistics({"G", "F"}).layers for session in demo)
    different = total = 0
    for layer in demo[0].model.layers:
        masks = []
        for statistics in (exact[layer.name], rounded[layer.name]):
            assert statistics["X"].dtype == torch.float32
            masks.append(select_mask(metric(layer.weight, **statistics.operands), target))
        assert rounded[layer.name]["F"].dtype == torch.bfloat16
        different += int((masks[0] != masks[1]).sum())
        total += masks[0].numel()
    print(f"{formula}: {different / total:.5f} of {total} weights")
    assert 0 < different / total < SHARE


def test_a_file_of_statistics_in_bfloat16(demo: tuple[Session, Session], tmp_path: Path) -> None:
    keys, sizes = set(), []
    for session in demo:
        model, dtype = session.model, session.inputs.kept_dtype
        keys.add(cache_key(model, session.tokens, "XG", dtype))
        sizes.append(estimate_bytes(model.layers, "XG", dtype))
        path = session.stored_statistics({"G"}, tmp_path)
        assert sizes[-1] < path.stat().st_size < 1.1 * sizes[-1]
    assert len(keys) == len(list(tmp_path.iterdir())) == 2
    assert sizes[1] < 0.6 * sizes[0]


def test_bench_of_statistics_in_bfloat16(tiny_llama: Path, tiny_text: Path) -> None:
    options: dict[str, Any] = {"calibration": str(tiny_text), "text": str(tiny_text), "metric": ["W*W*F", "wanda"]}
    options |= {"samples": 4, "sequence_length": 32, "windows": 4, "device": "cpu"}
    exact, rounded = (
        bench(str(tiny_llama), statistics_dtype=dtype, **options)["results"] for dtype in ("float32", "bfloat16")
    )
    assert rounded[1]["ppl"] == exact[1]["ppl"]
    assert rounded[0]["ppl"] != exact[0]["ppl"]
    assert rounded[0]["ppl"][str(tiny_text)] == pytest.approx(exact[0]["ppl"][str(tiny_text)], rel=0.05)


@pytest.mark.parametrize(
    ("option", "without"),
    [
        ("minutes", set[str]()),
        ("memory", set[str]()),
        ("statistics_dtype", {"slim", "allocate", "evaluate"}),  # which keep none
    ],
)
def test_options_are_offered_where_they_have_an_effect(option: str, without: Collection[str]) -> None:
    offered = {name for name, row in COMMANDS.items() if option in {field.name for field in described(row.request)}}
    assert offered - {"verify", "reproduce"} == WORKING.keys() - without  # reproduce runs bench
    assert ("verify" in offered) == (option != "statistics_dtype")
    assert all(COMMANDS[name].timed for name in offered) or option != "minutes"


# Out of memory


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"),
    MemoryError(),
]


def test_a_batch_is_halved_until_it_fits(llama: Model) -> None:
    model = replace(llama, placement=Placement({}, torch.device("cpu")))
    sizes: list[int] = []

    def work(fits: int) -> str:
        sizes.append(model.batch_tokens)
        if model.batch_tokens > fits:
            raise FULL[1]
        return "done"

    assert retried(model, lambda: work(512)) == "done"
    assert sizes == [2048, 1024, 512]
    with pytest.raises(OutOfMemoryError) as caught:
        retried(model, lambda: work(0))
    assert sizes == [2048, 1024, 512, 512, 256, 128]
    assert str(caught.value).endswith(LEVERS)
    assert len(str(caught.value).splitlines()) == 1


def test_other_errors_are_not_tried_again(llama: Model) -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        retried(llama, broken)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpmetric", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


def small(model: Path, text: Path) -> tuple[str, ...]:
    named = ("--model", str(model), "--text", str(text), "--calibration", str(text), "--device", "cpu")
    return (*named, "--samples", "4", "--sequence-length", "32", "--windows", "4")


@pytest.mark.parametrize("error", FULL[1:], ids=lambda error: type(error).__name__)
def test_a_bench_keeps_what_needs_less(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, error: Exception,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Gradients have no room; in a file, there are the rows of metrics without, and the reason for the other."""
    collect = session_module.collect_blocks

    def full(model: Model, tokens: Tensor, names: Collection[str], **options: Any) -> Any:
        if "G" in names:
            raise error
        return collect(model, tokens, names, **options)

    monkeypatch.setattr(session_module, "collect_blocks", full)
    found = tmp_path / "found.json"
    metrics = [word for name in ("abs(W)*G", "wanda", "sparsegpt") for word in ("--metric", name)]
    assert run(monkeypatch, "bench", *small(tiny_llama, tiny_text), *metrics, "--json", str(found)) == 1
    document = json.loads(found.read_text())
    rows = {row["metric"]: row for row in document["results"]}
    assert list(rows) == ["abs(W)*G", "wanda", "sparsegpt"]
    assert [row["error"] is None for row in rows.values()] == [False, True, True]
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.splitlines()[-1] == f"gpmetric: error: {first_failure(document)}"
    assert str(first_failure(document)).endswith(LEVERS)


@pytest.mark.parametrize(
    ("command", "error"), [("prune", FULL[0]), ("evaluate", FULL[1]), ("evaluate", FULL[2])], ids=["0", "1", "2"]
)
def test_no_command_shows_a_traceback(
    command: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path, error: Exception,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*model: Any, **way: Any) -> None:
        raise error

    monkeypatch.setattr(session_module, "prepare_model", full)
    words = (str(tiny_llama), "--text", str(tiny_text), "--device", "cpu", "--sequence-length", "32")
    named = ("-o", str(tmp_path / "out"), "--calibration", str(tiny_text)) if command == "prune" else ()
    assert run(monkeypatch, command, *words, *named, "--windows", "4") == 1
    err = capsys.readouterr().err
    assert err.startswith("gpmetric: error: ")
    assert len(err.splitlines()) == 1
    assert LEVERS in err


def test_an_error_that_says_so(llama: Model) -> None:
    assert [memory.is_out_of_memory(error) for error in FULL] == [True] * 3
    assert memory.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not memory.is_out_of_memory(RuntimeError("shape"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))
    assert str(memory.out_of_memory(FULL[0])).startswith("the device is out of memory (CUDA out of memory. Tried")
    assert str(memory.out_of_memory(FULL[2])).startswith("this machine is out of memory (")


# prune --minutes


def test_prune_stops_behind_a_block_and_goes_on(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block a command, and what is written in the end is what one command writes."""
    options: dict[str, Any] = {"calibration": str(tiny_text), "text": str(tiny_text), "device": "cpu"}
    options |= {"samples": 4, "sequence_length": 32, "windows": 4}
    prune(str(tiny_llama), output=tmp_path / "whole", **options)
    out = tmp_path / "out"
    late = replace(Deadline.starting(1.0), began=-1e9)
    with monkeypatch.context() as patch:
        patch.setattr(pruning.Deadline, "starting", lambda minutes, started: late)
        for block in (1, 2):
            with pytest.raises(TimeOverError) as caught:
                prune(str(tiny_llama), output=out, minutes=1.0, **options)
            assert str(caught.value) == f"--minutes 1 are over at block {block} of 3"
            assert not isinstance(caught.value, InputError)
            assert not out.exists()
    prune(str(tiny_llama), output=out, minutes=60, **options)
    files = [path.name for path in (tmp_path / "whole").iterdir()]
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_time_that_is_over_before_what_was_written_is_verified(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept, and the same command does nothing but verify it."""
    options: dict[str, Any] = {"calibration": str(tiny_text), "samples": 4, "sequence_length": 32, "windows": 4}
    options |= {"output": tmp_path / "out", "device": "cpu"}
    now = [0.0]
    text_loss = pruning.text_loss
    finish = pruning.CheckpointWriter.finish

    def slow(*arguments: Any) -> float:
        now[0] += 20
        return text_loss(*arguments)

    def late(*arguments: Any) -> Any:
        now[0] += 20
        return finish(*arguments)

    clock = Deadline(1.0, 0.0, lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(pruning.Deadline, "starting", lambda minutes, started: clock)
        patch.setattr(pruning, "text_loss", slow)
        patch.setattr(pruning.CheckpointWriter, "finish", late)
        with pytest.raises(TimeOverError, match=r"^--minutes 1 are over, all being written but not verified yet$"):
            prune(str(tiny_llama), **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pruning, "text_loss", None)
    monkeypatch.setattr(pruning.Protocol, "walk", None)
    found = prune(str(tiny_llama), **options)
    assert found["perplexity"] > 1
    assert verify(str(tmp_path / "out"), against=str(tiny_llama))["ok"]


# verify


def test_verify_keeps_to_memory_and_time(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a fault of the checkpoint."""
    options: dict[str, Any] = {"calibration": str(tiny_text), "samples": 4, "sequence_length": 32, "windows": 4}
    prune(str(tiny_llama), output=tmp_path / "out", device="cpu", **options)
    with pytest.raises(InputError, match=r"needs at least .* GB here, of 9\.2e-06 GB allowed by --memory"):
        verify(str(tmp_path / "out"), memory="10kB")
    told: list[Plan] = []
    listener = Listener()
    monkeypatch.setattr(listener, "needs", told.append)
    request = VerifyRequest(folder=str(tmp_path / "out"), device="cpu")
    assert run_verify(request, listener)["ok"]
    assert [plan.resident for plan in told] == [False]
    now = iter(range(0, 100000, 30))
    late = Deadline(1.0, 0.0, lambda: float(next(now)))
    monkeypatch.setattr(verifying.Deadline, "starting", lambda minutes, started: late)
    with pytest.raises(TimeOverError, match="--minutes 1 are too few: the perplexity alone takes about"):
        run_verify(request)


# Memory that several share


def test_workers_share_the_memory(llama: Model, bare: None) -> None:
    """As many as there is room for, beside the process they work for; one gets everything."""
    one = make_plan(llama, WORK, 10**12).memory_bytes
    work = replace(WORK, workers=4)
    for limit, workers in ((room_for(5 * one), 4), (room_for(5 * one - 8), 3), (room_for(3 * one), 2)):
        found = make_plan(llama, work, limit)
        assert (found.workers, found.kept) == (workers, True)
        assert found.memory_bytes == (workers + 1) * one <= limit
    assert make_plan(llama, work, room_for(2 * one)).workers == 1


def test_models_that_are_there_together_share_the_memory(llama: Model, bare: None) -> None:
    whole = make_plan(llama, WORK, 10**12).memory_bytes
    assert make_plan(llama, replace(WORK, models=2), room_for(2 * whole) + 2).resident
    assert not make_plan(llama, replace(WORK, models=2), room_for(2 * whole) - 8).kept


def test_what_is_needed_in_the_end(llama: Model, bare: None) -> None:
    whole = make_plan(llama, WORK, 10**12).memory_bytes
    assert make_plan(llama, replace(WORK, after=1), 10**12).memory_bytes == whole
    assert make_plan(llama, replace(WORK, after=whole), 10**12).memory_bytes > whole
    with pytest.raises(InputError, match="needs at least"):
        make_plan(llama, replace(WORK, after=10**9, resident=True), 10**9)


def test_weights_that_are_in_memory_by_now_are_counted_once(
    llama: Model, bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = llama.placement
    assert placement is not None
    assert placement.held_bytes == 0  # mapped
    mapped = make_plan(llama, WORK, 10**12).memory_bytes
    monkeypatch.setattr(placement._files, "holds", lambda stored: False)
    assert placement.held_bytes == placement.total_bytes
    monkeypatch.setattr(plan, "resident_bytes", lambda device=None: placement.total_bytes)
    assert make_plan(llama, WORK, 10**12).memory_bytes == mapped
