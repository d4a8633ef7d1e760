"""`gpmetric report` without a browser: every input, hostile names, the policy, sizes, and the server of a live page."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gpmetric import report
from gpmetric.errors import InputError
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.live_page import LivePage
from gpmetric.reporting.axes import Axis, ticks
from gpmetric.reporting.charts import bars, heat_map, lines
from gpmetric.reporting.formula import view_formula
from gpmetric.reporting.layers import layer_map
from gpmetric.reporting.live import LiveServer, Served
from gpmetric.reporting.request import ReportRequest
from tests.report_inputs import GOLDEN, HOSTILE, RESULTS, SETTINGS, changed, make_ledger

LEDGERS = sorted(GOLDEN.glob("ledger-*.sqlite"))
SECTIONS = {
    "allocate": {"picked", "front", "sparsity", "next", "provenance"},
    "bench": {"model-0", "provenance"},
    "bench-models": {"transfer", "model-0", "model-1", "provenance-0", "provenance-1"},
    "discover": {"winner", "test", "front", "saved", "interval", "provenance"},
    "prune": {"sparsity", "next", "provenance"},
    "slim": {"stays", "starts", "next", "provenance"},
    "tune": {"parts", "convergence", "candidates", "next", "provenance"},
    "tune-units": {"parts", "convergence", "candidates", "next", "provenance"},
}


class Reader(HTMLParser):
    """What a browser would make of a page: its elements, and what is in scripts and styles."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: list[tuple[str, str]] = []  # of an element, its text
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.inside[-1] if self.inside else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def rows(self) -> dict[str, Any]:
        """The candidates that the script shows."""
        found: dict[str, Any] = json.loads(next(text for tag, text in self.texts if text.startswith('{"total"')))
        return found


def page(source: Path, tmp_path: Path) -> tuple[dict[str, Any], str]:
    told = report(source, output=tmp_path / "page.html")
    return told, (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_of_result(name: str, tmp_path: Path) -> None:
    told, content = page(RESULTS[name], tmp_path)
    assert set(told["sections"]) == SECTIONS[name]
    assert told["bytes"] == len(content.encode())
    assert_self_contained(content)


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.stem)
def test_ledgers_of_every_version(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "a.sqlite")
    told, content = page(tmp_path / "a.sqlite", tmp_path)
    assert {"winner", "convergence", "front", "candidates", "provenance"} <= set(told["sections"])
    assert ("test" in told["sections"]) == path.stem.endswith("-finished")
    assert_self_contained(content)


