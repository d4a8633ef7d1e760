"""The demo's text: the same for everybody under one Python, and no document in two splits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gpmetric.demo import text as demo
from gpmetric.demo.text import SPLITS, demo_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_shares_add_up() -> None:
    assert sum(SPLITS.values()) == 100
    assert list(SPLITS) == ["train", "calibration", "search", "validation", "test"]


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_large_enough(split: str) -> None:
    content = demo_text(split)
    assert len(content.encode()) >= 300_000
    assert content.encode().decode() == content
    assert demo_text(split) is content  # read once


def test_no_document_is_in_two_splits() -> None:
    """Lines that only one document has: each of them must be in the text of that document's split alone."""
    documents: dict[str, set[str]] = {}
    for name, content in demo._documents():
        documents.setdefault(name, set()).update(line for line in content.split("\n") if len(line) >= 40)
    owners = Counter(line for lines in documents.values() for line in lines)
    splits = {split: set(demo_text(split).split("\n")) for split in SPLITS}
    found = Counter[str]()
    for name, lines in documents.items():
        unique = {line for line in lines if owners[line] == 1}
        holders = [split for split, content in splits.items() if unique & content]
        assert len(holders) == bool(unique), (name, holders)
        assert all(unique <= splits[split] for split in holders), name
        found.update(holders)
    assert sum(found.values()) > 500
    assert min(found.values()) > 20


def test_every_split_begins_with_many_documents() -> None:
    """20 windows of 256 tokens are some 15,000 characters: they must not be one or two modules."""
    for split in SPLITS:
        start = set(demo_text(split)[:15_000].split("\n"))
        documents = {
            name for name, content in demo._documents() if start & {x for x in content.split("\n") if len(x) > 60}
        }
        assert len(documents) >= 4, split


def test_the_text_is_the_same_in_every_process() -> None:
    """Neither the order of sets and files nor what else is loaded (pytest, here) matters."""
    command = [sys.executable, "-m", "gpmetric.demo.text"]
    environment = os.environ | {"PYTHONHASHSEED": "12345", "LC_ALL": "C"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0]: row[-1] for row in rows} == {
        split: hashlib.sha256(demo_text(split).encode()).hexdigest()[:16] for split in SPLITS
    }
    assert {row[0]: int(row[1].replace(",", "")) for row in rows} == {name: len(demo_text(name)) for name in SPLITS}


def test_an_unknown_split() -> None:
    with pytest.raises(KeyError, match="tset"):
        demo_text("tset")
