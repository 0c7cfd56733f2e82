"""The control service of a running worker: gRPC on loopback, for who holds the token (`control.proto`)."""

from __future__ import annotations

import hmac
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dtrain.trainer import control_files, control_pb2
from dtrain.trainer.control import Control
from dtrain.trainer.control_files import Endpoint
from dtrain.trainer.errors import UsageError
from dtrain.trainer.voice import Voice

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
HOST = "127.0.0.1"
MAX_CALLS = 16  # at once; watchers hold one each
DEFAULT_PER_S = 2.0
MIN_PER_S, MAX_PER_S = 0.02, 20.0
LOOK_PERIOD_S = 1.0  # a watcher that has gone is noticed within this time

Context = Any  # grpc.ServicerContext; grpc ships no types


class ControlServer:
    """Serves one worker's controls while it is open; `folder` is where its token file goes."""

    def __init__(self, run_id: str, name: str, control: Control, voice: Voice, folder: Path):
        self._control, self._voice = control, voice
        self._closing = False
        token = secrets.token_urlsafe(24)
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="control"), interceptors=[_TokenCheck(token)]
        )
        self._server.add_generic_rpc_handlers([self._handlers()])
        checker = health.HealthServicer()
        checker.set("", health_pb2.HealthCheckResponse.SERVING)
        checker.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checker, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        port = self._server.add_insecure_port(f"{HOST}:0")
        self._server.start()
        pid = os.getpid()
        started = psutil.Process(pid).create_time()
        self.endpoint = Endpoint(run_id, name, pid, started, f"{HOST}:{port}", token)
        self._file = control_files.publish(self.endpoint, folder)

    def close(self) -> None:
        """End the calls under way and take the token file away."""
        self._closing = True
        self._control.note_change()
        self._file.unlink(missing_ok=True)
        self._server.stop(0.5).wait()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the calls

    def _handlers(self) -> Any:
        def unary(call: Callable[[Any, Context], control_pb2.Status], request: type[Any]) -> Any:
            return grpc.unary_unary_rpc_method_handler(call, request.FromString, _to_bytes)

        def ask(action: Callable[[], None]) -> Any:
            def call(_: control_pb2.Empty, context: Context) -> control_pb2.Status:
                action()
                return self._status()

            return unary(call, control_pb2.Empty)

        control = self._control
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetStatus": unary(lambda request, context: self._status(), control_pb2.StatusRequest),
                "WatchStatus": grpc.unary_stream_rpc_method_handler(
                    self._watch, control_pb2.WatchRequest.FromString, _to_bytes
                ),
                "Pause": ask(control.pause),
                "Resume": ask(control.resume),
                "Finish": ask(control.finish),
                "Stop": ask(control.stop),
                "SetLimits": unary(self._set_limits, control_pb2.Limits),
                "ReadLog": grpc.unary_stream_rpc_method_handler(
                    self._read_log, control_pb2.LogRequest.FromString, _to_bytes
                ),
            },
        )

    def _status(self) -> control_pb2.Status:
        control, now = self._control, self._voice.now
        return control_pb2.Status(
            **control.describe(),
            run_id=self.endpoint.run_id,
            name=self.endpoint.name,
            pid=self.endpoint.pid,
            started=self.endpoint.started,
            held=control.held(),
            pausing=control.pausing,
            finishing=control.finishing,
            bytes_today=control.bytes_today,
            bytes_this_month=control.bytes_this_month,
            memory_gb=control.memory_gb(),
            limits=control_pb2.Limits(**vars(control.limits)),
            progress=control_pb2.Progress(**vars(now)),
        )

    def _watch(self, request: control_pb2.WatchRequest, context: Context) -> Iterator[control_pb2.Status]:
        pause_s = watch_pause_s(request.per_s)
        last, seen = None, 0
        while context.is_active() and not self._closing:
            status = self._status()
            if status != last:
                last = status
                yield status
            time.sleep(pause_s)
            seen = self._control.wait(seen, LOOK_PERIOD_S)

    def _set_limits(self, request: control_pb2.Limits, context: Context) -> control_pb2.Status:
        changes = {field.name: value for field, value in request.ListFields()}
        try:
            self._control.set_limits(changes)
        except UsageError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return self._status()

    def _read_log(self, request: control_pb2.LogRequest, context: Context) -> Iterator[control_pb2.LogLine]:
        last = 0
        for last, moment, text in self._voice.lines(last=request.lines):  # noqa: B007 (used below)
            yield control_pb2.LogLine(time=moment, text=text)
        while request.follow and context.is_active() and not self._closing:
            for number, moment, text in self._voice.follow(last, LOOK_PERIOD_S):
                yield control_pb2.LogLine(time=moment, text=text)
                last = number


def watch_pause_s(per_s: float) -> float:
    """Seconds between two looks for a watcher that wants `per_s` a second; 0 = as usual."""
    return 1.0 / max(MIN_PER_S, min(MAX_PER_S, per_s if per_s > 0 else DEFAULT_PER_S))


def _to_bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


class _TokenCheck(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Refuses every call that does not carry the worker's token."""

    def __init__(self, token: str):
        self._wanted = f"Bearer {token}"

        def refuse(_: Any, context: Context) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this needs the worker's token")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        if not hmac.compare_digest(str(given).encode(), self._wanted.encode()):
            return self._refusal
        return continuation(details)
