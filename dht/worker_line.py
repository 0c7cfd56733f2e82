"""The network process's end of the socket to its worker: commands come in, replies, events and questions go out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from dtrain.dht import ipc
from dtrain.dht.streams import in_background

ANSWER_TIMEOUT_S = 60.0

Carry = Callable[[str, dict[str, Any]], Awaitable[Any]]


class WorkerLine:
    """`refusals` are the exceptions whose text is for the user; all others are errors of ours."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        refusals: tuple[type[Exception], ...],
    ):
        self._reader, self._writer, self._refusals = reader, writer, refusals
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._next_question = 0

    async def serve(self, carry_out: Carry, carried_out: Callable[[], None]) -> bool:
        """Have commands carried out side by side, until the worker says "close" (True) or is gone (False).

        `carry_out(name, arguments)` returns a command's value; `carried_out()` is called before its reply leaves.
        """
        try:
            while True:
                message = await ipc.receive_async(self._reader)
                if "answer" in message:
                    answered = self._asked.pop(message["answer"])
                    if not answered.done():  # an answer may come too late
                        answered.set_result(message["value"])
                elif message["do"] == "close":
                    return True
                else:
                    in_background(self._reply(message, carry_out, carried_out))
        except EOFError:
            return False

    async def _reply(self, message: ipc.Message, carry_out: Carry, carried_out: Callable[[], None]) -> None:
        try:
            value = await carry_out(message["do"], message["args"])
            reply = {"id": message["id"], "value": value}
        except self._refusals as error:
            reply = {"id": message["id"], "error": str(error)}
        except Exception as error:
            logging.exception("command %s failed", message["do"])
            reply = {"id": message["id"], "error": f"internal error: {error!r:.300}"}
        carried_out()
        self.send(reply)

    def send(self, message: ipc.Message) -> None:
        """Tell the worker something, if it is still there."""
        if not self._writer.is_closing():
            self._writer.write(ipc.encode(message))

    async def ask(self, question: str) -> Any:
        """The worker's answer, within a minute."""
        self._next_question += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[self._next_question] = future
        self.send({"ask": question, "id": self._next_question})
        return await asyncio.wait_for(future, ANSWER_TIMEOUT_S)

    def close(self) -> None:
        """Hang up: the worker takes it for the end of this process."""
        self._writer.close()
