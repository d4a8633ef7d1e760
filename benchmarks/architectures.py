"""Every architecture of the installed transformers, tiny, through the commands: `python benchmarks/architectures.py`.

A model is pruned under both protocols, and written; its perplexity is compared with that of an independent loop, which
knows transformers' model and its hooks only, and the zeros are counted in the files. Gradients, SparseGPT and an
allocation are tried besides, whatever became of the others. The table, `architectures.csv`, has a row for each: `yes`,
how far the perplexity is off, `refused` or `fails` (a fault), and why. Each has a process and a time of its own.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny_models import architectures, tiny_model
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import gpmetric
from gpmetric.errors import GpmetricError
from gpmetric.loading import quiet_transformers
from gpmetric.pruning.bench import first_failure

TRIED = ("one_shot", "sequential", "gradients", "sparsegpt", "allocate")
COLUMNS = ("architecture", "transformers", "opened", "blocks", "layers", "experts", "share", *TRIED, "why", "seconds")
LARGEST = 10**7  # parameters of a tiny model
SIZES: dict[str, Any] = {"samples": 4, "sequence_length": 16, "windows": 4, "device": "cpu"}
WORDS = "the a one small large old metric weight layer model token prunes keeps scores reads of in under with and"
EXPERT = re.compile(r"(.*)\.(\d+)\.(\w+)")  # a slice of a fused parameter: module, expert, parameter
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types, whose rows are replaced; all by default")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--seconds", type=int, default=120, help="for each")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_table(asked.output) if asked.names and asked.output.exists() else {}
    for name in asked.names or architectures():
        rows[name] = measured_apart(name, asked.seconds)
        write_table(asked.output, rows)
        print(*rows[name].values(), sep="\t", flush=True)
    for column in ("opened", *TRIED):
        told = Counter(re.sub(r"^\d.*", "as the loop", row[column]) or "not tried" for row in rows.values())
        print(f"{column}:", ", ".join(f"{count} {what}" for what, count in told.most_common()))


def read_table(path: Path) -> dict[str, Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


def write_table(path: Path, rows: dict[str, Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows[name] for name in sorted(rows))


def measured_apart(name: str, seconds: int) -> Row:
    """A row of the table, made in a process that is ended where it takes longer; what it has by then counts."""
    start = time.perf_counter()
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=measured, args=(name, TRIED, there.send))
    process.start()
    there.close()
    row, why = empty_row(name), f"TimeoutError: not done in {seconds} s"
    try:
        while here.poll(max(0.0, start + seconds - time.perf_counter())):
            row = here.recv()
    except EOFError:
        process.join()
        why = f"ended with status {process.exitcode}" if process.exitcode else row["why"]
    process.kill()
    process.join()
    return row | {"why": row["why"] or why, "seconds": f"{time.perf_counter() - start:.1f}"}


def empty_row(name: str) -> Row:
    return dict.fromkeys(COLUMNS, "") | {"architecture": name, "transformers": transformers.__version__}


def measured(name: str, tried: tuple[str, ...] = TRIED, report: Callable[[Row], None] | None = None) -> Row:
    """A row of the table.

    Args:
        name: of an architecture.
        tried: of TRIED, what is done with an opened model.
        report: is given the row after each step.
    """
    row = empty_row(name)
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        model, text = Path(place) / "model", Path(place) / "text.txt"
        with noted(row, "opened", place):
            try:
                save_tiny(name, model)
            except Exception as error:
                raise NotBuiltError(str(error)) from error
            write_text(text)
            row |= counts(gpmetric.layers(str(model), device="cpu"))
        if report:
            report(row)
        for step in tried if row["opened"] == "yes" else ():
            with noted(row, step, place):
                row[step] = STEPS[step](model, text)
            if report:
                report(row)
    return row


class NotBuiltError(Exception):
    """transformers makes no tiny model of it."""


@contextmanager
def noted(row: Row, column: str, place: str) -> Iterator[None]:
    """What becomes of a step is in its column, and the first reason of all under `why`."""
    kinds: tuple[tuple[type[Exception], str], ...]
    kinds = ((NotBuiltError, "not built"), (GpmetricError, "refused"), (Exception, "fails"))
    try:
        yield
        row[column] = row[column] or "yes"
    except Exception as error:
        row[column] = next(told for kind, told in kinds if isinstance(error, kind))
        why = f"{column}: {type(error).__name__}: {' '.join(str(error).replace(place, '').split()):.240}"
        row["why"] = row["why"] or why


def counts(found: dict[str, Any]) -> Row:
    """Of blocks, layers that are pruned, experts' layers among them, and the share of the model that these are."""
    pruned = [layer["name"] for layer in found["layers"] if layer["prunable"]]
    experts = sum(bool(re.search(r"experts\.\d+\.", name)) for name in pruned)
    return {"blocks": found["blocks"], "layers": len(pruned), "experts": experts, "share": f"{found['share']:.2f}"}


