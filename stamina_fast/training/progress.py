"""What a person sees while concepts are learned: losses, mask density and the time left, or nothing at all."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """A line for the whole sequence and one for the concept in hand; silent where `shown` is false."""

    def __init__(self, names: list[str], done: int, steps: int, shown: bool):
        self.names, self.steps = names, steps
        self.bars = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), disable=not shown,
        )
        self.whole = self.bars.add_task("all concepts", total=len(names) * steps, completed=done * steps, state="")
        self.one = self.bars.add_task("", total=steps, state="", visible=False)

    def __enter__(self) -> Reporter:
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def begin(self, task: int) -> None:
        name = self.names[task]
        self.bars.reset(self.one, total=self.steps, visible=True, description=name, state="encoding pictures")

    def update(self, task: int, step: int, losses: dict[str, float], density: float) -> None:
        """`step` steps of the task are done; the losses are means since the last call."""
        state = f"loss {losses['denoising']:.4f} · mask {density:.0%} · forgetting {losses['forgetting']:.2g}"
        self.bars.update(self.one, completed=step, state=state)
        self.bars.update(self.whole, completed=task * self.steps + step)

    def end(self, task: int, seconds: float) -> None:
        """The task is folded and stored."""
        if not self.bars.disable:
            self.bars.console.print(f"learned {self.names[task]} in {seconds:.1f} s")
