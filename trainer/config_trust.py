"""The sections of a run's manifest that say who is trusted with what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from dtrain.trainer.config import added, require, settle_types

ADMISSIONS = ("open", "token", "list")
MAX_ALLOWED = 500


@dataclass(frozen=True)
class AdmissionConfig:
    """Who may take part."""

    SECTION: ClassVar[str] = "admission"

    mode: str = added("open")
    """"open": everybody. "token": whoever has an invite by the organizer (`dtrain invite`). "list": the peers in
    `allowed`."""
    allowed: tuple[str, ...] = added(())
    """Peer ids, with "list"; a worker that is not listed says what its own is."""

    max_share: float = added(0.34)
    """In groups of more than four that are screened: the most, of all that counts in a round, that workers of one
    origin may count for together: by one admission token, or, with "open", in one network (/24, of IPv6 /48). It binds
    where workers come from three origins or more, never one worker alone, and not those that are more than half of
    all. 1 = no limit."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        share_fits = 0 < self.max_share <= 1
        require(share_fits, "admission.max_share", "be above 0, and 1 for no limit", self.max_share)
        choices, allowed = ", ".join(ADMISSIONS), self.allowed
        require(self.mode in ADMISSIONS, "admission.mode", f"be one of {choices}", self.mode)
        fits = isinstance(allowed, (list, tuple)) and len(allowed) <= MAX_ALLOWED
        rule = f"be a list of at most {MAX_ALLOWED} peer ids"
        require(fits and all(isinstance(peer, str) for peer in allowed), "admission.allowed", rule, allowed)
        object.__setattr__(self, "allowed", tuple(allowed))
        for peer in self.allowed:
            well_formed = re.fullmatch(r"[1-9A-HJ-NP-Za-km-z]{40,60}", peer) is not None
            require(well_formed, "admission.allowed", "hold peer ids such as 12D3KooW...", peer)
        rule = 'name peers with admission.mode = "list", and none otherwise'
        require((self.mode == "list") == bool(self.allowed), "admission.allowed", rule, self.allowed)


@dataclass(frozen=True)
class DefenceConfig:
    """What is done against members that do not do what they say."""

    SECTION: ClassVar[str] = "defence"

    recheck: float = added(0.02)
    """Share of its compute, and half that share of its traffic, that a worker spends at most on trying out others'
    updates on the data that they were given, in groups of more than four (`recheck.py`); 0 = none."""

    def __post_init__(self) -> None:
        settle_types(self, self.SECTION)
        require(0 <= self.recheck <= 1, "defence.recheck", "be between 0 and 1", self.recheck)