def try_prune(model: Path, text: Path, *, one_shot: bool) -> str:
    folder = model.with_name("one_shot" if one_shot else "sequential")
    told = gpmetric.prune(str(model), metric="wanda", target="0.5", output=folder, one_shot=one_shot, text=str(text),
                          calibration=str(text), **SIZES)  # fmt: skip
    return f"{compare(model, text, told, folder, one_shot=one_shot):.0e}"


def try_bench(model: Path, text: Path, *, metric: str) -> str:
    options = {"metric": (metric,), "target": ("0.5",), "text": (str(text),), "calibration": str(text)}
    if why := first_failure(gpmetric.bench(str(model), **options, **SIZES)):
        raise GpmetricError(why)
    return "yes"


def try_allocate(model: Path, text: Path) -> str:
    gpmetric.allocate(str(model), sparsity=0.5, evaluations=6, search_windows=2, calibration=str(text), **SIZES)
    return "yes"


STEPS: dict[str, Callable[[Path, Path], str]] = {
    "one_shot": partial(try_prune, one_shot=True),
    "sequential": partial(try_prune, one_shot=False),
    "gradients": partial(try_bench, metric="gblm_l1"),
    "sparsegpt": partial(try_bench, metric="sparsegpt"),
    "allocate": try_allocate,
}


def save_tiny(name: str, folder: Path) -> None:
    """A random model and a tokenizer of 300 tokens in a folder."""
    model = tiny_model(name)
    if (size := sum(one.numel() for one in model.parameters())) > LARGEST:
        raise ValueError(f"{size} parameters though its sizes are shrunk")
    model.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([sentences(1, 50)], vocab_size=300, special_tokens=["<|endoftext|>"])
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=64, **ends).save_pretrained(folder)


def sentences(seed: int, count: int) -> str:
    draw = random.Random(seed)
    lines = (" ".join(draw.choices(WORDS.split(), k=draw.randint(4, 12))) for _ in range(count))
    return "".join(f"{line.capitalize()}.\n" for line in lines)


def write_text(path: Path) -> None:
    path.write_text(sentences(0, 100), encoding="utf-8")


def compare(folder: Path, text: Path, told: dict[str, Any], written: Path, *, one_shot: bool) -> float:
    """How far a pruned model's perplexity is from that of an independent loop, relatively; zeros are counted, too."""
    found = gpmetric.layers(str(folder), device="cpu")
    blocks: list[list[str]] = [[] for _ in range(found["blocks"])]
    pruned = [layer for layer in found["layers"] if layer["prunable"]]
    for layer in pruned:
        blocks[layer["block"]].append(layer["name"])
    windows = cut(folder, text)
    model = load_plain(folder)
    before = count_zeros(dict(model.named_parameters()))
    for group in [[name for block in blocks for name in block]] if one_shot else blocks:
        prune_half(model, group, windows)
    expected = perplexity(model, windows)
    mine = count_zeros(dict(model.named_parameters())) - before
    zeros = count_zeros(load_stored(written)) - count_zeros(load_stored(folder))
    if zeros != mine or {layer["name"] for layer in told["layers"]} != {layer["name"] for layer in pruned}:
        raise AssertionError(f"{zeros} zeros more in the files, {mine} by the loop")
    again = load_plain(written)
    pairs = zip(again.parameters(), model.parameters(), strict=True)
    other = sum(int((one != another).sum()) for one, another in pairs)
    if other > mine / 1000:  # scores that are equal but for rounding
        raise AssertionError(f"{other} weights are not those of the loop")
    values = (told["perplexity"], perplexity(again, windows))
    off = max(abs(value / expected - 1) for value in values)
    if not off <= 1e-6:
        raise AssertionError(f"perplexity {values[0]:.6f}, reloaded {values[1]:.6f}, by the loop {expected:.6f}")
    return off


