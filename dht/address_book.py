"""Remembers where peers can be called, in the worker, which outlives its network process."""

from __future__ import annotations

MAX_REMEMBERED = 64


class AddressBook:
    """Where peers last said that they are, also of peers that have not been heard of for long."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def hear(self, peer: str, address: object) -> None:
        """A peer says where it can be called; anything but an address is passed over."""
        if isinstance(address, str) and address:
            self._last.pop(peer, None)
            self._last[peer] = address
            if len(self._last) > MAX_REMEMBERED:
                del self._last[next(iter(self._last))]

    def addresses(self) -> list[str]:
        """The newest last."""
        return list(self._last.values())
