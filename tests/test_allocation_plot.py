"""The page and the table of an allocation search: their content by hand, and that nothing makes them fail or warn."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpmetric.allocation import front_panels, plot
from gpmetric.allocation.front_points import against, undominated
from gpmetric.allocation.front_table import write_csv
from gpmetric.allocation.plot import draw_front
from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import check_picture

pytestmark = pytest.mark.slow

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA = [f"model.layers.{block}.{kind}" for block in range(5) for kind in KINDS]
DENSE = 4.0  # nats per token


def make_point(sparsity: float, excess: float | None, genes: list[str]) -> dict[str, Any]:
    loss = None if excess is None else DENSE + excess
    return {
        "sparsity": sparsity,
        "sparsity_total": sparsity / 2,
        "removed": int(1000 * sparsity),
        "kept_prunable": 1000 - int(1000 * sparsity),
        "kept_total": 2000 - int(1000 * sparsity),
        "loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "excess": excess,
        "genes": {gene: sparsity + 0.2 * (place / len(genes) - 0.5) for place, gene in enumerate(genes)},
    }


def make_document(genes: list[str] = LLAMA, **changes: Any) -> dict[str, Any]:
    """Excess squares with the sparsity: 0.01 to 0.49, a span of 49."""
    front = [make_point(step / 10, (step / 10) ** 2, genes) for step in range(1, 8)]
    names = ("uniform", "owl", "arithmetic", "sensitivity")
    document = {
        "model": "demo",
        "metric": "wanda",
        "granularity": "row",
        "allocator": "nsga2",
        "objective": "kl",
        "dense": {"loss": DENSE, "perplexity": math.exp(DENSE)},
        "validation": {"text": "valid.txt", "windows": 64, "tokens": 16384},
        "prunable": 1000,
        "total": 2000,
        "front": front,
        "baselines": {name: [make_point(0.5, 0.3, genes), make_point(0.6, 0.5, genes)] for name in names},
        "picked": front[4],
        "hypervolume": [0.3, 0.35, 0.5, 0.45],
        "reference": {"objective": 2.0, "sparsity": 0.0},
        "rounds": [{"generation": 0, "windows": 8}, {"generation": 2, "windows": 16}],
    }
    return copy.deepcopy(document | changes)


def unmeasured() -> dict[str, Any]:
    document = make_document(picked=make_point(0.5, None, LLAMA), dense={"loss": None, "perplexity": None})
    for point in document["front"]:
        point["excess"] = None
    document["front"][0]["excess"] = math.nan
    return document | {"baselines": {"uniform": [make_point(0.5, math.inf, LLAMA)]}, "hypervolume": [None, math.nan]}


DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": make_document,
    "one gene, one point": lambda: make_document(
        ["model.layers.0.self_attn.q_proj"],
        front=[make_point(0.5, 0.2, ["model.layers.0.self_attn.q_proj"])],
        picked=make_point(0.5, 0.2, ["model.layers.0.self_attn.q_proj"]),
        baselines={},
        hypervolume=[0.3],
    ),
    "no search, no genes": lambda: make_document([], hypervolume=[], rounds=[], baselines={"uniform": []}),
    "nothing measured": unmeasured,
    "300 odd names": lambda: make_document(
        [f"{part}.block.{block}.$a_{kind}$^" for part in "ed" for block in range(5) for kind in range(29)]
        + [f"top_$x{place}.w" for place in range(10)],
        model="/home/a_b/" + "long$" * 60 + "模型\n",
        metric="x_$" * 100,
    ),
    "nothing at all": lambda: make_document(front=[], picked=None, baselines={}, hypervolume=[], rounds=[]),
    "no uniform": lambda: make_document(baselines={"owl": [make_point(0.5, 0.3, LLAMA)]}),
    "hostile allocations": lambda: make_document(
        allocator=r"$\frac{1}{$",
        baselines={
            r"$\alpha^{" + "x" * 80: [make_point(0.5, 30.0, LLAMA), make_point(0.6, 50.0, LLAMA)],
            "uniform": [make_point(0.5, 0.3, LLAMA), make_point(0.6, 0.5, LLAMA)],
        },
    ),
    "80 blocks": lambda: make_document(
        [f"transformer.h.{block}" for block in range(80)],
        front=[make_point(0.0, 0.0, []), make_point(0.3, -0.1, []), make_point(0.7, 0.5, [])],
        hypervolume=[0.1] * 500,
        rounds=[{"generation": generation, "windows": generation} for generation in range(0, 500, 10)],
    ),
}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], dict[str, Axes]]:
    """The panels by the first words of their titles, of a page that is drawn but not written."""

    def draw(document: dict[str, Any]) -> dict[str, Axes]:
        pages: list[Figure] = []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, file, **_: pages.append(figure))
            draw_front(document, tmp_path / "page.png")
        names = {
            "held-out loss": "loss", "excess against": "against", "progress": "progress",
            "picked allocation: sparsity": "heat", "picked allocation: profile": "profile",
        }  # fmt: skip
        titled = {axes.get_title("left"): axes for axes in pages[0].axes}
        found = {
            name: axes for title, axes in titled.items() for words, name in names.items() if title.startswith(words)
        }
        assert len(found) == len(titled) - ("" in titled)  # which are perplexities and the colours
        return found

    return draw


def texts(axes: Axes) -> str:
    return "\n".join(text.get_text() for text in axes.texts)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_drawn_without_a_warning(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "_DPI", 40)  # faster
    document = DOCUMENTS[name]()
    before = repr(document)
    draw_front(document, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "page.png"]
    assert repr(document) == before


def test_pdf(tmp_path: Path) -> None:
    draw_front(make_document(), tmp_path / "page.PDF")
    assert (tmp_path / "page.PDF").read_bytes().startswith(b"%PDF")


def test_matplotlib_is_left_as_it_was(drawn: Callable[..., dict[str, Axes]]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn(make_document())
    assert dict(matplotlib.rcParams) == before


def test_the_picked_point_is_marked_with_its_numbers(drawn: Callable[..., dict[str, Axes]]) -> None:
    front = drawn(make_document())["loss"]
    (star,) = [line for line in front.lines if line.get_label() == "picked"]
    assert star.get_xydata().tolist() == [[0.5, 0.25]]
    assert texts(front) == "picked: sparsity 0.500 (0.250 of all parameters)\n" + (
        f"excess 0.25 nats/token\nperplexity {math.exp(4.25):.3g} (dense {math.exp(4):.3g})"
    )


def test_allocations_are_told_apart_without_colour(drawn: Callable[..., dict[str, Axes]]) -> None:
    lines = [line for line in drawn(make_document())["against"].lines if line.get_label() != "uniform"]
    assert [line.get_label() for line in lines] == ["owl", "arithmetic", "sensitivity", "nsga2", "picked"]
    assert len({line.get_marker() for line in lines}) == len(lines)
    assert len({line.get_color() for line in lines}) == len(lines)


def test_a_point_without_loss_is_left_out(drawn: Callable[..., dict[str, Axes]]) -> None:
    document = make_document()
    document["front"][1]["excess"] = None
    (front,) = [line for line in drawn(document)["loss"].lines if "front" in str(line.get_label())]
    assert front.get_xdata().tolist() == [0.1, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert front.get_label() == "nsga2 front (6 points)"


def test_what_is_dominated_on_the_held_out_text_is_off_the_line(drawn: Callable[..., dict[str, Axes]]) -> None:
    """0.3 loses more than 0.4 does, on another text than it was chosen by."""
    document = make_document()
    document["front"][2]["excess"] = 0.2
    panels = drawn(document)
    lines = {str(line.get_label()): line.get_xdata().tolist() for line in panels["loss"].lines}
    assert lines["nsga2 front (6 points)"] == [0.1, 0.2, 0.4, 0.5, 0.6, 0.7]
    assert lines["of its search, dominated here (1)"] == [0.3]
    (front,) = [line for line in panels["against"].lines if line.get_label() == "nsga2"]
    assert 0.3 not in front.get_xdata().tolist()


def test_undominated_by_hand() -> None:
    pairs = [(0.4, 0.3), (0.5, 0.2), (0.5, 0.4), (0.6, 0.4), (0.7, 0.4)]
    assert undominated(pairs) == [(0.5, 0.2), (0.7, 0.4)]


def test_differences_to_uniform_by_hand() -> None:
    """Uniform doubles from 0.4 to 0.6, so that it is sqrt(2) times as much halfway; 0.61 is within a tenth beyond."""
    curve = [(0.4, 0.1), (0.6, 0.2)]
    found = against([(0.3, 0.1), (0.4, 0.05), (0.5, 0.1), (0.6, 0.3), (0.61, 0.2), (0.7, 0.1)], curve)
    assert [sparsity for sparsity, _ in found] == [0.4, 0.5, 0.6, 0.61]
    expected = [-0.5, 1 / math.sqrt(2) - 1, 0.5, 2**-0.05 - 1]
    np.testing.assert_allclose([difference for _, difference in found], expected)
    assert against([(0.4, 0.05), (0.5, 0.1)], curve[:1]) == [(0.4, -0.5)]
    assert against([(0.4, 0.05)], []) == against([(0.4, 0.05)], [(0.4, 0.0), (0.6, -0.1)]) == []


def test_only_uniform_stands_beside_the_front_where_the_others_have_their_panel(
    drawn: Callable[..., dict[str, Axes]],
) -> None:
    panels = drawn(make_document())
    assert [line.get_label() for line in panels["loss"].lines] == ["uniform", "nsga2 front (7 points)", "picked"]
    lines = {str(line.get_label()): line for line in panels["against"].lines}
    np.testing.assert_allclose(lines["owl"].get_ydata(), 0.0, atol=1e-12)  # the same figures as uniform's
    np.testing.assert_allclose(lines["picked"].get_xydata(), [[0.5, 0.25 / 0.3 - 1]])
    panels = drawn(DOCUMENTS["no uniform"]())
    assert "against" not in panels
    assert "owl" in [line.get_label() for line in panels["loss"].lines]


def test_twice_as_bad_as_uniform_squeezes_nothing(drawn: Callable[..., dict[str, Axes]]) -> None:
    assert drawn(DOCUMENTS["hostile allocations"]())["against"].get_ylim()[1] < 2


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("plain", ["loss", "against", "progress", "heat", "profile"]),
        ("no search, no genes", ["loss"]),
        ("nothing measured", ["heat", "profile"]),
        ("nothing at all", []),
    ],
)
def test_what_there_is_nothing_of_is_not_drawn(
    name: str, panels: list[str], drawn: Callable[..., dict[str, Axes]]
) -> None:
    assert list(drawn(DOCUMENTS[name]())) == panels


def test_the_title_is_in_plain_words(drawn: Callable[..., dict[str, Axes]]) -> None:
    title = drawn(make_document())["heat"].figure._suptitle.get_text()
    assert title == "demo pruned by wanda: how much of each part is removed, searched by nsga2"
    title = drawn(make_document(allocator="owl", hypervolume=[]))["heat"].figure._suptitle.get_text()
    assert title.endswith("set by owl")


def test_blocks_and_generations_are_whole_numbers(drawn: Callable[..., dict[str, Axes]]) -> None:
    for hypervolume in ([0.3], [0.3, 0.35], [0.3] * 80):
        panels = drawn(make_document(hypervolume=hypervolume))
        low, high = panels["progress"].get_xlim()
        ticks = [float(tick) for tick in panels["progress"].get_xticks() if low <= tick <= high]
        assert ticks
        assert all(map(float.is_integer, ticks))
    assert panels["heat"].get_xlabel() == panels["profile"].get_xlabel() == "block"
    assert [label.get_text() for label in panels["heat"].get_xticklabels()] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("excess", "scale"),
    [
        ([0.1, 1.9], "linear"),
        ([0.0, 1.9], "linear"),
        ([0.1, 2.1], "log"),
        ([0.0, 0.1, 2.1], "symlog"),
        ([-0.1, 0.1, 2.1], "symlog"),
        ([1e-9, 2.1], "symlog"),  # noise must not stretch the axis over nine decades
    ],
)
def test_the_axis_is_logarithmic_over_twentyfold(excess: list[float], scale: str) -> None:
    left = Figure().subplots()
    left.plot(range(len(excess)), excess)
    front_panels._scale_excess(left, excess, perplexity=math.exp(DENSE))
    assert left.get_yscale() == scale
    _, right = left.figure.axes
    ticks, labels = right.get_yticks(), [label.get_text().replace(",", "") for label in right.get_yticklabels()]
    assert 3 <= len(ticks) <= 20
    assert len(set(labels)) == len(labels)
    assert right.get_ylim() == left.get_ylim()
    assert right.get_yscale() == scale
    assert left.get_yticks().tolist() == ticks.tolist()
    np.testing.assert_allclose([float(label) for label in labels], np.exp(DENSE + ticks), rtol=6e-3)  # three figures


def test_heat_map_by_hand(drawn: Callable[..., dict[str, Axes]]) -> None:
    genes = {"m.h.10.attn.q": 0.1, "m.h.2.attn.q": 0.2, "m.h.2.mlp.0.up": 0.3, "m.h.10.mlp.0.up": None, "head": 0.4}
    axes = drawn(make_document(picked={"sparsity": 0.25, "genes": genes}))
    heat, profile = axes["heat"], axes["profile"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["attn.q", "mlp.0.up", "head"]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["2", "10", "–"]
    expected = [[0.2, 0.1, math.nan], [0.3, math.nan, math.nan], [math.nan, math.nan, 0.4]]
    np.testing.assert_array_equal(np.ma.filled(heat.images[0].get_array(), math.nan), expected)
    assert texts(heat).split() == ["0.20", "0.10", "0.30", "0.40"]
    mean, uniform = profile.lines
    np.testing.assert_allclose(mean.get_xydata(), [[0, 0.25], [1, 0.1]])
    assert set(uniform.get_ydata()) == {0.25}


@pytest.mark.parametrize(
    ("genes", "rows"),
    [
        (["model.layers.0.self_attn", "model.layers.0.mlp"], ["self_attn", "mlp"]),
        (["model.layers.0", "model.layers.1"], ["block"]),
        (["enc.block.0.q", "dec.block.0.q"], ["enc.block.q", "dec.block.q"]),
        (["m.enc.0.q", "m.dec.0.q"], ["enc.q", "dec.q"]),
        (["0.q", "1.q"], ["q"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_rows(genes: list[str], rows: list[str]) -> None:
    assert plot._grid(dict.fromkeys(genes, 0.5)).rows == rows


def test_a_large_heat_map_stays_readable(drawn: Callable[..., dict[str, Axes]]) -> None:
    heat = drawn(make_document([f"h.{block}.{kind}" for block in range(80) for kind in KINDS]))["heat"]
    assert texts(heat) == ""
    assert [label.get_text() for label in heat.get_xticklabels()] == [str(block) for block in range(0, 80, 5)]


def test_hypervolume_and_rounds(drawn: Callable[..., dict[str, Axes]]) -> None:
    progress = drawn(make_document())["progress"]
    assert progress.lines[0].get_ydata().tolist() == [0.3, 0.35, 0.5, 0.45]
    assert [line.get_xdata()[0] for line in progress.lines[1:]] == [0, 2]
    assert texts(progress) == "8 windows\n16"


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (59.149, "59.1"), (999.9, "1,000"), (12345.6, "12,346"), (3e7, "3e+07")]
)
def test_numbers_are_plain(value: float, text: str) -> None:
    assert front_panels._plain(value) == text


@pytest.mark.parametrize(("count", "most", "last"), [(0, 5, None), (5, 5, 4), (6, 5, 4), (80, 20, 75), (1000, 20, 950)])
def test_ticks_stand_in_round_steps(count: int, most: int, last: int | None) -> None:
    ticks = plot._ticks(count, most)
    assert len(ticks) <= most
    assert (ticks or [None])[-1] == last


def test_table(tmp_path: Path) -> None:
    document = make_document()
    document["front"][0] |= {"loss": None, "perplexity": math.inf, "excess": math.nan}
    document["baselines"] = {"owl": [make_point(0.5, 0.3, ["a,b", LLAMA[0]])], "uniform": []}
    write_csv(document, tmp_path / "front.csv")
    rows = list(csv.reader((tmp_path / "front.csv").read_text(encoding="utf-8").splitlines()))
    header = "method,sparsity,sparsity_total,removed,kept_prunable,kept_total,loss,perplexity,excess"
    assert rows[0] == [*header.split(","), *LLAMA, "a,b"]
    assert [row[0] for row in rows[1:]] == ["nsga2"] * 7 + ["owl", "picked", "dense"]
    assert rows[10][1:7] == ["0.0", "0.0", "0", "1000", "2000", "4.0"]
    assert {len(row) for row in rows} == {len(LLAMA) + 10}
    assert rows[1][:9] == ["nsga2", "0.1", "0.05", "100", "900", "1900", "", "", ""]
    point = document["front"][4]
    assert [float(value) for value in rows[5][1:-1]] == [
        value for key, value in point.items() if key != "genes"
    ] + list(point["genes"].values())
    assert rows[8][9:] == ["0.5", *[""] * (len(LLAMA) - 1), "0.4"]
    assert list(tmp_path.iterdir()) == [tmp_path / "front.csv"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_tabled(name: str, tmp_path: Path) -> None:
    document = DOCUMENTS[name]()
    write_csv(document, tmp_path / "front.csv")
    points = len(document["front"]) + sum(map(len, document["baselines"].values())) + bool(document.get("picked")) + 1
    text = (tmp_path / "front.csv").read_text(encoding="utf-8")
    assert len(list(csv.reader(text.splitlines()))) == 1 + points
    assert "\r" not in text


@pytest.mark.parametrize("name", ["page.svg", "page", "png", "page.png.txt"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    for refuse in (partial(check_picture, "--plot"), lambda path: draw_front(make_document(), path)):
        with pytest.raises(InputError, match=r"--plot .* must end in \.png or \.pdf"):
            refuse(tmp_path / name)
    check_picture("--plot", tmp_path / "a.PNG")
    check_picture("--plot", tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_a_page_is_whole_or_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(b"before")

    def full_disk(figure: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(GpmetricError, match="No space left"):
        draw_front(make_document(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_is_whole_or_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "front.csv"
    path.write_bytes(b"before")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(GpmetricError, match="No space left"):
        write_csv(make_document(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_title_stays_on_the_page(drawn: Callable[..., dict[str, Axes]]) -> None:
    figure = drawn(make_document(model="Meta-Model_$W" * 30, metric="sqrt(W)*X" * 30))["loss"].figure
    box = figure._suptitle.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert 0 < box.x0 < box.x1 < figure.bbox.width
