"""What a worker says to its user: lines, kept for `dtrain log`, and the progress of what it waits for."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from dtrain.trainer.text import clean_block

KEPT_LINES = 500
MAX_TEXT = 20_000  # characters of one text
LINE_AFTER_S = 2.0  # what takes longer gets a line also where there is no terminal
LINE_PERIOD_S = 5.0  # and further ones
BAR_PERIOD_S = 0.2
BAR_WIDTH = 24


@dataclass(frozen=True)
class Progress:
    """How far something is that the worker waits for. 0 = `total` or `rate` not known, `eta_s` below 0 = not known."""

    stage: str = ""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    eta_s: float = -1.0
    rate: float = 0.0  # units per second

    def line(self) -> str:
        """In words, such as "Downloading the weights: 3.1 of 3.7 MB (84 %), 2 s left"."""
        if not self.total:
            return f"{self.stage} ({self.done:.0f} {self.unit})" if self.done >= 1 else self.stage
        text = f"{self.stage}: {_number(self.done)} of {_number(self.total)} {self.unit}".rstrip()
        text += f" ({100 * self.done / self.total:.0f} %)"
        if self.rate:
            text += f", {self.rate:.2f} {self.unit}/s"
        return text if self.eta_s < 0 else f"{text}, {duration(self.eta_s)} left"


class Voice:
    """Prints lines and progress, and remembers the lines. Safe from any thread."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._changed = threading.Condition()
        self._lines: deque[tuple[int, float, str]] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self._bar_shown = False
        self._began, self._last_shown = 0.0, 0.0
        self.now = Progress()

    def say(self, text: str) -> None:
        """One line (or several, in one text) for the user. Parts of it may be others' words: what a terminal would obey
        does not reach it."""
        text = clean_block(text, MAX_TEXT)
        with self._changed:
            self._clear_bar()
            print(text, file=self._stream, flush=True)
            for line in text.splitlines():
                self._count += 1
                self._lines.append((self._count, time.time(), line))
            self._changed.notify_all()

    def progress(
        self,
        stage: str,
        done: float = 0.0,
        total: float = 0.0,
        unit: str = "",
        rate: float = 0.0,
        lines: bool = True,
    ) -> None:
        """Show how far `stage` is; a new stage's clock starts with its first call. `rate`: units per second, if known
        better than by that clock. Without `lines` only a terminal shows it."""
        with self._changed:
            clock = time.monotonic()
            if stage != self.now.stage:
                self._began, self._last_shown = clock, 0.0
            passed = clock - self._began
            eta_s = passed * (total - done) / done if total and done and passed > 0.5 else -1.0
            if rate:
                eta_s = (total - done) / rate
            self.now = Progress(stage, done, total, unit, eta_s, rate)
            if self._is_due(clock, is_last=bool(total) and done >= total, lines=lines):
                self._last_shown = clock
                if self._is_terminal:
                    self._draw()
                else:
                    print(self.now.line(), file=self._stream, flush=True)

    def _is_due(self, clock: float, *, is_last: bool, lines: bool) -> bool:
        if self._is_terminal:
            return is_last or clock - self._last_shown >= BAR_PERIOD_S
        if not self._last_shown:
            return lines and clock - self._began >= LINE_AFTER_S
        return lines and (is_last or clock - self._last_shown >= LINE_PERIOD_S)

    @contextmanager
    def waiting(
        self, stage: str, *, unit: str = "", scale: float = 1.0, lines: bool = True
    ) -> Iterator[Callable[[float, float], None]]:
        """Show that `stage` goes on while this is open: the seconds that it has taken or, once the function that this
        gives was called with (done, total), how much of it is done, in `unit` of `scale`."""
        over, began, known = threading.Event(), time.monotonic(), [(0.0, 0.0)]

        def show() -> None:
            while not over.wait(BAR_PERIOD_S):
                done, total = known[0]
                if total:
                    self.progress(stage, done / scale, total / scale, unit, lines=lines)
                else:
                    self.progress(stage, time.monotonic() - began, unit="s", lines=lines)

        def update(done: float, total: float) -> None:
            known[0] = (done, total)

        ticker = threading.Thread(target=show, daemon=True, name="progress")
        ticker.start()
        try:
            yield update
        finally:
            over.set()
            ticker.join()
            self.done()

    def done(self) -> None:
        """What was waited for is there."""
        with self._changed:
            self._clear_bar()
            self.now = Progress()

    def _draw(self) -> None:
        line = self.now.line()
        if self.now.total:
            filled = round(BAR_WIDTH * min(1.0, self.now.done / self.now.total))
            line = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {line}"
        room = shutil.get_terminal_size().columns - 1  # a line that wraps could not be taken back
        print(f"\r\x1b[K{line[:room]}", end="", file=self._stream, flush=True)
        self._bar_shown = True

    def _clear_bar(self) -> None:
        if self._bar_shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._bar_shown = False

    def lines(self, last: int = 0, after: int = 0) -> list[tuple[int, float, str]]:
        """(number, Unix time, text) of the lines kept after line `after`; of these the `last` ones, 0 = all."""
        with self._changed:
            found = [line for line in self._lines if line[0] > after]
        return found[-last:] if last else found

    def follow(self, after: int, wait_s: float) -> Iterator[tuple[int, float, str]]:
        """The lines after `after`, waiting at most `wait_s` for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > after, wait_s)
        yield from self.lines(after=after)


def duration(seconds: float) -> str:
    """ "8 s", "3 min", "2 h 10 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _number(value: float) -> str:
    return f"{value:,.0f}" if (value == int(value) and value < 1000) or value >= 1000 else f"{value:.1f}"
