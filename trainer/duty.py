"""How much of this machine a worker takes: its threads, its pace, and when it stands aside."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Event

import torch

from dtrain.trainer.clock import Clock
from dtrain.trainer.control import Control
from dtrain.trainer.pacing import Pace, Pacer
from dtrain.trainer.settings import MachineSettings

POLL_S = 0.1


class Duty:
    """Keeps one worker to its user's limits; `stop` cuts every wait short."""

    def __init__(
        self, settings: MachineSettings, control: Control, device: torch.device, stop: Event, clock: Clock
    ):
        self._settings, self._control, self._device = settings, control, device
        self._stop, self._clock = stop, clock
        self.use_threads()

    def use_threads(self) -> None:
        """Train with as many CPU threads as the user allows now."""
        threads = self._control.limits.threads or self._settings.threads
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))

    def rest(self, pace: Pace, new_tokens: int, step_began: float) -> None:
        """After an inner step that began at `step_began`: keep to the tokens per second and the share of the time."""
        limit, now = self._settings.max_tokens_per_s, self._clock.monotonic()
        ready = pace.began + (pace.tokens + new_tokens) / limit if limit else now
        if self._control.limits.compute_percent < 100:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a step's call returns before the GPU has done it
            now = self._clock.monotonic()
            ready = max(ready, now + self._control.rest_s(now - step_began))
        self._clock.wait(self._stop, max(0.0, ready - now))

    def sit_out(self, pacer: Pacer, pace: Pace) -> None:
        """Held in the middle of a round: do no more of it. A round that the swarm's tokens end is not cut short for
        the others, as our handing in would."""
        while not (pacer.is_fixed or pacer.is_over(pace) or self._stop.is_set()):
            self._clock.wait(self._stop, POLL_S)

    def hold(self, is_over: Callable[[], bool], say: Callable[[str], None]) -> bool:
        """Wait until the user and the limits let this machine train again; False if the worker's end came first."""
        said = ""
        while not is_over() and (reason := self._control.held()):
            if reason != said:
                say(f"Holding: {reason}.")
                said = reason
            self._clock.wait(self._stop, POLL_S)
        if is_over():
            return False
        say("Going on.")
        self.use_threads()
        return True
