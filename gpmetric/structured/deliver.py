"""Writing a slimmed model and reading it again in a fresh process before anything is said to be done."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpmetric.data import Windows
from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.models import Model
from gpmetric.provenance import finite, write_text
from gpmetric.pruning.checkpoint import MANIFEST, file_digest, files_of, printable, tensors
from gpmetric.structured.export import Slimmed, write_model
from gpmetric.structured.shrink import Shrinker

__all__ = ["deliver"]

_GENERATED = 8  # tokens that a written model has to generate
_COMPARED = 2  # windows whose logits are compared
# largest difference of a logit, in the largest logit: another order of the same sums
_CLOSE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruning, structured-pruning, gpmetric]
---

# {name}, slimmed

{removed:.1%} of the parameters inside the blocks are gone ({before:,} parameters before, {after:,} now; `{form}`).
Made by gpmetric {version}; `{manifest}` says how. {opening}
"""
_OPENING = {
    "hetero": "Its layers differ in width: open it with `gpmetric.load(DIR)`, or with transformers and "
    "`trust_remote_code=True`, which runs the modelling file beside this card.",
    "uniform": "It is a stock model of smaller shapes: transformers opens it as any other.",
    "padded": "It has the original shapes, with zeros: transformers opens it as any other.",
}


def deliver(
    model: Model,
    shrinker: Shrinker,
    slimmed: Slimmed,
    kind: str,
    folder: Path,
    validation: Windows,
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes a model, reads it in a fresh process, and writes and returns its manifest.

    Args:
        kind: a key of FORMATS.
        folder: empty.
        validation: windows that the reloaded model is measured on.
        made: what the manifest says of how it was made.

    Raises:
        GpmetricError: the reloaded model is not the one that was found, or does not generate.
        OSError, SafetensorError: the files cannot be written.
    """
    before = sum(parameter.numel() for parameter in model.module.parameters())
    write_model(model, shrinker, slimmed, kind, folder)
    found = _reloaded(folder, validation.tokens, model)
    expected = _masked_logits(model, shrinker, slimmed, validation.tokens[:_COMPARED])
    gap = float((found["logits"] - expected).abs().max() / expected.abs().max())
    if not gap <= _CLOSE[model.dtype]:
        raise GpmetricError(f"the written model is not the one that was found: its logits are off by {gap:.2g}")
    if len(found["generated"]) != _GENERATED:
        raise GpmetricError(f"the written model generated {len(found['generated'])} tokens, not {_GENERATED}")
    with shrinker.keeping(slimmed.kept, slimmed.repairs):
        loss = mean_loss(model, validation.tokens)
    after = int(found["parameters"])
    result = (
        {"version": 1, "kind": "slim"}
        | dict(made)
        | {
            "parameters_after": after,
            "perplexity": perplexity(float(found["loss"])),
            "perplexity_before_writing": perplexity(loss),
            "generated": found["generated"].tolist(),
            "logits_off": gap,
            "widths": slimmed.widths(),
            "repaired": len(slimmed.repairs),
            "bytes": sum((folder / name).stat().st_size for name in files_of(folder) if name.endswith(".safetensors")),
            "layers": [],
        }
    )
    card = _CARD.format(
        name=printable(Path(model.name).name),
        removed=made["sparsity"],
        before=before,
        after=after,
        form=kind,
        version=made["versions"]["gpmetric"],
        manifest=MANIFEST,
        opening=_OPENING[kind],
    )
    write_text(folder / "README.md", card)
    result["tensors"] = sorted(tensors(folder))
    result["files"] = {name: file_digest(folder / name) for name in files_of(folder)}
    write_text(folder / MANIFEST, json.dumps(finite(result), indent=1, allow_nan=False) + "\n")
    return result


def _reloaded(folder: Path, tokens: Tensor, model: Model) -> dict[str, Tensor]:
    """What a fresh process finds: logits, loss, number of parameters, tokens that it generates.

    Raises:
        GpmetricError: it does not end well.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, told = Path(place) / "asked.safetensors", Path(place) / "told.safetensors"
        save_file({"tokens": tokens.contiguous(), "compared": tokens[:_COMPARED].clone()}, asked)
        command = [sys.executable, "-m", "gpmetric.structured.reload"]
        run = subprocess.run(
            [*command, str(folder), str(asked), str(told), model.dtype, model.device.type, str(_GENERATED)],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            raise GpmetricError(f"the written model cannot be used in a fresh process: {lines[-1]}")
        return load_file(told)


@torch.no_grad()
def _masked_logits(model: Model, shrinker: Shrinker, slimmed: Slimmed, tokens: Tensor) -> Tensor:
    """Logits of the dense shapes with what is gone masked, [windows, length, vocabulary]."""
    with shrinker.masking(slimmed.kept, slimmed.repairs):
        logits: Tensor = model.module(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().cpu()
