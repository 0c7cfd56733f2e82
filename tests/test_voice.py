"""What a user sees of a worker's waits: a bar at a terminal, few lines elsewhere, nothing of what is over at once."""

from __future__ import annotations

import io
import re

import pytest

from dtrain.trainer import voice
from dtrain.trainer.voice import Progress, Voice


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A `time` that only `pass_by` moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(voice, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress("Connecting", 0.4, unit="s"), "Connecting"),
        (Progress("Connecting", 7.2, unit="s"), "Connecting (7 s)"),
        (Progress("Compiling", 1, 4, eta_s=9.0), "Compiling: 1 of 4 (25 %), 9 s left"),
        (Progress("Reading", 3.14, 12.5, "MB", 130.0), "Reading: 3.1 of 12.5 MB (25 %), 2 min left"),
        (
            Progress("Loading", 1.5, 3, "MB", 2.0, rate=0.75),
            "Loading: 1.5 of 3 MB (50 %), 0.75 MB/s, 2 s left",
        ),
    ],
)
def test_a_progress_in_words(progress: Progress, line: str) -> None:
    """Seconds where no total is known, else how much of it, the rate and the time left."""
    assert progress.line() == line


def test_without_a_terminal_a_long_wait_gets_few_lines(clock: Clock) -> None:
    """None in the first two seconds, then one in five, and the last."""
    shown = io.StringIO()
    speaker = Voice(shown)
    for second in range(21):
        speaker.progress("Loading", second, 20)
        clock.now += 1.0
    assert [int(line.split()[1]) for line in shown.getvalue().splitlines()] == [2, 7, 12, 17, 20]
    for second in range(10):  # what only a terminal needs
        speaker.progress("Training", second, 9, lines=False)
        clock.now += 1.0
    assert "Training" not in shown.getvalue()
    assert speaker.now.stage == "Training"  # dtrain status shows it all the same


def test_at_a_terminal_there_is_a_bar_that_gives_way_to_lines(clock: Clock) -> None:
    """The bar is drawn over itself, a line takes its place, and in the end nothing is left of it."""
    shown = Terminal()
    speaker = Voice(shown)
    for done in range(5):
        speaker.progress("Loading", done, 4, lines=False)
        clock.now += 1.0
    assert "[############............] Loading: 2 of 4 (50 %), 2 s left" in shown.getvalue()
    speaker.say("A line.")
    speaker.progress("Loading", 2, 4)
    speaker.done()
    assert shown.getvalue().endswith("\r\x1b[K") and "\r\x1b[KA line.\n" in shown.getvalue()
    assert shown.getvalue().count("\n") == 1 and speaker.now == Progress()


def test_a_long_bar_stays_on_one_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that wrapped could not be drawn over."""
    monkeypatch.setenv("COLUMNS", "40")
    shown = Terminal()
    Voice(shown).progress("x" * 100, 1, 4)
    assert len(re.sub(r"\r\x1b\[K", "", shown.getvalue())) == 39


def test_what_others_said_cannot_steer_the_terminal() -> None:
    """Control characters and turned writing directions are shown as such; line breaks stay."""
    shown = io.StringIO()
    Voice(shown).say("worker x: \x1b[2Jgone\x07 \u202eback\nnext")
    assert shown.getvalue() == "worker x: \ufffd[2Jgone\ufffd \ufffdback\nnext\n"


def test_waiting_shows_itself_until_it_is_over() -> None:
    """While it is open the wait is shown again and again without help; once told how much is done, that."""
    shown = Terminal()
    speaker = Voice(shown)
    seen = set[tuple[float, float]]()
    with speaker.waiting("Working", unit="MB", scale=1e6) as update:
        while speaker.now.stage != "Working":
            voice.time.sleep(0.01)
        update(1e6, 4e6)
        while (1.0, 4.0) not in seen:
            seen.add((speaker.now.done, speaker.now.total))
            voice.time.sleep(0.01)
    assert "Working: 1 of 4 MB (25 %)" in shown.getvalue() and speaker.now == Progress()
