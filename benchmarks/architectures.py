"""Every architecture of the installed transformers, tiny, through the commands: `python benchmarks/architectures.py`.

A model is pruned under both protocols, and written; its perplexity is compared with that of an independent loop, which
knows transformers' model and its hooks only, and the zeros are counted in the files. Gradients, SparseGPT and an
allocation are tried besides. The table is CSV, a row for each architecture, with what it reached or why it is refused.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import architectures, tiny_model
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import gpmetric
from gpmetric.errors import GpmetricError
from gpmetric.loading import quiet_transformers
from gpmetric.pruning.bench import first_failure

COLUMNS = ("architecture", "reached", "blocks", "layers", "dense", "one_shot", "sequential", "why", "seconds")
REACHED = ("built", "loaded", "one_shot", "sequential", "solved", "all")
LARGEST = 10**7  # parameters of a tiny model
SIZES: dict[str, Any] = {"samples": 4, "sequence_length": 16, "windows": 4, "device": "cpu"}
WORDS = "the a one small large old metric weight layer model token prunes keeps scores reads of in under with and"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("-o", "--output", type=Path, default=Path("architectures.csv"))
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--until", choices=REACHED, default=REACHED[-1], help="what is tried last")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with asked.output.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for name in asked.names or architectures():
            row = measured(name, asked.seconds, asked.until)
            table.writerow(row)
            file.flush()
            print(*row.values(), sep="\t", flush=True)


def measured(name: str, seconds: int = 60, until: str = "all") -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"architecture": name, "reached": "nothing"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, quiet_transformers():
        try:
            with at_most(seconds):
                for reached in steps(name, Path(place), row):
                    row["reached"] = reached
                    if reached == until:
                        break
        except Exception as error:
            row["why"] = f"{type(error).__name__}: {' '.join(str(error).replace(place, '').split()):.200}"
    return row | {"seconds": f"{time.perf_counter() - start:.1f}"}


def steps(name: str, place: Path, row: dict[str, Any]) -> Iterator[str]:
    """What an architecture reaches, one after the other; what it does not is raised."""
    model, text = place / "model", place / "text.txt"
    save_tiny(name, model)
    write_text(text)
    yield "built"
    options: dict[str, Any] = {"calibration": str(text), **SIZES}
    found = gpmetric.layers(str(model), device="cpu")
    prunable = sum(one["prunable"] for one in found["layers"])
    row |= {"blocks": found["blocks"], "layers": prunable, "dense": len(found["layers"]) - prunable}
    yield "loaded"
    for kind in ("one_shot", "sequential"):
        folder = place / kind
        once = kind == "one_shot"
        told = gpmetric.prune(str(model), metric="wanda", target="0.5", output=folder, one_shot=once,
                              text=str(text), **options)  # fmt: skip
        row[kind] = f"{compare(model, text, told, folder, one_shot=once):.1e}"
        yield kind
    bench = gpmetric.bench(str(model), metric=("gblm_l1", "sparsegpt"), target=("0.5",), text=(str(text),), **options)
    if why := first_failure(bench):
        raise GpmetricError(f"gradients or SparseGPT: {why}")
    yield "solved"
    gpmetric.allocate(str(model), sparsity=0.5, evaluations=6, search_windows=2, **options)
    yield "all"


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
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for group in [[name for block in blocks for name in block]] if one_shot else blocks:
        prune_half(model, group, windows)
    expected = perplexity(model, windows)
    stored = load_stored(written)
    zeros = sum(int((stored[layer["tensor"]] == 0).sum()) for layer in told["layers"])
    names = {layer["name"] for layer in told["layers"]}
    named = dict(model.named_modules(remove_duplicate=False))
    mine = sum(int((named[name].weight == 0).sum()) for name in names)
    if zeros != mine or len(names) != len(pruned):
        raise GpmetricError(f"{zeros} zeros in the files, {mine} by the loop")
    again: Any = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    values = (told["perplexity"], perplexity(again, windows))
    off = max(abs(value / expected - 1) for value in values)
    if not off <= 1e-6:
        raise GpmetricError(f"perplexity {values[0]:.6f}, reloaded {values[1]:.6f}, by the loop {expected:.6f}")
    return off


def cut(folder: Path, text: Path) -> torch.Tensor:
    """[windows, length]: what the commands read, calibration and text being one."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    count, length = SIZES["windows"], SIZES["sequence_length"]
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def prune_half(model: Any, names: list[str], windows: torch.Tensor) -> None:
    """Wanda's half of each row of some layers, by what they read now: |W| times the norm of the input feature."""
    named = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, list[Any]] = {}
    for module in named.values():
        if getattr(module, "weight", None) is not None:
            holders.setdefault(id(module.weight), []).append(module)
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name in names:
        for module in {id(one): one for one in holders[id(named[name].weight)]}.values():

            def add(_: Any, args: Any, name: str = name) -> None:
                squares = args[0].reshape(-1, args[0].shape[-1]).double().square().sum(dim=0)  # [in]
                sums[name] = sums.get(name, 0) + squares

            hooks.append(module.register_forward_pre_hook(add))
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name in names:
        module = named[name]
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight  # [out, in], a view
        order = (weight.double().abs() * sums[name].sqrt()).argsort(dim=1, stable=True)
        weight.scatter_(1, order[:, : weight.shape[1] // 2], 0)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss over the tokens of windows [windows, length] but for their first."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]  # [windows, length - 1, vocabulary]
    labels = windows[:, 1:].flatten()
    return math.exp(cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum").item() / len(labels))


def load_stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
