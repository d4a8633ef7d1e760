"""Everything that needs a GPU, in minutes: `python benchmarks/gpu_check.py [--minutes 8] [--out DIR]`.

Checks come first, then peaks of memory against their estimates, then times; each row is written to DIR/rows.jsonl as
soon as it is there, and what does not fit into the time is told. Needs no network and no files of others: the model has
random weights of a 7B Llama's shapes, written shard by shard, unless `--model` names a real one.

    --device cpu --blocks 2 --width 256   the same steps on a small model without a GPU
    --only demo                           the steps whose names hold this
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_kernels import CASES, MODELS
from bench_solver import QUICK, on_device
from kernel_checks import CheckError, check_all, choices, draw, other_choices
from kernel_times import PUBLISHED, Cuda, measure, measure_model
from transformers import LlamaConfig, LlamaForCausalLM

from gpmetric import allocate, bench, discover, evaluate, prune, slim, tune
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.demo.text import demo_text
from gpmetric.errors import GpmetricError
from gpmetric.loading import DEMO_MODEL
from gpmetric.metrics import resolve_metric
from gpmetric.provenance import versions
from gpmetric.pruning.updaters import prune_weights
from gpmetric.session.listeners import Listener
from gpmetric.session.plan import Plan
from gpmetric.targets import parse_target
from gpmetric.tensor_file import write_tensors

_HEADS = 128  # wide
_WITHIN = 0.25  # of an estimate
_UPDATES = (
    ("none", "own"), ("obs", "own"), ("obs-blockwise", "dense"), ("admm", "own"), ("admm", "dense"), ("block", "own"),
    ("admm+block", "dense"),
)  # fmt: skip
_SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]  # of a block
_SHARD = 4 * 10**9  # bytes


@dataclass(frozen=True)
class Place:
    """Where and on what the rows are measured."""

    device: str
    model: Path
    calibration: Path
    text: Path
    samples: int
    length: int
    scratch: Path

    @property
    def options(self) -> dict[str, Any]:
        """Of every command."""
        return {
            "calibration": str(self.calibration), "samples": self.samples, "sequence_length": self.length,
            "windows": self.samples, "device": self.device,
        }  # fmt: skip


class _Told(Listener):
    """Keeps what a command said that it would take."""

    plan: Plan | None = None

    def needs(self, plan: Plan) -> None:
        self.plan = plan


def main() -> None:
    """Runs the rows in order until the time is over; exit status 1 where a check failed."""
    arguments = _parser().parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as scratch, (arguments.out / "rows.jsonl").open("w", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        write({"step": "machine", "device": _name(arguments.device), "versions": versions()})
        place = _place(arguments, Path(scratch))
        for name, step in _steps(place):
            if arguments.only not in name:
                continue
            if time.monotonic() > end:
                write({"step": name, "skipped": f"--minutes {arguments.minutes:g} are over"})
                continue
            start = time.monotonic()
            try:
                row = step()
            except (CheckError, GpmetricError, RuntimeError) as error:  # the others are measured all the same
                failed, row = True, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            failed |= bool(row.get("errors")) or row.get("within") is False
            write({"step": name, **row, "wall_s": round(time.monotonic() - start, 2)})
            gc.collect()
    sys.exit(failed)


def _steps(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "kernels choose as a stable sort", lambda: _kernels(place.device)
    if place.device == "cuda":
        yield "kernels: times of a copy and of the published step", _kernel_times
    yield "kernels: all layers of a small model at four targets", lambda: _small_model(place.device)
    yield "solver: times of the published loop", lambda: _solver(place.device)
    masks = ("wanda", "sparsegpt", "gblm_l1", "ria", "W*W*F")
    yield "demo: device and CPU agree", partial(_agree, place.device, masks, 1e-3, samples=16, windows=16)
    for update, fit in _UPDATES:  # a support may differ in a tie
        options = {"samples": 4, "windows": 8, "update": update, "fit": fit}
        yield (
            f"demo: device and CPU agree, {update} {fit}",
            partial(_agree, place.device, ("W*W*F",), 2e-2, **options),
        )
    for name, run in (("discover", discover), ("allocate", allocate), ("tune", tune), ("slim", slim)):
        yield f"demo: {name}", partial(_runs, place, run)
    yield "prune wanda 2:4", lambda: _command(place, prune, metric="wanda", target="2:4", output=place.scratch / "a")
    yield (
        "bench wanda, sparsegpt, gblm",
        lambda: _command(
            place, bench, metric=("wanda", "sparsegpt", "gblm_l1"), target=("0.5", "2:4"), text=(str(place.text),)
        ),
    )
    yield "prune W*W*F", lambda: _command(place, prune, metric="W*W*F", target="0.5", output=place.scratch / "b")
    yield "evaluate", lambda: _command(place, evaluate, text=(str(place.text),))
    yield (
        "bench wanda in 8 GB",
        lambda: _command(place, bench, metric=("wanda",), target=("2:4",), text=(str(place.text),), memory="8GB"),
    )
    yield (
        "bench all operands",
        lambda: _command(
            place, bench, metric=("abs(W)*X*G*H*D*F",), target=("0.5",), text=(str(place.text),), one_shot=True
        ),
    )
    yield (
        "allocate",
        lambda: _command(place, allocate, sparsity=0.5, evaluations=12, search_windows=4, population=4, genes="block"),
    )
    yield "discover", lambda: _command(
        place, discover, text=str(place.text), target=("0.5",), evaluations=2, population=4, search_windows=2,
        calibration_seeds=0, ledger=place.scratch / "campaign.sqlite", cache=place.scratch / "cache",
    )  # fmt: skip
    yield (
        "slim",
        lambda: _command(
            place, slim, sparsity=0.2, steps=4, search_windows=4, format="uniform", output=place.scratch / "c"
        ),
    )


def _kernels(device: str) -> dict[str, Any]:
    shapes = [(4096, 4096), (11008, 4096)] if device == "cuda" else [(96, 256)]
    found = [*choices(device, False), *other_choices(device, False)]
    return {"told": list(check_all(found, shapes, device))}


def _kernel_times() -> dict[str, Any]:
    """Of a layer of a 7B model: microseconds, share of a copy's bandwidth, and times that the published step takes."""
    machine = Cuda()
    results = [measure(case, (4096, 4096), machine) for case in CASES]
    found: dict[str, Any] = {}
    for one in results:
        times = round(one.speedup, 1) if PUBLISHED in one.others else None
        found[one.name] = round(1e6 * float(np.median(one.seconds)), 1), round(one.share, 3), times
    blocks, shapes = MODELS["Llama-2-7B"]
    for how, seconds in measure_model(CASES[0], shapes, blocks, machine).items():
        found[f"7B, all linear layers, rows, {how}"] = f"{1e3 * float(np.median(seconds)):.2f} ms"
    return found


