"""Ends what does not end by itself: a round that is stuck is a defect, but must not cost the worker its run."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Stuck(Exception):
    """Something took longer than it ever may; where everything stood is in the log."""


async def within(limit_s: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns. Raises Stuck if it takes more than `limit_s` seconds.

    Not `asyncio.wait_for`, which would wait until the work has let itself be cancelled: who is stuck may not.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=limit_s)
    finally:
        task.cancel()
    if not done:
        logging.error("not over after %.0f s; where each task stands:\n%s", limit_s, _stacks())
        raise Stuck(f"not over after {limit_s:.0f} s")
    return task.result()


def _stacks() -> str:
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(limit=8, file=text)
    return text.getvalue()
