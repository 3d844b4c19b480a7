"""Nothing in a plot is cut off or printed over something else, whatever the number of concepts and the length of a text."""

import itertools

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from stamina_fast.evaluate import plots

COUNTS = (1, 2, 3, 6, 13, 50)
LONG = "a very long name of a concept that somebody chose"
NOTE = "guidance 7.5, /home/somebody/models/facebook-dinov2-base features, 1024 samples; 95% bootstrap intervals"
KEYS = ("mmd_base", "mmd_after", "mmd_end")
IMAGES = [Image.new("RGB", (32, 32), (i * 30, 90, 200)) for i in range(8)]
STAGES = ("real images", "base model", "just after its task", "at the end")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures that the plots would write."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, **_: figures.append(figure))
    with plt.rc_context(plots.STYLE):
        yield figures
    plt.close("all")


def names_of(count: int) -> list[str]:
    return [f"{LONG} {i}" if i % 2 == 0 else f"W{i}" * 9 for i in range(count)]


def draw(kind: str, count: int) -> None:
    names = names_of(count)
    if kind == "heat_map":
        ratios = [[0.5 if j <= t else None for j in range(count)] for t in range(count)]
        plots.heat_map("unused", names, ratios, f"MMD² as a share of the base model's; {NOTE}")
    elif kind == "overview":
        concepts = [(name, [IMAGES] * 4) for name in names]
        plots.overview("unused", f"{count} concepts, one after another ({NOTE})", STAGES, concepts)
    elif kind == "concept_grid":
        notes = ("trained on", "MMD² 0.52", "12345.67 of the base's MMD²", "")
        rows = [(label, note, IMAGES[:count]) for label, note in zip(STAGES, notes, strict=True)]
        plots.concept_grid("unused", f"{names[0]}: \"a photo of <{LONG}> {LONG}\", guidance 7.5", rows)
    elif kind == "training_curves":
        curve = [{"step": s, "loss": 1 / (s + 1), "forgetting": 0.01 * s, "density": 0.5} for s in range(10)]
        # two tasks more, which made no step
        plots.training_curves("unused", [*names, "none", "none"], [*[curve] * count, [], []])
    else:
        tasks = [dict.fromkeys(KEYS, 0.3) | {"intervals": {key: [0.2, 0.4] for key in KEYS}}] * count
        plots.mmd_bars("unused", names, tasks, NOTE)


def boxes(figure, texts):
    return [text.get_window_extent(figure.canvas.get_renderer()) for text in texts if text.get_text()]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["heat_map", "mmd_bars", "training_curves", "overview", "concept_grid"])
def test_everything_lies_within_the_figure(drawn, kind, count):
    draw(kind, count)
    (figure,) = drawn
    figure.canvas.draw()
    drawn_box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn_box.x0 >= 0
    assert drawn_box.y0 >= 0
    assert drawn_box.x1 <= width
    assert drawn_box.y1 <= height


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["heat_map", "mmd_bars"])
def test_the_title_is_whole_and_above_everything_else(drawn, kind, count):
    draw(kind, count)
    (figure,) = drawn
    figure.canvas.draw()
    title = figure._suptitle
    (box,) = boxes(figure, [title])
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert " ".join(title.get_text().split()).endswith(NOTE)
    assert box.y0 >= figure.axes[0].get_tightbbox().y1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["heat_map", "mmd_bars"])
def test_names_are_not_printed_over_each_other(drawn, kind, count):
    draw(kind, count)
    (figure,) = drawn
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    if any(label.get_rotation() for label in labels):
        assert count > 3
        return
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes(figure, labels)))


@pytest.mark.parametrize(("kind", "count"), [("overview", 1), ("overview", 13), ("concept_grid", 8)])
def test_texts_are_not_printed_over_pictures(drawn, kind, count):
    draw(kind, count)
    (figure,) = drawn
    figure.canvas.draw()
    pictures = [axes.get_window_extent() for axes in figure.axes]
    over = [text for text in boxes(figure, figure.texts) for picture in pictures if text.overlaps(picture)]
    assert not over


def test_fit_keeps_both_ends_and_wrap_every_word_that_has_room():
    assert plots.fit("cat", 1) == "cat"
    short = plots.fit(f"{LONG} 12", 1)
    assert short.startswith("a very")
    assert short.endswith("12")
    assert plots.width(short) <= 1
    assert plots.fit(LONG, 0) == "…"
    lines = plots.wrap(NOTE, 4).splitlines()
    assert " ".join(lines) == NOTE
    assert max(map(plots.width, lines)) <= 4
    lines = plots.wrap(NOTE, 4, most=1).splitlines()
    assert len(lines) == 1
    assert "…" in lines[0]
    assert lines[0].endswith("intervals")
    assert max(map(plots.width, lines)) <= 4
    assert plots.wrap("", 3) == ""


@pytest.mark.parametrize("dpi", [100, 130, 140])
def test_the_ruler_measures_what_is_drawn(dpi):
    figure = plt.figure(dpi=dpi)
    texts = [figure.text(0, 0, word, size=size, weight=weight)
             for word, size, weight in ((LONG, 10, "normal"), (NOTE, 12, "bold"), ("WWW", 8.5, "normal"))]
    for text, box in zip(texts, boxes(figure, texts), strict=True):
        measured = plots.width(text.get_text(), text.get_size(), text.get_weight())
        assert 0.97 * box.width <= measured * dpi <= 1.08 * box.width
