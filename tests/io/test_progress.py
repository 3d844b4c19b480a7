"""Progress: nothing is cut on a terminal of 80 columns, and a pipe gets plain lines."""

import io
import re

import pytest
from rich.console import Console

from stamina_fast.io.progress import SECONDS, Progress

STATE = "loss 0.1234, mask 50%, forgetting 0.00012"


class Clock:
    """Stands still until it is told to move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shown(name, width=80, *, terminal, monkeypatch=None, seconds=2.0, **options):
    """What a console shows of two parts of 2000 steps, 20 of them every `seconds`."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=terminal, **options)
    with Progress("all concepts", 4000, console=console, clock=clock) as progress:
        for part in range(2):
            progress.begin(name, 2000, 0 if part else 1000, "encoding pictures")
            for _ in range(100 if part else 50):
                clock.now += seconds
                progress.advance(20, STATE)
                if progress.bars:
                    progress.bars.refresh()
            progress.end(f"learned {name} in 5.0 s")
    return out.getvalue()


def plain(text):
    """Without the codes of a terminal, in lines."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("name", ["cat", "a subject with quite a long name, as in a list of many", "[bold]odd[/bold]"])
def test_nothing_is_cut_on_a_terminal_of_80_columns(name):
    lines = plain(shown(name, terminal=True))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    assert any(line.strip() == STATE for line in lines)
    whole = [line for line in lines if line.startswith("all concepts")]
    assert any(re.search(r"━ +4000/4000 0:00:00 left *$", line) for line in whole), whole[-1]
    assert any("2000/2000" in line for line in lines)
    assert f"learned {name} in 5.0 s" in lines
    # a long name goes on in the next line
    folded = re.sub(r"[━╸╺]|\d+/\d+|[-:\d]{7}|left", "", text)
    assert name.replace(" ", "") in re.sub(r"\s", "", folded)


@pytest.mark.parametrize("width", [40, 80])
def test_a_pipe_gets_a_line_now_and_then(width):
    lines = shown("cat", width, terminal=False).splitlines()
    assert not any("\x1b" in line or "━" in line for line in lines)
    assert [line for line in lines if "of" not in line] == ["learned cat in 5.0 s"] * 2
    begun = [line for line in lines if "encoding" in line]
    assert begun == ["cat: 1000 of 2000, encoding pictures", "cat: 0 of 2000, encoding pictures"]
    # a line every 6 seconds, as there is one to say every 2
    between = [line for line in lines if STATE in line]
    assert len(between) == 50 // 3 + 100 // 3
    assert between[0] == f"cat: 1060 of 2000, {STATE}, 0:01:34 left, all concepts 0:04:54"
    assert SECONDS == 5


def test_a_dumb_terminal_gets_lines_too(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = shown("cat", terminal=True)
    assert "\x1b" not in text
    assert f"cat: 1060 of 2000, {STATE}" in text


def test_nothing_is_shown_where_nothing_is_wanted():
    for terminal in (True, False):
        out = io.StringIO()
        with Progress("all", 4, shown=False, console=Console(file=out, force_terminal=terminal)) as progress:
            progress.begin("cat", 4)
            progress.advance(4)
            progress.end("learned cat")
        assert out.getvalue() == ""


def test_a_part_without_a_word_of_its_own_says_when_it_is_over():
    out, clock = io.StringIO(), Clock()
    with Progress("all samples", 8, console=Console(file=out), clock=clock) as progress:
        progress.begin("base model", 8)
        clock.now = 3.0
        progress.advance(8)
        progress.end()
    assert out.getvalue() == "base model: 0 of 8\nbase model: done in 3.0 s\n"
