"""Hands out a run's state in the place of a worker's averager: the same requests, at the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, AsyncIterator  # noqa: UP035  # hivemind recognizes streams by typing's AsyncIterator only

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.dht.averager import SwarmAverager
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.state_donor import StateDonor
from dtrain.dht.streams import Call, first_header


class ArchiveDesk(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """Answers newcomers, for no round. `door` says who is let in, `args` are those of `Archive.archive`."""

    def __init__(self, p2p: P2P, args: Mapping[str, Any], donor: StateDonor, door: Heartbeats):
        self._p2p, self._donor, self._door = p2p, donor, door
        self._prefix, self._timeout_s = args["prefix"], args["sender_timeout_s"]

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        name: str = SwarmAverager._get_handle_name(namespace, method_name)
        return name

    async def rpc_fetch_state(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A newcomer asks for everything it needs to stand where our state stands."""
        caller = str(context.remote_id)
        async for message in self._donor.serve(
            stream, lambda: first_header(stream, lambda: self._door.refuses(caller), self._timeout_s)
        ):
            yield message

    def method(self, peer_id: str, name: str) -> Call:
        """A streaming RPC method of another peer, a worker or an archive."""
        stub = self.get_stub(self._p2p, PeerID.from_base58(peer_id), namespace=self._prefix)
        call: Call = getattr(stub, name)
        return call
