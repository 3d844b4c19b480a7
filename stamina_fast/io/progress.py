"""Show how far a long piece of work has come: bars on a terminal, plain lines in a pipe or a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

# where there are no bars, the least time between two lines about the same part
SECONDS = 5.0


class Progress:
    """Shows parts of some work, one after another: `begin` a part, `advance` through it, `end` it.

    A terminal gets one bar for the whole and one for the part in hand. Anything else, a dumb terminal included, gets a line
    when a part begins and ends, and one every SECONDS at most in between, without control codes.

    whole   what all parts together are called
    total   units of work in all parts; `done` of them were done before
    shown   whether anything is shown at all
    """

    def __init__(self, whole: str, total: int, done: int = 0, shown: bool = True, console: Console | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self.console, self.shown, self.clock = console or Console(), shown, clock
        self.name, self.state, self.said, self.whole_name = "", "", clock(), whole
        self.whole = self.part = Pace(total, done, clock())
        self.bars = None
        if shown and self.console.is_terminal and not self.console.is_dumb_terminal:
            self.bars = TwoBars(self.console)
            self.rows = [self.bars.add_task(whole, total=total, completed=done), self.bars.add_task("", visible=False)]

    def __enter__(self) -> Progress:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bars:
            self.bars.stop()

    def begin(self, name: str, total: int, done: int = 0, state: str = "") -> None:
        """Begin a part of `total` units, of which some may be `done` already; `state` says more about it."""
        now = self.clock()
        self.name, self.state, self.said, self.part = name, state, now, Pace(total, done, now)
        self.whole.skip(done)
        if self.bars:
            self.bars.reset(self.rows[1], total=total, completed=done, visible=True, description=name)
        self._show()
        self._say(f"{name}: {done} of {total}" + f", {state}" * bool(state))

    def advance(self, count: int, state: str = "") -> None:
        """`count` more units of the part are done."""
        self.part.done += count
        self.whole.done += count
        self.state = state
        self._show()
        now = self.clock()
        if now - self.said >= SECONDS:
            self.said = now
            self._say(", ".join(filter(None, [
                f"{self.name}: {self.part.done} of {self.part.total}", state,
                f"{self.part.left(now)} left, {self.whole_name} {self.whole.left(now)}",
            ])))

    def end(self, text: str | None = None) -> None:
        """The part is over. `text` stays on the screen, above the bars."""
        if text is None:
            self._say(f"{self.name}: done in {self.clock() - self.part.start:.1f} s")
        elif self.shown:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        if self.bars:
            self.bars.state = self.state
            for row, pace in zip(self.rows, (self.whole, self.part), strict=True):
                self.bars.update(row, completed=pace.done)

    def _say(self, line: str) -> None:
        if self.shown and not self.bars:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Pace:
    """Units done of a total since `start`, and how long the rest will take at that pace."""

    def __init__(self, total: int, done: int, start: float):
        self.total, self.done, self.first, self.start = total, done, done, start

    def skip(self, count: int) -> None:
        """Some units were done before and took no time."""
        self.done += count
        self.first += count

    def left(self, now: float) -> str:
        if self.done == self.first:
            return "-:--:--"
        seconds = (now - self.start) / (self.done - self.first) * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))


class TwoBars(Bars):
    """Bars that fit into 80 columns: the state has a line of its own below them, and long names are folded, not cut."""

    state = ""

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")), BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)), TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"), console=console,
        )

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        if self.state:
            yield Text(self.state, overflow="fold")
