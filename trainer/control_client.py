"""Calls a running worker's control service; for the command line and the dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc

from dtrain.trainer import control_pb2
from dtrain.trainer.control_files import Endpoint
from dtrain.trainer.control_pb2 import LogLine, Status
from dtrain.trainer.errors import RunError, UsageError

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
CALL_S = 10.0  # longest wait for an answer


class ControlClient:
    """One worker's controls. Each call raises RunError when the worker is gone, UsageError when it refuses."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._metadata = (("authorization", f"Bearer {endpoint.token}"),)
        self._channel = grpc.insecure_channel(endpoint.address, options=[("grpc.enable_http_proxy", 0)])

    def status(self) -> Status:
        return self._unary("GetStatus", control_pb2.StatusRequest())

    def pause(self) -> Status:
        return self._unary("Pause", control_pb2.Empty())

    def resume(self) -> Status:
        return self._unary("Resume", control_pb2.Empty())

    def finish(self) -> Status:
        return self._unary("Finish", control_pb2.Empty())

    def stop(self) -> Status:
        return self._unary("Stop", control_pb2.Empty())

    def set_limits(self, **changes: Any) -> Status:
        """Change the given fields of `limits.Limits`."""
        return self._unary("SetLimits", control_pb2.Limits(**changes))

    def watch_status(self, per_s: float = 0.0) -> Iterator[Status]:
        """The status now and whenever it changed; ends when the worker does."""
        request = control_pb2.WatchRequest(per_s=per_s)
        yield from self._stream("WatchStatus", request, Status)

    def read_log(self, lines: int = 0, *, follow: bool = False) -> Iterator[LogLine]:
        """The last lines that the worker said (0 = all kept); with `follow` also those to come."""
        yield from self._stream("ReadLog", control_pb2.LogRequest(lines=lines, follow=follow), LogLine)

    def _unary(self, name: str, request: Any) -> Status:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{name}", lambda message: message.SerializeToString(), Status.FromString
        )
        with self._named_errors():
            reply: Status = call(request, timeout=CALL_S, metadata=self._metadata)
            return reply

    def _stream(self, name: str, request: Any, reply: type[Any]) -> Iterator[Any]:
        call = self._channel.unary_stream(
            f"/{SERVICE}/{name}", lambda message: message.SerializeToString(), reply.FromString
        )
        answers = call(request, metadata=self._metadata)
        try:
            with self._named_errors():
                yield from answers
        finally:
            answers.cancel()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            who = f"worker {self.endpoint.name} of {self.endpoint.run_id}"
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise UsageError(error.details()) from None
            raise RunError(f"{who} does not answer: {error.details() or error.code().name}") from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