@pytest.mark.parametrize(
    ("path", "sections", "told"),
    [
        (GOLDEN / "report" / "bench.jsonl", ["rows"], "8 rows of a bench are measured"),
        (GOLDEN / "report" / "tune.jsonl", ["convergence", "candidates", "provenance"], "recipes are measured"),
        (GOLDEN / "slim.jsonl", ["convergence", "provenance"], "The search is at step "),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_files_of_searches(path: Path, sections: list[str], told: str, tmp_path: Path) -> None:
    found, content = page(path, tmp_path)
    assert found["sections"] == sections
    assert told in found["verdict"]
    assert_self_contained(content)


def test_files_of_searches_that_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds nothing to show: the --json of its command has more"):
        report(GOLDEN / "allocate.jsonl", output=tmp_path / "page.html")
    content = (GOLDEN / "report" / "bench.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(content.replace("27.7", "17.7"))
    with pytest.raises(InputError, match=r"a\.jsonl' is damaged at line 2"):
        report(tmp_path / "a.jsonl", output=tmp_path / "page.html")
    (tmp_path / "a.jsonl").write_text(content[:1000])  # cut short while it was written
    assert "3 rows" in report(tmp_path / "a.jsonl", output=tmp_path / "page.html")["verdict"]
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match="holds no whole line"):
        report(tmp_path / "a.jsonl", output=tmp_path / "page.html")


def assert_self_contained(content: str) -> None:
    """Nothing outside is named, the policy allows exactly the script and style that are there, ids are unique."""
    read = Reader(content)
    policy = next(str(one["content"]) for one in read.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        running = [text for inside, text in read.texts if inside == tag and not text.startswith('{"total"')]
        digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in running]
        assert re.search(rf"{tag}-src ([^;]*);", policy)[1] == " ".join(f"'sha256-{one}'" for one in digests)  # type: ignore[index]
    assert "unsafe" not in policy
    for tag, attributes in read.elements:
        assert not any(name == "style" or name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "xlink:href", "srcset", "data"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:,")), (tag, attributes)
    links = re.findall(r"https?://[^\s\"'<]*", content)
    assert set(links) <= {"http://www.w3.org/1998/Math/MathML"}  # a name, which nothing is loaded from
    names = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(names) == len(set(names))
    labelled = [str(one["aria-labelledby"]) for _, one in read.elements if "aria-labelledby" in one]
    assert set(labelled) <= set(names)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", RESULTS)
def test_hostile_names_are_shown_and_do_nothing(name: str, tmp_path: Path) -> None:
    _, plain = page(RESULTS[name], tmp_path)
    _, content = page(changed(RESULTS[name], tmp_path / "a.json", HOSTILE), tmp_path)
    assert_harmless(plain, content)


def assert_harmless(plain: str, content: str) -> None:
    """The page has no element that the one with plain names has not, and no character that is more than seen."""
    kinds, mine = ({tag for tag, _ in Reader(one).elements} for one in (plain, content))
    assert mine <= kinds
    assert len(Reader(content).all("script")) == len(Reader(plain).all("script"))
    assert "img" not in mine
    assert not [one for one in content if not (one.isprintable() or one == "\n")]
    assert "&lt;script&gt;alert(1)" in content
    assert "{{7*7}}" in content  # no template in a template


def test_hostile_formulas_of_a_ledger(tmp_path: Path) -> None:
    path = make_ledger(tmp_path / "a.sqlite", 50, strange=(HOSTILE, "W" * 5000))
    _, content = page(path, tmp_path)
    assert_self_contained(content)
    rows = Reader(content).rows["rows"]
    assert any(row[0].startswith("</script><script>alert(1)</script>") for row in rows)
    assert max(len(row[0]) for row in rows) < 500
    assert content.count("<script") == 2
    assert "\x1b" not in content
    assert "\u202e" not in content


def test_a_hostile_file_name(tmp_path: Path) -> None:
    path = tmp_path / "a\"><script>\u202e'.sqlite"
    _, content = page(make_ledger(path, 10), tmp_path)
    assert content.count("<script") == 2
    assert_self_contained(content)


def test_five_thousand_candidates_are_less_than_3_mb(tmp_path: Path) -> None:
    path = make_ledger(tmp_path / "a.sqlite", 5000)
    told, content = page(path, tmp_path)
    read = Reader(content)
    assert told["bytes"] < 3_000_000
    assert len(read.rows["rows"]) == read.rows["total"] == 5000
    means = [row[4] for row in read.rows["rows"] if row[4] is not None]
    assert means == sorted(means)
    assert len(means) == 1002
    first = content[content.index('<table id="candidate-rows">') :]
    assert first[: first.index("</table>")].count("<tr>") == 21  # without a script: the head and the first rows


def test_of_more_candidates_than_there_is_room_for_the_best_stay(tmp_path: Path) -> None:
    path = make_ledger(tmp_path / "a.sqlite", 60, strange=tuple(f"{place}{'x' * 600}" for place in range(7000)))
    told, content = page(path, tmp_path)
    assert told["bytes"] < 3_000_000
    rows = Reader(content).rows
    assert rows["total"] == 7060
    assert 4000 < len(rows["rows"]) < 7060
    assert rows["rows"][0][4] is not None


def test_a_campaign_that_is_not_finished(tmp_path: Path) -> None:
    with Ledger.open(make_ledger(tmp_path / "a.sqlite", 80, finished=False), SETTINGS, resume=True):
        told, content = page(tmp_path / "a.sqlite", tmp_path)  # while a driver has it
    assert told["verdict"].startswith("The campaign is running after 2 generations and 18 evaluations; on the search")
    assert "the best baseline, " in told["verdict"]
    assert {"convergence", "front", "saved", "candidates"} <= set(told["sections"])
    assert {"test", "interval"}.isdisjoint(told["sections"])
    assert "sparsegpt" in content


def test_a_campaign_in_which_nothing_better_was_found(tmp_path: Path) -> None:
    document = json.loads(RESULTS["discover"].read_text())
    document |= {"better": False, "because": "nothing better than Mine was found in 30 evaluations; go on"}
    document["winner"] = document["baselines"]["wanda"] | {"formula": "wanda", "group": "row", "nodes": 4}
    (tmp_path / "a.json").write_text(json.dumps(document))
    told, content = page(tmp_path / "a.json", tmp_path)
    assert told["verdict"] == "Nothing better than Mine was found in 30 evaluations."
    assert "The best formula of the search" in content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is not there"),
        ("", "is empty"),
        ("[1]", "holds no JSON object"),
        ("{", "is not JSON"),
        ('{"a": 1}', "is another kind of JSON"),
        ('{"version": 1, "granularity": "row", "sparsity": {}}', "is another kind of JSON"),
        ('{"results": 3, "dense": {}}', "is damaged"),
        ('{"results": [{}], "dense": {"a": "b"}, "model": "m"}', "is damaged"),
        ("SQLite format 3\0 and no more", "a.json"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_inputs_that_cannot_be_used(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=told) as caught:
        report(path, output=tmp_path / "page.html")
    assert "\n" not in str(caught.value.args[0])
    assert not (tmp_path / "page.html").exists()


def test_a_folder_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        report(tmp_path / "a", output=tmp_path / "page.html")
    for nameless in (".", "/"):
        with pytest.raises(InputError, match="is a folder"):
            report(nameless)


def test_the_page_is_beside_its_source_unless_it_is_named() -> None:
    assert ReportRequest(source=Path("a/b.sqlite")).completed().output == Path("a/b.html")


def test_only_pages_of_ours_are_replaced(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    page(RESULTS["bench"], tmp_path)
    page(RESULTS["bench"], tmp_path)
    output.write_text("<!doctype html><p>mine")
    with pytest.raises(InputError, match="gpmetric did not write it"):
        report(RESULTS["bench"], output=output)
    report(RESULTS["bench"], output=output, force=True)
    with pytest.raises(InputError, match="is also read"):
        report(RESULTS["bench"], output=RESULTS["bench"], force=True)


# Parts


def test_a_formula_in_every_form() -> None:
    view = view_formula("layer:abs(W)*X**0.5")
    assert (view.group, view.nodes) == ("layer", 6)
    assert view.latex == r"\lvert W\rvert \odot {\lVert X\rVert}^{\odot 0.5}"
    assert view.tree.count("<rect") == 6
    assert view.tree.count("<path") == 5
    assert "<math" in view.mathematics
    assert [name for name, _ in view.operands] == ["W", "X"]
    assert view_formula("<b>").mathematics == ""
    assert view_formula("+".join(["W"] * 70)).tree == ""


def test_nodes_of_a_tree_are_apart() -> None:
    """Of long numbers, and of names above one node."""
    tree = view_formula("W**1.75*F*zsn(H)**0.0807*(H**0.0417/colnorm(H)**0.2345-1.234e-05*rownorm(rownorm(X)))").tree
    found = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)"', tree)
    levels: dict[str, list[tuple[float, float]]] = {}
    for left, level, width in found:
        levels.setdefault(level, []).append((float(left), float(left) + float(width)))
    assert len(found) > 20
    for row in map(sorted, levels.values()):
        assert all(left[1] + 4 < right[0] for left, right in pairwise(row))


def test_ticks_are_round_and_whole() -> None:
    assert ticks(Axis(0.0, 1.0, "")) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(Axis(-0.2, 3.2, "", whole=True)) == [0, 1, 2, 3]


def test_of_nothing_there_is_no_drawing() -> None:
    assert lines("", "", "", []) == bars("", []) == bars("", [("a", float("inf"), "", "")]) == ""
    assert layer_map({"lm_head": 0.5}, "") == []


def test_a_heat_map_has_a_cell_for_each_value() -> None:
    drawn = heat_map("", ["0", "1"], ["q", "k"], {("0", "q"): 0.25, ("1", "k"): 0.5, ("1", "q"): 0.75})
    assert drawn.count('class="cell"') == 3
    assert [int(one) for one in re.findall(r'class="heat[^>]*>(\d+)<', drawn)][:3] == [25, 75, 50]


def test_matrices_of_the_same_name_are_told_apart() -> None:
    sparsity = {f"h.{block}.{kind}": 0.5 for block in range(2) for kind in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")}
    figure, table = layer_map(sparsity | {"h.0.mlp.experts.3.up": 0.25, "h.0.mlp.experts.4.up": 0.75}, "")
    assert ">attn.c_proj<" in figure.svg  # type: ignore[union-attr]
    assert ["mlp.experts.up", "0.5000", "0.5000", "0.5000"] in table.rows  # type: ignore[union-attr]


# Live


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with LiveServer(socket.create_server(("127.0.0.1", 0)), Served(tmp_path / "a.sqlite")) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: LiveServer, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_a_live_page_is_of_the_ledger_as_it_is(server: LiveServer, tmp_path: Path) -> None:
    assert "about to begin" in ask(server)[1]
    make_ledger(tmp_path / "a.sqlite", 10, finished=False)
    before = (tmp_path / "a.sqlite").read_bytes()
    server.served._next = 0.0
    status, content = ask(server)
    assert status == 200
    assert "Campaign a.sqlite" in content
    assert "connect-src 'self'" in content
    assert_self_contained(content)
    assert (tmp_path / "a.sqlite").read_bytes() == before


def test_a_live_page_is_for_this_machine_by_its_own_name(server: LiveServer) -> None:
    port = server.server_port
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert ask(server, host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}"):
        assert ask(server, host=host)[0] == 403
    for path in ("/a.sqlite", "/../a.sqlite", "/?a"):
        assert ask(server, path)[0] == 404
    assert ask(server, "http://evil.example/")[0] == 403
    for method in ("POST", "PUT", "HEAD", "OPTIONS"):
        assert ask(server, method=method)[0] == 501


def test_a_browser_that_leaves_is_not_told(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    for error, told in ((ConnectionResetError(), False), (BrokenPipeError(), False), (KeyError("a fault"), True)):
        try:
            raise error
        except Exception:
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("Traceback" in capsys.readouterr().err) == told


def test_a_live_page_that_cannot_be_made_is_told_once(
    server: LiveServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"SQLite format 3\0 but damaged")
    for _ in range(2):
        server.served._next = 0.0
        assert "about to begin" in ask(server)[1]
    assert len(caplog.messages) == 1
    assert "the campaign goes on" in caplog.text


def test_a_live_page_is_not_made_for_every_request(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(server.served, "_make", lambda seen: made.append(seen))
    for _ in range(5):
        ask(server)
    assert len(made) <= 1


def test_the_process_of_a_live_page_ends_with_the_context(tmp_path: Path) -> None:
    make_ledger(tmp_path / "a.sqlite", 10, finished=False)
    with LivePage(0, tmp_path / "a.sqlite") as live:
        port = int(live.address.rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert "Campaign a.sqlite" in connection.getresponse().read().decode()
        connection.close()
    assert live._process.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_the_process_of_a_live_page_ends_with_a_killed_driver(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom gpmetric.evolution.live_page import LivePage\n"
        f"with LivePage(0, Path({str(tmp_path / 'a.sqlite')!r})) as live:\n"
        "    print(live._process.pid, flush=True)\n    sys.stdin.read(1)\n    os._exit(9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdin is not None
        pid = int(driver.stdout.readline())
        driver.stdin.write(b"x")
        driver.stdin.close()
        assert driver.wait(60) == 9
        assert driver.stdout.read() == b""
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        threading.Event().wait(0.1)
    os.kill(pid, 9)
    pytest.fail("the process outlived its driver")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--live {port}: .*in use; name another port, or 0 for any"):
            LivePage(port, tmp_path / "a.sqlite")
