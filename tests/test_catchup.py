"""Laws of catching up: by replay where that is shorter, else by download; in the end everybody stands alike."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.trainer.catchup import REPLAY_AT_MOST, catch_up
from dtrain.trainer.download import DownloadReport
from dtrain.trainer.errors import CheckpointError, RunError
from dtrain.trainer.exchange import Watch
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.model import GPT
from dtrain.trainer.outer_loop import OuterLoop
from dtrain.trainer.strategies import make_strategy
from dtrain.trainer.voice import Voice

SIZE = {"model.dim": 64, "model.num_layers": 1, "model.num_heads": 1, "model.hidden_dim": 64}


def outer_loop(**settings: object) -> OuterLoop:
    """A worker's outer half, at round 0."""
    manifest = preset_manifest("catchup", "tiny", {**SIZE, **settings})
    local = FlatParameters(GPT(manifest.model, seed=1))
    codec = Codec(manifest.codec, local.shapes)
    return OuterLoop(manifest, local, codec, make_strategy(manifest, local.shapes))


def round_of(outer: OuterLoop) -> list[bytes]:
    codec, round = outer.codec, outer.round
    delta = [torch.full_like(tensor, 0.01 * (round + 1)) for tensor in outer.theta]
    terms: dict[str, Any] = {"run": bytes(8), "round": round}
    payload = codec.encode(delta, codec.error_feedback(), decay=1.0, **terms)
    return [
        codec.reduce(
            [(0, 100.0, payload)], residual=None, first_chunk=0, num_chunks=codec.num_chunks, **terms
        )
    ]


@dataclass
class View:
    status: dict[str, object]
    peer_id: str = "donor"
    age_s: float = 0.0
    is_believed: bool = True


@dataclass
class Past:
    round: int
    base_digest: bytes
    aggregates: Sequence[bytes]


@dataclass
class State:
    round: int
    work: float
    digest: bytes
    blob: memoryview


@dataclass
class OneDonor:
    """An exchange with one donor, which stands at `outer` and keeps the rounds since `kept_from`."""

    outer: OuterLoop
    kept_from: int = 0
    rounds_while_downloading: int = 0
    broken_downloads: int = 0
    trouble: str = ""
    spoil: Callable[[bytearray], None] = lambda blob: None
    past: dict[int, Past] = field(default_factory=dict)
    num_replayed: int = 0
    num_downloads: int = 0

    def advance(self, rounds: int) -> None:
        for _ in range(rounds):
            base, aggregates = self.outer.digest, round_of(self.outer)
            self.past[self.outer.round] = Past(self.outer.round, base, aggregates)
            self.outer.step(aggregates)

    def swarm(self) -> list[View]:
        outer = self.outer
        status = {"state": "training", "round": outer.round, "work": float(outer.tokens)}
        return [View({**status, "digest": outer.digest.hex()})]

    def fetch_round(self, round: int) -> Past | None:
        self.num_replayed += round >= self.kept_from
        return self.past.get(round) if round >= self.kept_from else None

    def fetch_state(self, watch: Watch) -> State | None:
        if self.trouble:
            watch.trouble(self.trouble)
            return None
        self.num_downloads += 1
        blob = bytearray()
        given = self.outer.give(blob.extend)
        if self.broken_downloads:
            self.broken_downloads -= 1
            watch.progress(len(blob) // 2, len(blob))
            return None
        watch.progress(len(blob), len(blob))
        self.spoil(blob)
        self.advance(self.rounds_while_downloading)
        self.rounds_while_downloading = 0
        return State(given.round, given.work, given.digest, memoryview(blob))


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Heard:
    """What a user and the metrics are told."""

    lines: list[str] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    voice: Voice = field(default_factory=lambda: Voice(io.StringIO()))
    shown: list[str] = field(default_factory=list)

    def write(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def report(self) -> DownloadReport:
        report = DownloadReport(self, self.lines.append, self.clock)  # type: ignore[arg-type]
        report.bar = self.voice
        return report


def catch(outer: OuterLoop, exchange: OneDonor, heard: Heard | None = None) -> bool:
    heard = heard or Heard()
    return catch_up(outer, exchange, heard.report(), heard.clock)  # type: ignore[arg-type]


def stand_equal(a: OuterLoop, b: OuterLoop) -> bool:
    same_shared = all(torch.equal(x, y) for x, y in zip(a._in_order(), b._in_order(), strict=True))
    return same_shared and (a.round, a.tokens, a.digest) == (b.round, b.tokens, b.digest)


def test_few_missed_rounds_are_replayed() -> None:
    """A worker that missed a round or two fetches their aggregates, not theta."""
    donor = OneDonor(outer_loop())
    donor.advance(2)
    outer = outer_loop()
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer)
    assert (donor.num_replayed, donor.num_downloads) == (2, 0)


def test_many_missed_rounds_are_more_than_the_state() -> None:
    """When the missed rounds would be more bytes than the state, the state is downloaded."""
    dense = {"codec.k": 4096, "codec.value_bits": 16}  # a round is half of the state
    donor = OneDonor(outer_loop(**dense))
    donor.advance(3)
    outer = outer_loop(**dense)
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer)
    assert donor.num_downloads == 1


