"""Trains a small mixture of experts on the demo text and benchmarks pruning its experts.

    python benchmarks/bench_mixture.py --output build/mixture

Qwen3-MoE, 3 blocks of 96, 8 experts of 96 channels of which a token takes 2, the demo model's tokenizer: 1,500 steps of
2,048 tokens. Then magnitude, Wanda, SparseGPT and ALPS at half, 0.6 and 2:4, in all layers and in the experts alone, on
the demo's own splits; `mixture.json` in the output has the tables. Then a quarter of the experts of every block removed
by REAP, by frequency, at random (three seeds), and by a search of 30 steps from the best start; --csv FILE takes rows.
--measure names one of the two.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import append, row
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import gpmetric
from gpmetric.demo.text import demo_text
from gpmetric.demo.train import CONTEXT, train_model
from gpmetric.loading import DEMO_MODEL

METRICS = ["magnitude", "wanda", "sparsegpt", "alps"]
TARGETS = ["0.5", "0.6", "2:4"]
GONE = 0.25  # of the experts of every block
SEEDS = 3  # of random choices
# what chooses experts -> options of `slim`
CHOICES: dict[str, dict[str, Any]] = {
    "reap": {"start": "reap", "steps": 0},
    "frequency": {"start": "frequency", "steps": 0},
    "random": {"start": "random", "steps": 0},
    "search of 30 steps from the best start": {"steps": 30},
}


def new_mixture(vocabulary: int) -> Qwen3MoeForCausalLM:
    """An untrained mixture, its loss including that of balanced routing."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            norm_topk_prob=True,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train(folder: Path, steps: int, seed: int) -> None:
    """Writes a trained mixture and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokens = torch.tensor(tokenizer(demo_text("train"), add_special_tokens=False, verbose=False)["input_ids"])
    model: Any = new_mixture(len(tokenizer))
    print(f"{len(tokens):,} training tokens, {model.num_parameters():,} parameters", flush=True)
    print(f"final training loss {train_model(model, tokens, steps, seed):.4f} nats per token")
    model.config.output_router_logits = False
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def remove_experts(model: Path, output: Path, windows: int) -> dict[str, Any]:
    """Excess log-loss on demo:test, in nats, without a quarter of the experts, by choice a list over seeds."""
    shared = {"sequence_length": CONTEXT, "device": "cpu"}
    told = {"text": ["demo:test"], "windows": windows} | shared
    dense = gpmetric.evaluate(str(model), **told)["ppl"]["demo:test"]
    found: dict[str, Any] = {"dense": dense, "excess": {}, "widths": {}}
    for name, options in CHOICES.items():
        for seed in range(SEEDS if name == "random" else 1):
            folder = output / f"{name.replace(' ', '-')}-{seed}"
            made = gpmetric.slim(
                str(model), output=folder, granularity="expert", sparsity=GONE, calibration="demo:calibration",
                samples=32, windows=windows, seed=seed, force=True, **options, **shared,
            )  # fmt: skip
            perplexity = gpmetric.evaluate(str(folder), **told)["ppl"]["demo:test"]
            found["excess"].setdefault(name, []).append(math.log(perplexity / dense))
            found["widths"].setdefault(name, []).append(made["widths"])
            print(f"  {name}, seed {seed}: {perplexity:.3f}, dense {dense:.3f}, begun {made['begun']}", flush=True)
    return found


def rows_of(found: dict[str, Any], steps: int, windows: int) -> list[dict[str, str]]:
    """Rows of results.csv, of what was removed; the baseline is the mean of random choices."""
    against = float(np.mean(found["excess"]["random"]))
    model = f"Qwen3-MoE of 8 experts trained for {steps:,} steps on the demo text, a quarter of the experts removed"
    text = f"32 windows of {CONTEXT}, {windows} of demo:test"
    return [
        row("mixture", f"{model}, {name}, {text}, against random", np.array(values), against, "excess")
        for name, values in found["excess"].items()
    ]


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--measure", nargs="+", choices=("pruning", "removal"), default=["pruning", "removal"])
    parser.add_argument("--csv", type=Path, help="takes rows of what removal costs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.output / "model"
    if not (folder / "config.json").is_file():
        train(folder, options.steps, options.seed)
    if "removal" in options.measure:
        removed = remove_experts(folder, options.output, options.windows)
        (options.output / "removal.json").write_text(json.dumps(removed, indent=1))
        if options.csv is not None:
            append(rows_of(removed, options.steps, options.windows), options.csv)
    if "pruning" in options.measure:
        prune_weights(folder, options.output, options.windows)


def prune_weights(folder: Path, output: Path, windows: int) -> None:
    """Writes the tables of pruned weights."""
    tables = {}
    for name, include in (("all layers", None), ("experts alone", r"\.experts\.")):
        tables[name] = gpmetric.bench(
            str(folder), calibration="demo:calibration", text=["demo:test"], metric=METRICS, target=TARGETS,
            include=include, samples=32, windows=windows, sequence_length=CONTEXT, device="cpu",
        )  # fmt: skip
        print(f"{name}: dense {tables[name]['dense']}, starved {tables[name]['experts']['starved']}")
        for one in tables[name]["results"]:
            print(f"  {one['target']:4} {one['metric']:10} {next(iter(one['ppl'].values())):8.3f}", flush=True)
    (output / "mixture.json").write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