def _small_model(device: str) -> dict[str, Any]:
    """Milliseconds of all layers of SmolLM2-135M at 0.5, 0.6, 0.7 and 2:4, by rows and over whole layers."""
    blocks, shapes = (30, _SMOLLM2) if device == "cuda" else (1, [(4, 64), (2, 64)])
    drawn = [draw(shape, torch.bfloat16, device, names="WX") for shape in shapes * blocks]
    weights, operands = [one["W"] for one in drawn], [{"X": one["X"]} for one in drawn]
    found = {}
    for group in ("", "layer:"):
        targets = [parse_target(f"{group}{text}").resolved("row") for text in ("0.5", "0.6", "0.7")]
        targets.append(parse_target("2:4"))
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            pruned = prune_weights(
                weights, resolve_metric("abs(W)*X"), targets, [LayerStatistics(**one) for one in operands]
            )
            if device == "cuda":
                torch.cuda.synchronize()
        found[group.rstrip(":") or "rows"] = round(1e3 * (time.perf_counter() - start), 2)
        for target, copies in zip(targets, pruned, strict=True):
            for weight, copy in zip(weights, copies, strict=True):
                if int((copy == 0).sum()) < target.removes(weight.shape):
                    raise CheckError(f"{target.text} of {tuple(weight.shape)}: too few zeros")
    return found


def _solver(device: str) -> dict[str, Any]:
    """Seconds of the solver by layer and target, and what part of the published loop's they are; errors agree."""
    shapes = QUICK if device == "cuda" else [(4, 40)]
    return {found["case"]: (found["median"], found["ratio"]) for found in on_device(device, shapes)}


def _agree(device: str, metric: tuple[str, ...], within: float, **options: Any) -> dict[str, Any]:
    """Perplexities of the demo model, pruned on the device and on the CPU; the largest relative difference."""
    options |= {"metric": metric, "target": ("0.5", "2:4"), "dtype": "float32"}
    found = [bench(**options, device=one)["results"] for one in ("cpu", device)]
    if errors := [row["error"] for rows in found for row in rows if row.get("error")]:
        raise CheckError(errors[0])
    ppl = [[row["ppl"]["demo:test"] for row in rows] for rows in found]
    worst = max(abs(mine / other - 1) for mine, other in zip(*ppl, strict=True))
    if worst > within:
        raise CheckError(f"perplexities differ by {worst:.2g}")
    return {"rows": len(ppl[0]), "largest_difference": worst}


