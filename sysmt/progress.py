"""Progress of long work: bars with rate and time left on a terminal, a line now and then elsewhere.

The bars are rich's. The lines are ours: without a terminal rich shows nothing before the end, and tqdm writes
carriage returns, of which a log keeps one endless line.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Bar", "Counted", "progress_bar"]

FIRST_LINE_S = 10.0
"""Seconds before the first line where there is no terminal; shorter work prints nothing."""

LINE_EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""


class Bar:
    """What `progress_bar` hands out; this one shows nothing.

    Attributes
    ----------
    done : float
        Units of work done so far.
    """

    def __init__(self) -> None:
        self.done = 0.0

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Report `amount` more units done; `note` is a short text to show with it."""
        self.done += amount


class Counted:
    """Batches that move a bar by their length; they can be iterated as often as what is inside.

    Parameters
    ----------
    batches : iterable of tuples
        Such as a loader's (inputs, labels).
    bar : Bar
    """

    def __init__(self, batches: Iterable[Any], bar: Bar) -> None:
        self._batches, self._bar = batches, bar

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            self._bar.advance(len(batch[0]))


class _Line(Bar):
    """Prints a line to stderr now and then."""

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        super().__init__()
        self._what, self._total, self._unit = what, total, unit
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE_S

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        super().advance(amount)
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_EVERY_S
        rate = self.done / (now - self._start)
        text = f"{self._what}: {self.done:.0f}"
        if self._total:
            text += f" of {self._total:.0f}"
        text += f" {self._unit}, {_rate(rate)} {self._unit}/s"
        if self._total and rate:
            text += f", {_clock(max(0.0, self._total - self.done) / rate)} left"
        print(f"{text}{', ' + note if note else ''}", file=sys.stderr, flush=True)


class _Rate(ProgressColumn):
    """Units per second; each task names its own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class _Terminal:
    """The one live display: bars that are open at the same time share it, whoever opened them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Progress | None = None
        self._open = 0

    @contextlib.contextmanager
    def bar(self, what: str, total: float | None, unit: str) -> Iterator[Bar]:
        with self._lock:
            if self._display is None:
                self._display = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    _Rate(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=Console(stderr=True),
                    transient=True,
                )
                self._display.start()
            display = self._display
            self._open += 1
        bar = _TerminalBar(display, what, total, unit)
        try:
            yield bar
        finally:
            with self._lock:
                display.remove_task(bar.task)
                self._open -= 1
                if not self._open:
                    display.stop()
                    self._display = None


class _TerminalBar(Bar):
    def __init__(self, display: Progress, what: str, total: float | None, unit: str) -> None:
        super().__init__()
        self._display = display
        self.task = display.add_task(what, total=total, unit=unit, note="")

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        super().advance(amount)
        if note:
            self._display.update(self.task, note=note)
        self._display.advance(self.task, amount)


_TERMINAL = _Terminal()


@contextlib.contextmanager
def progress_bar(
    what: str, total: float | None = None, unit: str = "images", enabled: bool = True
) -> Iterator[Bar]:
    """Show the progress of the work done inside the ``with`` block, on stderr.

    A terminal gets a bar with rate and time left, which is gone at the end; bars may be nested. Anything else
    gets a line after 10 s and then every 30 s, so that logs stay short and short work stays silent.

    Parameters
    ----------
    what : str
        What is being done, such as ``"calibrating"``.
    total : float, optional
        Units of work in all, where that is known.
    unit : str
        What is counted.
    enabled : bool
        False shows nothing.

    Yields
    ------
    Bar
        Call its `advance`.
    """
    if not enabled:
        yield Bar()
    elif not sys.stderr.isatty():
        yield _Line(what, total, unit)
    else:
        with _TERMINAL.bar(what, total, unit) as bar:
            yield bar


def _rate(per_second: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _clock(seconds: float) -> str:
    """Turn seconds into h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
