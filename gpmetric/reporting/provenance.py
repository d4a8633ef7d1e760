"""What a result rests on, as tables: model, options, texts with their fingerprints, versions, and where time went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpmetric.reporting.blocks import Block, Figure, Section, Table, told
from gpmetric.reporting.charts import bars

__all__ = ["provenance"]

_FACTS = (  # keys of a result -> what they are
    ("model", "model"), ("model_sha256", "digest of the model"), ("digest", "digest of the model"),
    ("dtype", "dtype"), ("statistics_dtype", "dtype of statistics"), ("device", "device"), ("seed", "seed"),
    ("targets", "targets"), ("target", "target"), ("update", "update"), ("fit", "fit"), ("objective", "objective"),
    ("group", "comparison group"), ("protocol", "protocol"), ("sequence_length", "tokens of a window"),
    ("sampling", "sampling of windows"), ("shuffle", "windows drawn at random"), ("bos", "begin of text"),
    ("unit", "unit of excess"), ("left_out", "layers left dense"), ("manifest_sha256", "digest of the manifest"),
)  # fmt: skip
_TEXTS = ("calibration", "search", "validation", "text")


def provenance(document: Mapping[str, Any], more: Mapping[str, str] = {}) -> Section:
    """The section of a result's document, and of what else is known."""
    rows = [(name, _spelled(document[key])) for key, name in _FACTS if document.get(key) not in (None, [], {})]
    rows += list(more.items())
    blocks: list[Block] = [Table("What it was made with", ("", "value"), rows, words=2, code=frozenset({1}))]
    if texts := list(_texts(document)):
        columns = ("read for", "text", "SHA-256", "windows", "tokens")
        blocks.append(Table("Texts and their fingerprints", columns, texts, words=3, code=frozenset({2})))
    if versions := document.get("versions"):
        blocks.append(Table("Versions", ("package", "version"), list(versions.items()), words=2))
    seconds = document.get("seconds")
    steps = [(name, value) for name, value in seconds.items() if isinstance(value, float) and name != "total"] \
        if isinstance(seconds, Mapping) else []  # fmt: skip
    if steps:
        drawn = bars("Seconds by step", [(name, value, "plain", f"{value:,.1f} s") for name, value in steps])
        total = seconds.get("total") if isinstance(seconds, Mapping) else None
        blocks.append(Figure(drawn, f"Where the time went{'' if total is None else f'; {total:,.0f} s in all'}."))
    return Section("provenance", "Provenance", blocks)


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_spelled(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_spelled, value[:20])) + (f" and {len(value) - 20} more" if len(value) > 20 else "")
    return told(value) if isinstance(value, (bool, float)) else str(value)


def _texts(document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each text, of several models for each of theirs."""
    splits = document.get("splits", {})
    nested = splits and all("sha256" not in one for one in splits.values())
    by_model = splits if nested else {"": splits}
    for model, found in by_model.items():
        for split, one in found.items():
            yield _text(f"{model} {split}".strip(), one)
    for name in _TEXTS:
        if isinstance(one := document.get(name), Mapping) and "sha256" in one:
            yield _text(name, one)
    for one in document.get("texts", ()):
        yield _text("figures", one)


def _text(split: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    return split, str(one["text"]), str(one["sha256"]), told(one["windows"]), told(one["tokens"])