def _runs(place: Place, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a command on the demo model, permutation, dense fits and all."""
    shared: dict[str, Any] = {"samples": 16, "device": place.device, "search_windows": 4, "windows": 8}
    own: dict[str, dict[str, Any]] = {
        "discover": {
            "target": ("0.5", "2:4"), "update": "admm", "fit": "dense", "evaluations": 6, "population": 4,
            "calibration_seeds": 0, "ledger": place.scratch / "demo.sqlite",
        },
        "allocate": {"sparsity": 0.5, "update": "admm", "fit": "dense", "evaluations": 8, "population": 4},
        "tune": {"target": "2:4", "minutes": 1.2, "output": place.scratch / "tuned"},
        "slim": {"sparsity": 0.2, "steps": 4, "output": place.scratch / "slim"},
    }  # fmt: skip
    start = time.perf_counter()
    run(**shared, **own[run.__name__])
    return {"seconds": round(time.perf_counter() - start, 2)}


def _command(place: Place, run: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Peak of memory of a command against its estimate, and its seconds."""
    told, cuda = _Told(), place.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    unused = {"calibration", "samples"} if run is evaluate else {"calibration"} if run is discover else set[str]()
    known = {name: value for name, value in place.options.items() if name not in unused}
    start = time.perf_counter()
    document = run(str(place.model), listener=_listening(run, told), **known, **options)
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
    if errors := [one["error"] for one in document.get("results", ()) if one.get("error")]:
        row["errors"] = errors
    if told.plan is not None:
        row |= {"estimate_gb": told.plan.memory_bytes / 1e9, "resident": told.plan.resident, "kept": told.plan.kept}
        row["estimate_s"] = round(told.plan.seconds, 1)
    if cuda:
        row["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if told.plan is not None:
            row["within"] = abs(row["peak_gb"] / row["estimate_gb"] - 1) <= _WITHIN
    shutil.rmtree(options.get("output", place.scratch / "none"), ignore_errors=True)
    return row


def _listening(run: Callable[..., Any], told: _Told) -> Any:
    """A listener of the command's kind that passes on what it takes."""
    from gpmetric.allocation.listener import AllocateListener
    from gpmetric.evolution.listener import DiscoverListener
    from gpmetric.pruning.listeners import BenchListener, PruneListener
    from gpmetric.session.listeners import EvaluateListener
    from gpmetric.structured.listener import SlimListener

    kinds: dict[str, type[Listener]] = {
        "allocate": AllocateListener, "bench": BenchListener, "discover": DiscoverListener,
        "evaluate": EvaluateListener, "prune": PruneListener, "slim": SlimListener,
    }  # fmt: skip
    listener = kinds[run.__name__]()
    listener.needs = told.needs  # type: ignore[method-assign]
    return listener


def _place(arguments: argparse.Namespace, scratch: Path) -> Place:
    text = scratch / "text.txt"
    text.write_text("\n".join(demo_text(split) for split in ("calibration", "test")), encoding="utf-8")
    model = arguments.model or _random_llama(scratch / "model", arguments.blocks, arguments.width)
    return Place(
        arguments.device, model, arguments.calibration or text, arguments.text or text, arguments.samples,
        arguments.length, scratch,
    )  # fmt: skip


def _random_llama(folder: Path, blocks: int, width: int) -> Path:
    """A bf16 checkpoint of random weights with the demo's tokenizer, written shard by shard."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=blocks, vocab_size=32000,
        num_attention_heads=max(1, width // _HEADS), num_key_value_heads=max(1, width // _HEADS),
        max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.vocab_size = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    with torch.device("meta"):
        kinds = {name: tuple(one.shape) for name, one in LlamaForCausalLM(config).named_parameters()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in kinds.items():
        size = sum(2 * torch.Size(one).numel() for one in shards[-1].values())
        if shards[-1] and size > _SHARD:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(2**22, generator=generator)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Noise that is repeated, which a mask does not mind, since a normal number takes 10 ns."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        count = torch.Size(shape).numel()
        shift = zlib.crc32(name.encode()) % len(noise)
        return noise.roll(shift).repeat(-(-count // len(noise)))[:count].reshape(shape).bfloat16()

    for name, shard in zip(names, shards, strict=True):
        dtypes = {key: (torch.bfloat16, shape) for key, shape in shard.items()}
        write_tensors(folder / name, dtypes, lambda key: values(key, kinds[key]), {"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after which no further step is begun")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of rows.jsonl")
    parser.add_argument("--only", default="", help="part of the names of the steps that are run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", type=Path, help="directory of a real model, instead of random weights")
    parser.add_argument("--calibration", type=Path, help="text file; the demo's by default")
    parser.add_argument("--text", type=Path, help="text file to evaluate; the demo's by default")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=8, help="windows")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    return parser


if __name__ == "__main__":
    main()
