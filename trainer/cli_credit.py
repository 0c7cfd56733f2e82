"""`dtrain credit`: what this machine's workers have contributed, countersigned by those that were with them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.errors import UsageError
from dtrain.trainer.text import clean_line

if TYPE_CHECKING:
    from dtrain.dht.credit import Purse
    from dtrain.dht.credit_file import Statement, Tally

MAX_TEAM = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.usage = "dtrain credit [--out FILE] | dtrain credit verify FILE"
    parser.epilog = (
        "example: dtrain credit --team 'Night Owls' --out credit.json; dtrain credit verify credit.json"
    )
    parser.add_argument("words", nargs="*", metavar="verify FILE", help="check a statement; needs no network")
    parser.add_argument("--run-id", metavar="NAME", help="only workers of this run")
    parser.add_argument("--name", help="only the worker of this name; the statement says it")
    parser.add_argument("--team", default="", help="for the statement: whom the credit is for, if you want")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a signed statement")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Show, write or verify."""
    if args.words:
        if args.words[0] != "verify" or len(args.words) != 2:
            raise UsageError("type dtrain credit, or dtrain credit verify FILE")
        return _verify(Path(args.words[1]), args.json)
    if clean_line(args.team, MAX_TEAM) != args.team:
        raise UsageError(f"the team (--team) must be at most {MAX_TEAM} visible characters on one line")
    folders = _folders(args)
    for folder in folders:
        _show(folder, args.json)
    if args.out is not None:
        if len(folders) > 1:
            names = ", ".join(f"--run-id {f.parent.name} --name {f.name}" for f in folders)
            raise UsageError(f"a statement is of one worker; type one of: {names}")
        _write(folders[0], args.team, args.out)
    return 0


def _folders(args: argparse.Namespace) -> list[Path]:
    """Folders of workers below this one that have contributed."""
    from dtrain.dht.credit_file import FILE

    found = [path.parent for path in sorted(Path("dtrain-runs").glob(f"*/*/{FILE}"))]
    wanted = [f for f in found if args.run_id in (None, f.parent.name) and args.name in (None, f.name)]
    if not wanted:
        raise UsageError(
            "no worker of this folder has contributed yet: go where you started it (dtrain-runs is there), "
            "or wait for its first round"
        )
    return wanted


def _load(folder: Path) -> tuple[bytes, Tally, Purse]:
    from dtrain.dht.credit_file import load
    from dtrain.dht.identity import load_or_create
    from dtrain.trainer.signing import SignedManifest

    run = SignedManifest.from_json((folder / "manifest.json").read_text()).manifest.hash
    return run, *load(folder / "credit.json", run, load_or_create(folder / "identity.key").peer_id)


def _show(folder: Path, as_json: bool) -> None:
    _, tally, purse = _load(folder)
    rounds, tokens, signers = purse.totals()
    if as_json:
        own = {
            f"own_{name}" if name in ("rounds", "tokens") else name: n for name, n in asdict(tally).items()
        }
        entry = {"run_id": folder.parent.name, "name": folder.name, "rounds": rounds, "tokens": tokens}
        print(json.dumps({**entry, "signers": signers, **own}))
        return
    print(
        f"{folder.name} in run {folder.parent.name}: {rounds:,} rounds and {tokens:,} tokens countersigned by "
        f"{signers} other workers\n  by its own count {tally.rounds:,} rounds (those alone too), {tally.tokens:,} "
        f"tokens; {tally.bytes_up / 1e9:.3f} GB up, {tally.bytes_down / 1e9:.3f} GB down"
    )


def _write(folder: Path, team: str, out: Path) -> None:
    from dtrain.dht.credit_file import statement
    from dtrain.dht.identity import load_or_create

    run, tally, purse = _load(folder)
    text = statement(
        load_or_create(folder / "identity.key"),
        folder.parent.name,
        run,
        tally,
        purse,
        name=folder.name,
        team=team,
        issued=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        out.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
    print(f"Signed statement written to {out}; anybody can check it: dtrain credit verify {out}")


def _verify(path: Path, as_json: bool) -> int:
    from dtrain.dht.credit_file import CreditError, check

    try:
        found = check(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except CreditError as error:
        raise UsageError(f"{path} is refused: {clean_line(str(error))}") from None
    print(json.dumps(asdict(found)) if as_json else describe(found))
    return 0


def describe(found: Statement) -> str:
    """A checked statement for a reader. Its texts are a stranger's."""
    name, team, run_id, issued = map(clean_line, (found.name, found.team, found.run_id, found.issued))
    whose = f"{name or 'no name'}{f' of team {team}' if team else ''} ({found.peer})"
    return (
        f"Genuine: {whose}\n"
        f"contributed {found.rounds:,} rounds and {found.tokens:,} tokens to run {run_id} ({found.run[:8]}), "
        f"countersigned by {found.signers} other workers.\n"
        f"By its own word, issued {issued}: {found.bytes_up / 1e9:.3f} GB up, {found.bytes_down / 1e9:.3f} GB down."
    )
