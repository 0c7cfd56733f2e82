"""Remembers where peers can be called, in the worker, which outlives its network process, and over its restarts."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

MAX_REMEMBERED = 64
FILE = "peers.json"


class AddressBook:
    """Where peers last said that they are, also of peers that have not been heard of for long."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: a file to keep it in; what is no address book there is passed over."""
        self._path, self._last = path, dict[str, str]()
        with suppress(OSError, ValueError, AttributeError):
            for peer, address in json.loads(path.read_text()).items() if path else ():
                self._remember(peer, address)

    def hear(self, peer: str, address: object) -> None:
        """A peer says where it can be called; anything but an address is passed over."""
        if self._remember(peer, address):
            self._write()

    def _remember(self, peer: str, address: object) -> bool:
        """True if that is news."""
        if not isinstance(address, str) or not address:
            return False
        is_news = self._last.pop(peer, None) != address
        self._last[peer] = address
        if len(self._last) > MAX_REMEMBERED:
            del self._last[next(iter(self._last))]
        return is_news

    def _write(self) -> None:
        if self._path is None:
            return
        draft = self._path.with_suffix(".tmp")
        with suppress(OSError):  # a full disk: it is in memory still
            draft.write_text(json.dumps(self._last))
            os.replace(draft, self._path)

    def addresses(self) -> list[str]:
        """The newest last."""
        return list(self._last.values())