def load_plain(folder: Path) -> Any:
    """The model as transformers has it, its experts one after the other."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


def count_zeros(tensors: dict[str, torch.Tensor]) -> int:
    return sum(int((one == 0).sum()) for one in tensors.values())


def cut(folder: Path, text: Path) -> torch.Tensor:
    """[windows, length]: what the commands read, calibration and text being one."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    count, length = SIZES["windows"], SIZES["sequence_length"]
    return torch.tensor(ids[: count * length]).view(count, length)


class ReadBySlices(TorchFunctionMode):
    """While its context is open, sums the squares of what each slice of some parameters [E, ., .] is multiplied with.

    Args:
        fused: the parameters by name, each in a storage of its own.

    Attributes:
        sums: [in] by name and expert.
        turned: by name, whether a slice is [in, out].
    """

    def __init__(self, fused: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {one.untyped_storage().data_ptr(): name for name, one in fused.items()}
        self.sums: dict[tuple[str, int], torch.Tensor] = {}
        self.turned: dict[str, bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = getattr(func, "__name__", "").strip("_")
        if kind in ("linear", "matmul", "mm", "bmm") and len(args) > 1:
            states, weight = args[:2]
            if (name := self._names.get(weight.untyped_storage().data_ptr())) is not None:
                self.turned[name] = (kind != "linear") != (weight.stride(-1) != 1)
                first = weight.storage_offset() // weight[-1].numel() if weight.dim() == 3 else None
                index = weight.storage_offset() // weight.numel() if first is None else first
                for place, one in enumerate(states if weight.dim() == 3 else states[None]):
                    squares = one.reshape(-1, one.shape[-1]).double().square().sum(dim=0)  # [in]
                    key = name, index + place
                    self.sums[key] = self.sums.get(key, 0) + squares
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def prune_half(model: Any, names: list[str], windows: torch.Tensor) -> None:
    """Wanda's half of each row of some layers, by what they read now: |W| times the norm of the input feature."""
    named = dict(model.named_modules(remove_duplicate=False))
    slices = {name: EXPERT.fullmatch(name) for name in names if name not in named}
    fused = {}
    for place in slices.values():
        assert place is not None
        parameter = named[place[1]].get_parameter(place[3])
        parameter.data = fused[f"{place[1]}.{place[3]}"] = parameter.data.clone()
    holders: dict[int, list[Any]] = {}
    for module in named.values():
        if getattr(module, "weight", None) is not None:
            holders.setdefault(id(module.weight), []).append(module)
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name in named.keys() & names:
        for module in {id(one): one for one in holders[id(named[name].weight)]}.values():

            def add(_: Any, args: Any, name: str = name) -> None:
                squares = args[0].reshape(-1, args[0].shape[-1]).double().square().sum(dim=0)  # [in]
                sums[name] = sums.get(name, 0) + squares

            hooks.append(module.register_forward_pre_hook(add))
    with ReadBySlices(fused) as reads:
        model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name in names:
        if (place := slices.get(name)) is None:
            weight = named[name].weight
            halve(weight.t() if isinstance(named[name], Conv1D) else weight, sums[name])
        else:
            whole, expert = f"{place[1]}.{place[3]}", int(place[2])
            weight = fused[whole][expert]
            halve(weight.t() if reads.turned[whole] else weight, expert_sums(reads, whole, expert))


def halve(weight: torch.Tensor, squares: torch.Tensor) -> None:
    """Sets the lower half of each row of a weight [out, in] to zero, in place; squares [in] of what it reads."""
    order = (weight.double().abs() * squares.sqrt()).argsort(dim=1, stable=True)
    weight.scatter_(1, order[:, : weight.shape[1] // 2], 0)


def expert_sums(reads: ReadBySlices, whole: str, expert: int) -> torch.Tensor:
    """An expert's own sums [in], or those of all where no token is routed to it."""
    own = reads.sums.get((whole, expert))
    if own is not None and own.any():
        return own
    return torch.stack([one for (name, _), one in reads.sums.items() if name == whole]).sum(dim=0)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss over the tokens of windows [windows, length] but for their first."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]  # [windows, length - 1, vocabulary]
    labels = windows[:, 1:].flatten()
    return math.exp(cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum").item() / len(labels))


def load_stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


if __name__ == "__main__":
    main()
