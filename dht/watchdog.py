"""Ends what does not end by itself: a round that is stuck is a defect, but must not cost the worker its run."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

STEP_S = 1.0
AGAIN_S = 0.2  # between two tries to cancel a task
TRIES = 50

Result = TypeVar("Result")


class Stuck(Exception):
    """Something took longer than it ever may; where everything stood is in the log."""


async def within(limit_s: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns. Raises Stuck if it takes more than `limit_s` seconds of this process's life: while it is
    frozen, nothing can go on.

    Not `asyncio.wait_for`, which would wait until the work has let itself be cancelled: who is stuck may not.
    """
    task = asyncio.ensure_future(work)
    try:
        left_s, done = limit_s, set[Any]()
        while not done and left_s > 0:  # in steps, of which a freeze makes one longer
            step_s = min(STEP_S, left_s)
            done, _ = await asyncio.wait({task}, timeout=step_s)
            left_s -= step_s
    finally:
        task.cancel()
    if not done:
        logging.error("not over after %.0f s; where each task stands:\n%s", limit_s, _stacks())
        raise Stuck(f"not over after {limit_s:.0f} s")
    return task.result()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks until they have ended, one way or another; what does not end in ten seconds is left behind.

    Once is not enough: up to Python 3.11 `asyncio.wait_for` swallows a cancellation that comes at the moment at which
    what it waits for is done, and who works in a loop then goes on with it. Not for tasks that must tidy up at length.
    """
    for _ in range(TRIES):
        rest = {task for task in tasks if not task.done()}
        if not rest:
            break
        for task in rest:
            task.cancel()
        await asyncio.wait(rest, timeout=AGAIN_S)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # whoever ends a task does not ask how it went


def _stacks() -> str:
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(limit=8, file=text)
    return text.getvalue()
