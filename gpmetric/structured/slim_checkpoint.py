"""Writing a slimmed model and reading it again in a fresh process before anything is said to be done."""

from __future__ import annotations

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
from gpmetric.files import write_text
from gpmetric.models import Model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.checkpoint import tensors
from gpmetric.pruning.manifest import write_manifest
from gpmetric.pruning.output_folder import files_of
from gpmetric.pruning.taken_over import copy_licence, front_matter, measured, titled
from gpmetric.structured.export import Slimmed, in_float32, write_model
from gpmetric.structured.request import FORMATS, SlimRequest
from gpmetric.structured.scores import UnitSession
from gpmetric.structured.shrink import Shrinker

__all__ = ["COMPARED", "describe_slim", "write_slimmed"]

Json = Mapping[str, Any]

_GENERATED = 8  # tokens that a written model has to generate
COMPARED = 2  # windows whose logits are compared
# Largest difference of a logit in float32, in the largest logit: another order of the same sums. In bfloat16 it was
# 0.054 for SmolLM2-135M, which says nothing.
_CLOSE = 1e-4

_CARD = """{head}

# {name}, slimmed

{removed:.1%} of the parameters inside the blocks are gone ({before:,} parameters before, {after:,} now; `{form}`).
Made by gpmetric {version}; `{manifest}` says how. {opening}

{table}
"""


def describe_slim(request: SlimRequest, units: UnitSession) -> dict[str, Any]:
    """What the manifest says of how a model was made."""
    names = ("budget", "cost", "estimator", "objective", "start", "add_bias", "multiple_of")
    windows = units.session.windows
    described = {name: value for name, value in units.session.describe().items() if name != "device"}
    described |= {name: getattr(request, name) for name in names}
    return described | {
        "digest": units.model.digest,
        "format": request.form,
        "repair": request.mended,
        "granularity": list(request.granularity),
        "asked": request.sparsity,
        "update": "none",
        "calibration": windows["calibration"].describe(),
        "search": windows["search"].describe(),
        "text": windows["validation"].describe(),
    }


def write_slimmed(
    model: Model, shrinker: Shrinker, slimmed: Slimmed, form: str, folder: Path, validation: Windows, made: Json
) -> dict[str, Any]:
    """Writes a model, reads it in a fresh process, and writes and returns its manifest.

    Args:
        form: a key of FORMATS.
        folder: empty.
        validation: windows that the reloaded model is measured on.
        made: what the manifest says of how it was made.

    Raises:
        GpmetricError: the reloaded model is not the one that was found, or does not generate.
        OSError, SafetensorError: the files cannot be written.
    """
    before = sum(parameter.numel() for parameter in model.module.parameters())
    write_model(model, shrinker, slimmed, form, folder)
    reloaded = _reloaded(folder, validation.tokens, model)
    gap = _check_reloaded(model, slimmed, validation.tokens, reloaded)
    manifest = _manifest(slimmed, folder, made, reloaded) | {"logits_off": gap}
    with shrinker.keeping(slimmed.kept, slimmed.repairs):
        manifest["perplexity_before_writing"] = perplexity(mean_loss(model, validation.tokens))
    assert model.folder is not None
    copy_licence(model.folder, folder)
    card = _CARD.format(
        head=front_matter(model, ("pruning", "structured-pruning", "gpmetric")),
        table=measured(model, manifest),
        name=titled(Path(model.name).name),
        removed=made["sparsity"],
        before=before,
        after=manifest["parameters_after"],
        form=form,
        version=made["versions"]["gpmetric"],
        manifest=MANIFEST,
        opening=FORMATS[form].opening,
    )
    write_text(folder / "README.md", card)
    return write_manifest(folder, manifest)


def _manifest(slimmed: Slimmed, folder: Path, made: Json, reloaded: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a manifest says of how a model was made and of what was written, but the files' digests."""
    weights = [name for name in files_of(folder) if name.endswith(".safetensors")]
    return {
        "version": 1,
        "kind": "slim",
        **made,
        "parameters_after": int(reloaded["parameters"]),
        "perplexity": perplexity(float(reloaded["loss"])),
        "generated": reloaded["generated"].tolist(),
        "widths": slimmed.widths(),
        "repaired": len(slimmed.repairs),
        "bytes": sum((folder / name).stat().st_size for name in weights),
        "layers": [],
        "tensors": sorted(tensors(folder)),
    }


def _check_reloaded(model: Model, slimmed: Slimmed, tokens: Tensor, reloaded: Mapping[str, Tensor]) -> float:
    """Refuses a written model that is not the one that was found; the largest difference of a logit, in the largest.

    Both are run in float32, whatever the dtype of the search.
    """
    model, shrinker, slimmed = in_float32(model, slimmed, model.device.type)
    with torch.no_grad(), shrinker.masking(slimmed.kept, slimmed.repairs):  # [windows, length, vocabulary]
        logits = model.module(input_ids=tokens[:COMPARED].to(model.device), use_cache=False).logits
    expected = logits.float().cpu()
    gap = float((reloaded["logits"] - expected).abs().max() / expected.abs().max())
    if not gap <= _CLOSE:
        raise GpmetricError(f"the written model is not the one that was found: its logits are off by {gap:.2g}")
    if len(reloaded["generated"]) != _GENERATED:
        raise GpmetricError(f"the written model generated {len(reloaded['generated'])} tokens, not {_GENERATED}")
    return gap


def _reloaded(folder: Path, tokens: Tensor, model: Model) -> dict[str, Tensor]:
    """What a fresh process finds, if it ends well: logits, loss, number of parameters, tokens that it generates."""
    with tempfile.TemporaryDirectory() as place:
        asked, told = Path(place) / "asked.safetensors", Path(place) / "told.safetensors"
        save_file({"tokens": tokens.contiguous(), "compared": tokens[:COMPARED].clone()}, asked)
        command = [sys.executable, "-m", "gpmetric.structured.reload", str(folder), str(asked), str(told)]
        command += [model.dtype, model.device.type, str(_GENERATED)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            raise GpmetricError(f"the written model cannot be used in a fresh process: {lines[-1]}")
        return dict(load_file(told))
