"""The file of a search: every flipped bit is told or changes nothing, and one process at a time has it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpmetric.commands import COMMANDS
from gpmetric.errors import InputError
from gpmetric.journal import Journal
from gpmetric.options import make_request
from gpmetric.session.search_inputs import SearchInputs

SETTINGS = {"format": 1, "seed": 3}
RECORDS = [{"step": 1, "loss": 0.25}, {"step": 2, "loss": None, "text": "é\n"}]


class Notes(Journal):
    """Keeps its records; a search goes on behind any."""

    def __init__(self, path: Path | None, *, resume: bool = False) -> None:
        self.records: list[dict[str, Any]] = []
        super().__init__(path, "test", SETTINGS, resume=resume)

    def take(self, record: dict[str, Any]) -> bool:
        self.records.append(record)
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    with Notes(path) as journal:
        for record in RECORDS:
            journal.write(record)
    return path


def test_each_line_is_json_and_carries_the_checksum_of_its_record(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    for line, record in zip(lines, [SETTINGS, *RECORDS], strict=True):
        told = json.loads(line)
        content = json.dumps(record).encode()
        assert told.pop("checksum") == hashlib.blake2b(content, digest_size=8).hexdigest()
        assert told == record
    with Notes(path, resume=True) as journal:
        assert journal.records == RECORDS


def test_every_flipped_bit_is_told_or_changes_nothing(path: Path) -> None:
    """All of them. Where the last line loses its end, it counts as one that a kill cut short, as before."""
    content = path.read_bytes()
    told, kept = [], []
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            with Notes(path, resume=True) as journal:
                kept.append(journal.records)
        except InputError as error:
            told.append(str(error))
            assert path.read_bytes() == flipped  # what is refused stays as it was
    assert kept == [RECORDS[:-1]] * 8  # bits of the last line's end
    assert all(re.search("is damaged at line|is no ledger|is another search's", one) for one in told)


def test_a_file_of_the_earlier_format_is_gone_on_with_and_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in [SETTINGS, RECORDS[0]]), encoding="utf-8")
    with caplog.at_level(logging.WARNING), Notes(path, resume=True) as journal:
        assert journal.records == RECORDS[:1]
        journal.write(RECORDS[1])
    assert "is of an earlier format: damage to lines without a checksum is not seen" in caplog.text
    with Notes(path, resume=True) as journal:
        assert journal.records == RECORDS
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 3'))  # of the line that has a checksum
    with pytest.raises(InputError, match="is damaged at line 3"):
        Notes(path, resume=True)


def test_a_line_that_lost_its_checksum_is_damaged(path: Path) -> None:
    head, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + json.dumps(RECORDS[0]).encode() + b"\n" + lines[1])
    with pytest.raises(InputError, match="is damaged at line 2"):
        Notes(path, resume=True)


def test_a_second_writer_is_refused_while_the_first_lives(path: Path) -> None:
    """In this process and in another one; after the death of that one, nobody is in the way."""
    content = path.read_bytes()
    with Notes(path, resume=True), pytest.raises(InputError, match="is in use by another process"):
        Notes(path, resume=True)
    assert path.read_bytes() == content
    code = f"from tests.test_journal import *; Notes(Path({str(path)!r}), resume=True); print(1, flush=True); input()"
    code = code.replace("; Notes", "; kept = Notes")
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(InputError, match="is in use by another process"):
        Notes(path, resume=True)
    other.kill()
    other.communicate()
    with Notes(path, resume=True) as journal:
        assert journal.records == RECORDS


@pytest.mark.parametrize("command", [name for name, row in COMMANDS.items() if issubclass(row.request, SearchInputs)])
def test_a_file_that_is_in_use_is_refused_with_the_options(command: str, path: Path) -> None:
    """By every command that has one, before anything is read."""
    options = {"ledger": path, "resume": True, "output": path.with_name("out"), "sparsity": 0.5}
    with Notes(path, resume=True), pytest.raises(InputError, match=r"^--ledger '.*' is in use by another process"):
        make_request(COMMANDS[command].request, options).check()
    make_request(COMMANDS[command].request, options).check()


def test_two_that_begin_at_once_do_not_share_a_file(tmp_path: Path) -> None:
    with Notes(tmp_path / "a.jsonl", resume=True) as first:
        with pytest.raises(InputError, match=r"in use|exists"):
            Notes(tmp_path / "a.jsonl")
        first.write(RECORDS[0])
    with Notes(tmp_path / "a.jsonl", resume=True) as journal:
        assert journal.records == RECORDS[:1]
