"""How results are written: whole files or none, and refusals before any work."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from gpmetric import files
from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import STDOUT, cache_folder, check_output, check_picture, finite, write_json, write_text


def test_output_that_can_be_written_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    for path in (None, STDOUT, tmp_path / "new.json", tmp_path / "old.json", tmp_path / ("n" * 200)):
        check_output("--json", path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"], "nothing is created by the check"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("", "is a directory; a file is wanted"),
        ("missing/x.json", "does not exist"),
        ("file/x.json", "Not a directory"),
        ("loop", "symbolic links"),
        ("n" * 300, "too long"),
        ("nul\0", "embedded null"),
        ("fifo", "is not a regular file; a file is wanted"),
    ],
)
def test_output_that_cannot_be_written_is_refused(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    path = Path(f"{tmp_path}/{place}")
    with pytest.raises(InputError, match=reason) as caught:
        check_output("--json", path)
    assert str(caught.value).startswith(f"--json {str(path)!r}")
    assert str(caught.value).isprintable()


def test_a_device_is_refused() -> None:
    """Renaming a finished file over /dev/null would be the end of it."""
    with pytest.raises(InputError, match="not a regular file"):
        check_output("--json", Path("/dev/null"))


@pytest.mark.parametrize(("protected", "named"), [("old.json", "old.json"), ("", "")])
def test_read_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protected: str, named: str) -> None:
    """The file, or the folder in which a new one takes its place. Root may write anywhere, hence the stand-in."""
    (tmp_path / "old.json").write_text("{}")
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path / protected)
    with pytest.raises(InputError) as caught:
        check_output("--json", tmp_path / "old.json")
    assert str(caught.value).endswith(f"{str(tmp_path / named)!r} is not writable")


@pytest.mark.parametrize("before", [None, "before"])
def test_write_text_leaves_one_file(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / ("n" * 250)
    if before:
        path.write_text(before)
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["write", "check", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), InputError("no")])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")

    def fail(*args: object, **options: object) -> None:
        raise error

    if moment == "write":
        monkeypatch.setattr(Path, "write_text", fail)
    if moment == "rename":
        monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(GpmetricError if isinstance(error, OSError) else type(error)) as caught:
        write_text(path, "after", fail if moment == "check" else None)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{str(path)!r} cannot be written: No space left on device"
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_check_reads_what_will_be_there(tmp_path: Path) -> None:
    seen: list[str] = []
    write_text(tmp_path / "x.py", "content", lambda partial: seen.append(partial.read_text()))
    assert seen == ["content"]


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    document = {"a": math.nan, "b": [math.inf, 1, (-math.inf, 0.5)], "c": {"d": {1: math.inf}}, "e": "nan", "f": True}
    expected = {"a": None, "b": [None, 1, [None, 0.5]], "c": {"d": {"1": None}}, "e": "nan", "f": True}
    assert finite(document) == expected
    write_json(tmp_path / "x.json", document)
    assert json.loads((tmp_path / "x.json").read_text()) == expected


def test_json_goes_to_standard_output_or_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(None, {"a": 1})
    assert capsys.readouterr().out == ""
    write_json(STDOUT, {"a": 1, "name": "\udcff"})  # a file name that is not UTF-8
    assert json.loads(capsys.readouterr().out) == {"a": 1, "name": "\udcff"}
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed(tmp_path: Path) -> None:
    """What it leads to is written, and the link is left; one to nowhere is a new file."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.json").write_text("{}", encoding="utf-8")
    for name in ("old.json", "new.json"):
        link = tmp_path / f"link-{name}"
        link.symlink_to(tmp_path / "there" / name)
        check_output("--json", link)
        write_text(link, "told")
        assert link.is_symlink()
        assert (tmp_path / "there" / name).read_text(encoding="utf-8") == "told"
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "a.json")
    with pytest.raises(InputError, match=r"the directory '.*nowhere' does not exist"):
        check_output("--json", tmp_path / "lost")
    with pytest.raises(InputError, match=r"device|not a regular file"):
        check_output("--json", Path("/dev/stdout"))


@pytest.mark.parametrize("name", ["x.png", "x.PDF", "a.b/c.png"])
def test_formats_that_plots_are_written_in(name: str) -> None:
    check_picture("--plot", Path(name))


@pytest.mark.parametrize("name", ["x", "x.gif", "x.png.txt", "png"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^--plot '{name}' must end in \.png or \.pdf$"):
        check_picture("--plot", Path(name))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is another")
def test_the_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gpmetric"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gpmetric"
