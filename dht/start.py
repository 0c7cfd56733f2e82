"""Begins the network process (`python -m dtrain.dht.start FD`): hivemind without what it never uses here."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
from types import ModuleType
from typing import Any

END_S = 2.0  # for what is under way when the worker is gone


def put_off(name: str) -> None:
    """Have `import name` cost nothing until something of it is used."""
    module = ModuleType(name)

    def load(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    module.__getattr__ = load  # type: ignore[method-assign]
    sys.modules[name] = module


async def _serve(connection: socket.socket) -> None:
    from dtrain.dht.peer import NetworkPeer

    reader, writer = await asyncio.open_connection(sock=connection, limit=2**22)
    try:
        await NetworkPeer(reader, writer).serve()
    except Exception:
        logging.exception("the network process fails")
    await _end_the_rest()


async def _end_the_rest() -> None:
    """Not left to `asyncio.run`, which waits without end: a connection that is just being made, when the worker is
    killed, may not let itself be cancelled. A daemon that nobody speaks to ends by itself."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=END_S)
    os._exit(0)  # hivemind's helper threads never end


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides when we end
    # hivemind's own load balancing wants it, which ours takes the place of: a second and 40 MB less.
    put_off("scipy.optimize")
    import torch

    import dtrain.dht.peer  # noqa: F401  # before there is a loop

    torch.set_num_threads(1)
    logging.basicConfig(level=os.environ.get("DTRAIN_LOG_LEVEL", "WARNING"), format="network: %(message)s")
    # hivemind leaves tasks behind when it stops looking
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