def test_rounds_that_pass_during_a_download_are_replayed() -> None:
    """However many they are: the download stays useful while the run moves on."""
    donor = OneDonor(outer_loop(), kept_from=5, rounds_while_downloading=40)
    donor.advance(5)
    outer = outer_loop()
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer) and outer.round == 45
    assert donor.num_downloads == 1


def test_a_download_may_take_longer_than_peers_keep_rounds() -> None:
    """The rounds that passed meanwhile are still replayed, however many: it does not begin anew."""
    donor = OneDonor(outer_loop(), kept_from=5, rounds_while_downloading=REPLAY_AT_MOST + 30)
    donor.advance(5)
    outer = outer_loop()
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer)
    assert donor.num_downloads == 1


def test_all_that_is_shared_travels() -> None:
    """A strategy's shared tensors come along, and are covered by the digest."""
    diloco = {"strategy.name": "diloco"}
    donor = OneDonor(outer_loop(**diloco), kept_from=9)
    donor.advance(2)
    assert donor.outer.strategy.shared_state()
    outer = outer_loop(**diloco)
    assert len(outer.pieces) > len(outer_loop().pieces)
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer)


def test_a_broken_download_is_taken_up_again_while_it_gets_somewhere() -> None:
    """Breaks with progress between them exhaust nobody's patience."""
    donor = OneDonor(outer_loop(), kept_from=9, broken_downloads=2)
    donor.advance(1)
    outer = outer_loop()
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer)
    assert donor.num_downloads == 3


