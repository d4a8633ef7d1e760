"""`gpmetric ledger free`, and the warning of network file systems."""

from __future__ import annotations

import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gpmetric.errors import InputError, LedgerError
from gpmetric.evolution import driver_lock, network_files
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.ledger_check import check_ledger, free_ledger
from gpmetric.evolution.network_files import network_file_system
from tests.test_ledger import Clock

SETTINGS = {"seed": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, SETTINGS, resume=False).close()
    return path


def own(path: Path, host: str = "", started: str = "earlier", pid: int = 0) -> None:
    with closing(sqlite3.connect(path)) as connection:
        row = (host or socket.gethostname(), pid or os.getpid(), started)
        connection.execute("INSERT INTO owner VALUES (1, ?, ?, ?, 'token', 1e9)", row)
        connection.commit()


def elsewhere() -> dict[str, str]:
    """A driver in another namespace of process numbers of this boot."""
    boot, _, tick = driver_lock._start_of(os.getpid()).split("/")
    return {"started": f"{boot}/pid:[7]/{tick}"}


def test_a_ledger_of_nobody_is_free(path: Path) -> None:
    assert free_ledger(path) == {"ledger": str(path), "freed": False, "owner": None}


def test_a_driver_that_has_ended_here_is_known_to(path: Path) -> None:
    own(path)
    assert free_ledger(path)["owner"] == {"pid": os.getpid(), "host": socket.gethostname(), "state": "ended"}
    assert check_ledger(path)["ok"]


def test_a_driver_that_lives_keeps_it(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=True) as ledger:
        with pytest.raises(LedgerError, match=f"in use by process {os.getpid()} on host"):
            free_ledger(path)
        ledger.commit_generation(0, [], [])  # it is still the owner


@pytest.mark.parametrize("columns", [{"host": "elsewhere"}, elsewhere()], ids=["host", "namespace"])
def test_a_driver_elsewhere_is_watched_for_a_minute(
    path: Path, columns: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own(path, **columns)
    assert check_ledger(path)["owner"]["state"] == "elsewhere"
    assert check_ledger(path)["ok"]  # nothing tells that it has ended
    clock = Clock(1e9, path)
    monkeypatch.setattr(driver_lock, "time", clock)
    assert free_ledger(path)["freed"]
    assert 60 < clock.now < 63
    (told,) = caplog.messages
    assert told.endswith("it is watched for a minute")
    Ledger.open(path, SETTINGS, resume=True).close()


@pytest.mark.parametrize("columns", [{"host": "elsewhere"}, elsewhere()], ids=["host", "namespace"])
def test_a_driver_elsewhere_that_is_heard_of_keeps_it(
    path: Path, columns: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its clock was put back."""
    own(path, **columns)
    monkeypatch.setattr(driver_lock, "time", Clock(1e9, path, beats_at=(30.0,), wall_there=9e8))
    with pytest.raises(LedgerError, match="which is heard of"):
        free_ledger(path)
    assert check_ledger(path)["owner"] is not None


def test_one_that_comes_while_another_is_watched_keeps_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(path, host="elsewhere")
    watched = driver_lock.watch

    def other(connection: sqlite3.Connection) -> driver_lock.Owner | None:
        found = watched(connection)
        with closing(sqlite3.connect(path)) as another:
            another.execute("UPDATE owner SET token = 'another'")
            another.commit()
        return found

    monkeypatch.setattr(driver_lock, "time", Clock(1e9, path))
    monkeypatch.setattr(driver_lock, "watch", other)
    with pytest.raises(LedgerError, match="is in use by process"):
        free_ledger(path)


def test_an_owner_that_is_no_row_of_ours_is_told_in_a_line(path: Path) -> None:
    own(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE owner SET started = x'00'")
        connection.commit()
    for use in (free_ledger, lambda one: Ledger.open(one, SETTINGS, resume=True)):
        with pytest.raises(LedgerError, match=r"is damaged: started is b'.x00'$"):
            use(path)
    assert check_ledger(path)["problems"] == [r"does not tell whose it is: is damaged: started is b'\x00'"]


def test_what_is_no_ledger_is_not_freed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        free_ledger(tmp_path / "none")
    (tmp_path / "text").write_text("text" * 2000)
    with pytest.raises(LedgerError, match="file is not a database"):
        free_ledger(tmp_path / "text")


# Network file systems

MOUNTS = """/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local xfs rw 0 0
//nas/my\\040data /mnt/my\\040data cifs rw 0 0
me@host: /mnt/ssh fuse.sshfs rw 0 0
mergerfs /mnt/disks fuse.mergerfs rw 0 0
lustre /scratch lustre rw 0 0
share /host 9p rw 0 0
/dev/vdc /over ext4 rw 0 0
gpfs /over gpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/ledger.sqlite", ""),
        ("/home/me/a.sqlite", "nfs4"),
        ("/home/local/a.sqlite", ""),
        ("/homes/a.sqlite", ""),
        ("/mnt/my data/a.sqlite", "cifs"),
        ("/mnt/ssh/a.sqlite", "fuse.sshfs"),
        ("/mnt/disks/a.sqlite", ""),
        ("/scratch/a.sqlite", "lustre"),
        ("/host/a.sqlite", "9p"),
        ("/over/a.sqlite", "gpfs"),
    ],
)
def test_a_network_file_system_is_known(place: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(network_files, "_MOUNTS", tmp_path / "mounts")
    assert network_file_system(Path(place)) == kind


def test_who_writes_there_is_warned_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (path.parent / "mounts").write_text(f"server:/x {path.parent} nfs rw 0 0\n")
    monkeypatch.setattr(network_files, "_MOUNTS", path.parent / "mounts")
    Ledger.read(path).close()
    assert caplog.messages == []
    with Ledger.open(path, SETTINGS, resume=True) as ledger:
        ledger.measure([])
    (told,) = caplog.messages
    assert told.startswith(f"ledger {path} is on a network file system (nfs), ")
    assert told.endswith("name a --ledger on a local disk, and copy it when the campaign is done")
