"""Trains a small mixture of experts on the demo text and benchmarks pruning its experts.

    python benchmarks/bench_mixture.py --output build/mixture

Qwen3-MoE, 3 blocks of 96, 8 experts of 96 channels of which a token takes 2, the demo model's tokenizer: 1,500 steps of
2,048 tokens. Then magnitude, Wanda, SparseGPT and ALPS at half, 0.6 and 2:4, in all layers and in the experts alone, on
the demo's own splits; `mixture.json` in the output has the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import gpmetric
from gpmetric.demo.text import demo_text
from gpmetric.demo.train import CONTEXT, train_model
from gpmetric.loading import DEMO_MODEL

METRICS = ["magnitude", "wanda", "sparsegpt", "alps"]
TARGETS = ["0.5", "0.6", "2:4"]


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


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.output / "model"
    if not (folder / "config.json").is_file():
        train(folder, options.steps, options.seed)
    tables = {}
    for name, include in (("all layers", None), ("experts alone", r"\.experts\.")):
        tables[name] = gpmetric.bench(
            str(folder), calibration="demo:calibration", text=["demo:test"], metric=METRICS, target=TARGETS,
            include=include, samples=32, windows=options.windows, sequence_length=CONTEXT, device="cpu",
        )  # fmt: skip
        print(f"{name}: dense {tables[name]['dense']}, starved {tables[name]['experts']['starved']}")
        for row in tables[name]["results"]:
            print(f"  {row['target']:4} {row['metric']:10} {next(iter(row['ppl'].values())):8.3f}", flush=True)
    (options.output / "mixture.json").write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
