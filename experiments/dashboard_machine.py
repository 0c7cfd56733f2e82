"""This machine's workers, through the control services that they offer to their owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain.dht import rendezvous
from dtrain.trainer import control_files
from dtrain.trainer.control_client import ControlClient
from dtrain.trainer.control_pb2 import Limits, Status
from dtrain.trainer.errors import DtrainError, UsageError

ACTIONS: dict[str, Callable[[ControlClient], Status]] = {
    "pause": ControlClient.pause,
    "resume": ControlClient.resume,
    "finish": ControlClient.finish,
}
MAX_LOG_LINES = 500


class Machine:
    """The workers of one run (or, without a run id, of all runs) on this machine."""

    def __init__(self, run_id: str = ""):
        self._run_id = run_id

    def workers(self) -> list[dict[str, Any]]:
        """Every worker's status; one that does not answer has its name and the reason."""
        found = []
        for endpoint in self._endpoints():
            try:
                with ControlClient(endpoint) as client:
                    found.append(plain(client.status()))
            except DtrainError as error:
                found.append({"name": endpoint.name, "pid": endpoint.pid, "error": str(error)})
        return found

    def act(self, action: str, pid: int) -> dict[str, Any]:
        """Carry out one of ACTIONS; the status after it."""
        with self._client(pid) as client:
            return plain(ACTIONS[action](client))

    def set_limits(self, pid: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Change the given limits. UsageError for one that does not exist or does not fit."""
        known = {field.name for field in Limits.DESCRIPTOR.fields}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise UsageError(f"there is no limit {unknown[0][:40]!r}: choose of {', '.join(sorted(known))}")
        try:
            Limits(**changes)
        except (TypeError, ValueError) as error:
            raise UsageError(f"that is no limit: {error}") from None
        with self._client(pid) as client:
            return plain(client.set_limits(**changes))

    def log(self, pid: int, lines: int) -> list[dict[str, Any]]:
        """The last lines that a worker said."""
        with self._client(pid) as client:
            said = client.read_log(min(max(1, lines), MAX_LOG_LINES))
            return [{"time": line.time, "text": line.text} for line in said]

    def _client(self, pid: int) -> ControlClient:
        for endpoint in self._endpoints():
            if endpoint.pid == pid:
                return ControlClient(endpoint)
        raise UsageError(f"no worker of yours has the process id {pid}; it may have ended")

    def _endpoints(self) -> list[control_files.Endpoint]:
        found = control_files.find(rendezvous.folder() / "control")
        return [endpoint for endpoint in found if self._run_id in ("", endpoint.run_id)]


def plain(message: Any) -> dict[str, Any]:
    """A protobuf message as a dictionary; optional fields that are not set are None."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None:
            values[field.name] = plain(value)
        else:
            values[field.name] = value if not field.has_presence or message.HasField(field.name) else None
    return values
