"""`python -m gpmetric.structured.reload FOLDER ASKED TOLD DTYPE DEVICE COUNT`: a written model in its own process.

ASKED holds `tokens` [windows, length], to be measured on, and `compared`, whose logits in float32 are wanted, whatever
DTYPE is; TOLD is written. COUNT tokens are generated.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.loading import load_model

__all__ = ["main"]


def main(folder: str, asked: str, told: str, dtype: str, device: str, count: str) -> None:
    """Loads without trust, computes logits and loss, generates."""
    model = load_model(folder, device=device, dtype=dtype)
    given = load_file(asked)
    start = given["compared"][:1, : int(count)].to(model.device)
    with torch.no_grad():
        generated = model.module.generate(
            start, max_new_tokens=int(count), min_new_tokens=int(count), do_sample=False, use_cache=True
        )
    found = {
        "loss": torch.tensor(mean_loss(model, given["tokens"]), dtype=torch.float64),
        "parameters": torch.tensor(sum(parameter.numel() for parameter in model.module.parameters())),
        "generated": generated[0, start.shape[1] :].cpu(),
    }
    if dtype != "float32":
        del model  # one is in memory at a time
        gc.collect()
        model = load_model(folder, device=device, dtype="float32")
    with torch.no_grad():
        logits = model.module(input_ids=given["compared"].to(model.device), use_cache=False).logits
    save_file(found | {"logits": logits.float().cpu()}, Path(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