@pytest.mark.parametrize("place", [0, -1])
def test_a_state_that_does_not_match_its_digest_is_not_taken_over(place: int) -> None:
    """The trainer checks all of it again, before a single weight changes."""
    donor = OneDonor(outer_loop())
    donor.advance(1)
    blob = bytearray()
    given = donor.outer.give(blob.extend)
    blob[place] ^= 1
    outer = outer_loop()
    before = outer.digest, outer.state.theta_flat.clone()
    with pytest.raises(CheckpointError, match="digest"):
        outer.take_over(State(given.round, given.work, given.digest, memoryview(blob)))
    with pytest.raises(CheckpointError, match="size"):
        outer.take_over(State(given.round, given.work, given.digest, memoryview(blob)[:-4]))
    assert outer.digest == before[0] and torch.equal(outer.state.theta_flat, before[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_not_taken_over(value: float) -> None:
    """A donor can make up a digest for any bytes: one number that is none would be the end of every weight."""
    donor = OneDonor(outer_loop())
    donor.outer.state.theta_flat[7] = value
    donor.outer._stands_at(1, 1000)
    blob = bytearray()
    given = donor.outer.give(blob.extend)
    outer = outer_loop()
    before = outer.digest
    with pytest.raises(CheckpointError, match="not finite"):
        outer.take_over(State(given.round, given.work, given.digest, memoryview(blob)))
    assert outer.digest == before


def test_without_any_state_a_worker_goes_on_after_a_while() -> None:
    """Nobody can give what is missing: after PATIENCE_S the worker goes on with what it has."""
    donor = OneDonor(outer_loop(), kept_from=9, broken_downloads=10**9)
    donor.advance(1)
    heard = Heard()
    assert not catch(outer_loop(), donor, heard)
    assert heard.clock.now >= 120.0


def test_a_disk_that_cannot_take_the_state_ends_the_worker_with_a_line() -> None:
    """Training from the first weights instead would help nobody."""
    donor = OneDonor(outer_loop(), kept_from=9, trouble="the run's weights need 9.00 GB")
    donor.advance(1)
    with pytest.raises(RunError, match=r"need 9\.00 GB"):
        catch(outer_loop(), donor)


def test_progress_tells_bytes_rate_and_the_time_left() -> None:
    """Once in a while, and at the end; what an earlier attempt got does not count for the rate."""
    heard = Heard()
    report = heard.report()
    report.begin()
    for step in range(11):
        report.progress(50_000_000 + step * 5_000_000, 100_000_000)
        heard.shown.append(heard.voice.now.line())
        heard.clock.now += 1.0
    first = heard.events[0][1]
    assert first == {"have_bytes": 50_000_000, "total_bytes": 100_000_000, "bytes_per_s": 0, "eta_s": None}
    assert heard.events[5][1]["bytes_per_s"] == 5_000_000 and heard.events[5][1]["eta_s"] == 5.0
    assert heard.lines == ["Going on with the download where it stopped: 50.0 MB are here."]
    assert heard.shown[5] == "Downloading the run's weights: 75 of 100 MB (75 %), 5.00 MB/s, 5 s left"
    assert heard.shown[-1] == ""  # gone with the last byte
    report.left("12D3KooWdonorabcdefgh", "piece 3 is corrupt")
    assert (
        heard.lines[-1] == "Worker abcdefgh gave bad data (piece 3 is corrupt); downloading from others only."
    )
    assert heard.events[-1] == (
        "donor_left",
        {"peer_id": "12D3KooWdonorabcdefgh", "reason": "piece 3 is corrupt"},
    )


def test_who_is_not_believed_is_not_followed() -> None:
    """Its work is more, but it has not handed it on for long: nothing is asked of it."""
    donor = OneDonor(outer_loop())
    donor.advance(2)
    swarm, outer = donor.swarm, outer_loop()
    donor.swarm = lambda: [replace(view, is_believed=False) for view in swarm()]  # type: ignore[method-assign]
    assert not catch(outer, donor)
    assert (outer.round, donor.num_replayed, donor.num_downloads) == (0, 0, 0)


def test_a_history_that_the_swarm_refuses_again_and_again_yields() -> None:
    """Its tokens are more than the others', as a liar's would be; after three refusals it takes what they have."""
    donor = OneDonor(outer_loop())
    donor.advance(2)
    outer = outer_loop()
    outer._stands_at(7, 10**15)
    for _ in range(3):
        fetched = catch(outer, donor)
        assert not fetched
        outer.was_refused(caught_up=fetched)
    assert catch(outer, donor) and stand_equal(outer, donor.outer)


def test_who_has_caught_up_waits_for_no_liar() -> None:
    """One claims as much work as the others, at a digest that nobody can give: among five it is followed by none."""
    donor = OneDonor(outer_loop())
    donor.advance(2)
    swarm, outer, heard = donor.swarm, outer_loop(), Heard()

    def lied_to() -> list[View]:
        [honest] = swarm()
        liar = View({**honest.status, "digest": "0" * 64}, "liar")
        return [replace(honest, peer_id=f"honest {i}") for i in range(4)] + [liar]

    donor.swarm = lied_to  # type: ignore[method-assign]
    assert catch(outer, donor, heard)
    assert stand_equal(outer, donor.outer)
    assert heard.clock.now == 0.0


def test_of_two_halves_the_smaller_takes_over_the_others_state() -> None:
    """Though its own history has as much work in it."""
    donor, outer = OneDonor(outer_loop()), outer_loop()
    donor.advance(2)
    alike, swarm = outer_loop(), donor.swarm
    for _ in range(2):
        outer.step(round_of(alike))  # the same sums twice: another theta
    assert outer.tokens == donor.outer.tokens and outer.digest != donor.outer.digest
    donor.swarm = lambda: [replace(swarm()[0], peer_id=peer) for peer in "abc"]  # type: ignore[method-assign]
    assert catch(outer, donor)
    assert stand_equal(outer, donor.outer)
    assert donor.num_downloads == 1
