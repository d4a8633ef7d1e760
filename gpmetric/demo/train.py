"""Trains the embedded demo model: `python -m gpmetric.demo.train --output DIR` (about an hour on one CPU core).

A byte-level BPE tokenizer and a small Llama are fitted to the training split of the demo text; README.md in this folder
records the run that made the model in the repository.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpmetric.demo.text import demo_text

__all__ = ["main", "new_model", "train_model", "train_tokenizer"]

CONTEXT = 256
BATCH = 8
PEAK_RATE = 4e-3  # at 64 to 96 wide; 2e-3 at 192 (5e-3 diverged there in trial runs)
END_TOKEN = "<|endoftext|>"


def train_tokenizer(text: str, vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` entries, one of them a token that ordinary text never yields."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.split("\n\n"), vocab_size=vocabulary, special_tokens=[END_TOKEN], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END_TOKEN, bos_token=END_TOKEN, model_max_length=CONTEXT
    )


def new_model(vocabulary: int, width: int, blocks: int) -> LlamaForCausalLM:
    """An untrained Llama, grouped-query attention, tied embeddings, residual projections scaled as in GPT-2.

    Args:
        vocabulary: entries of the tokenizer.
        width: of the residual stream, a multiple of 24.
        blocks: transformer blocks.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8 * (width // 3),
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * blocks))
    return model


def train_model(model: LlamaForCausalLM, tokens: Tensor, steps: int, seed: int) -> float:
    """Trains in place on random windows of the tokens.

    Args:
        model: left in training mode.
        tokens: [n], int64, n above the context of 256.
        steps: optimizer steps of 8 windows.
        seed: of the windows drawn.

    Returns:
        Mean loss of the last 200 steps, in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * _schedule(step, steps)
        offsets = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([tokens[at : at + CONTEXT] for at in offsets])  # [batch, context]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 500 == 499:
            recent = sum(losses[-500:]) / 500
            print(f"step {step + 1:6}/{steps}  loss {recent:.4f}  {time.monotonic() - start:6.0f} s", flush=True)
    tail = losses[-200:]
    return sum(tail) / len(tail)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to 3 %."""
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def main() -> None:
    """The script: trains tokenizer and model, and writes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--steps", type=int, default=16000, help="optimizer steps of 8 windows of 256 tokens")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    text = demo_text("train")
    tokenizer = train_tokenizer(text, options.vocabulary)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    model = new_model(len(tokenizer), options.width, options.blocks)
    blocks = sum(weight.numel() for weight in model.model.layers.parameters())
    print(
        f"{len(tokens):,} training tokens, {model.num_parameters():,} parameters, {blocks:,} in the blocks", flush=True
    )
    loss = train_model(model, tokens, options.steps, options.seed)
    print(f"final training loss {loss:.4f} nats per token after {options.steps * BATCH * CONTEXT:,} tokens")
    model.half().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
