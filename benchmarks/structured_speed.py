"""What a smaller model is worth: parameters, file size, peak memory and tokens per second, before and after."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import peak_memory, row
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gpmetric.demo.text import demo_text
from gpmetric.errors import GpmetricError
from gpmetric.loading import DEMO_MODEL, load_model
from gpmetric.structured.slim import slim

TOKENS = 512  # of the prefill that is timed, at most
DECODED = 32  # tokens that are generated, one by one, after a few


def speed_rows(blocks: int, width: int, sparsity: float, repeats: int) -> list[dict[str, str]]:
    """Rows of results.csv for a random Llama and what `slim` makes of it, in each format that is smaller."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense, text = folder / "dense", folder / "text.txt"
        random_llama(blocks, width, dense)
        text.write_text(demo_text("calibration"), encoding="utf-8")
        found = {"dense": in_process(dense, repeats)}
        for form in ("hetero", "uniform"):
            slim(
                str(dense), output=folder / form, calibration=str(text), sparsity=sparsity, format=form, steps=1,
                samples=2, search_windows=2, windows=2, batch=1, sequence_length=64, repair="none",
            )  # fmt: skip
            found[form] = in_process(folder / form, repeats)
    rows = []
    for name, measured in found.items():
        case = f"random Llama {blocks}x{width}, {sparsity:g} of the blocks gone: {name}"
        for unit in ("parameters", "bytes", "MiB peak", "tokens/s", "tokens/s decoded"):
            base = float(np.median(found["dense"][unit]))
            rows.append(row("structured size", f"{case}, {unit}", np.array(measured[unit]), base, unit))
            print(f"{case}: {np.median(measured[unit]):,.0f} {unit}, {np.median(measured[unit]) / base:.3f} of dense")
    return rows


def random_llama(blocks: int, width: int, folder: Path) -> None:
    """Shapes as of Llama-2 with grouped queries: heads of 64, four to a group, an MLP of 2.75 widths."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, head_dim=64, max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def in_process(folder: Path, repeats: int) -> dict[str, list[float]]:
    """`measure` in a process of its own, whose memory is the model's."""
    script = Path(__file__).with_name("bench_structured.py")
    command = [sys.executable, str(script), "--measured", str(folder), "--repeats", str(repeats)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        raise GpmetricError(f"{folder.name} cannot be measured: {run.stderr.strip().splitlines()[-1]}")
    found: dict[str, list[float]] = json.loads(run.stdout)
    return found


@torch.no_grad()
def measure(folder: str, repeats: int) -> dict[str, Any]:
    """Of a written model: parameters, bytes of its weights, peak memory of the process, tokens per second.

    The latter of a prefill, and of decoding with a cache.
    """
    model = load_model(folder)
    length = min(TOKENS, model.context)
    tokens = torch.arange(length, device=model.device)[None] % model.vocabulary
    speeds, decoded = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model.module(input_ids=tokens, use_cache=False, logits_to_keep=1).logits.sum().item()
        between = time.perf_counter()
        model.module.generate(tokens[:, :8], min_new_tokens=DECODED, max_new_tokens=DECODED, do_sample=False)
        decoded.append(DECODED / (time.perf_counter() - between))
        speeds.append(length / (between - start))
    return {
        "parameters": [sum(one.numel() for one in model.module.parameters())],
        "bytes": [sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))],
        "MiB peak": [peak_memory()],
        "tokens/s": speeds[1:],
        "tokens/s decoded": decoded[1:],
    }
