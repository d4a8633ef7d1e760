"""Figures that others published, with the protocol that each was measured by: what `gpmetric reproduce` runs again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PUBLISHED", "Study"]

_C4 = "hf:allenai/c4/en/c4-train.00000-of-01024.json.gz:train"
_WIKITEXT = "hf:Salesforce/wikitext/wikitext-2-raw-v1"


@dataclass(frozen=True)
class Study:
    """A model, a protocol, and perplexities.

    Attributes:
        source: where the figures stand.
        model: its name on the Hub.
        sequence_length: tokens of a window.
        figures: by metric and target, the perplexity on WikiText-2's test text, joined by two newlines.
        dense: of the model as it is; None where it is not told.
        calibration: text of 128 windows, each inside a random document; seed 0.
    """

    source: str
    model: str
    sequence_length: int
    figures: Mapping[tuple[str, str], float]
    dense: float | None = None
    calibration: str = _C4
    text: str = f"{_WIKITEXT}:test"


_GBLM = "Das et al. 2023 (GBLM-Pruner), table 1"

PUBLISHED: dict[str, Study] = {
    "llama-7b": Study(
        "Sun et al. 2023 (Wanda), table 3; GBLM-Pruner's and RIA's papers for theirs", "huggyllama/llama-7b", 2048,
        {
            ("magnitude", "0.5"): 17.29, ("sparsegpt", "0.5"): 7.22, ("wanda", "0.5"): 7.26, ("gblm_l1", "0.5"): 7.15,
            ("ria", "0.5"): 7.12,
        },
        dense=5.68,
    ),
    "llama-2-7b": Study(
        "Sun et al. 2023 (Wanda), tables of Llama-2 at the model's own length", "meta-llama/Llama-2-7b-hf", 4096,
        {
            ("magnitude", "0.5"): 14.89, ("sparsegpt", "0.5"): 6.51, ("wanda", "0.5"): 6.42,
            ("magnitude", "4:8"): 16.48, ("sparsegpt", "4:8"): 8.12, ("wanda", "4:8"): 7.97,
            ("magnitude", "2:4"): 54.59, ("sparsegpt", "2:4"): 10.17, ("wanda", "2:4"): 11.02,
        },
        dense=5.12,
    ),
    "gblm-llama-2-7b": Study(_GBLM, "meta-llama/Llama-2-7b-hf", 2048, {("gblm_l1", "0.5"): 6.86}),
    "gblm-llama-2-13b": Study(_GBLM, "meta-llama/Llama-2-13b-hf", 2048, {("gblm_l1", "0.5"): 5.88}),
    "gblm-llama-2-70b": Study(_GBLM, "meta-llama/Llama-2-70b-hf", 2048, {("gblm_l1", "0.5"): 4.17}),
    "pruner-zero-llama-2-7b": Study(
        "Dong et al. 2024 (Pruner-Zero), calibrated on WikiText-2's training text", "meta-llama/Llama-2-7b-hf", 2048,
        {("pruner_zero", "0.5"): 6.95, ("sparsegpt", "0.5"): 6.73, ("wanda", "0.5"): 7.09},
        calibration=f"{_WIKITEXT}:train",
    ),
}  # fmt: skip
