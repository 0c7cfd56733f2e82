"""`dtrain runs`: the runs that can be seen from here, on this machine and on its network."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict

NONE_SEEN = (
    "No runs are visible here. To join one elsewhere, ask one of its workers for an invite and type "
    "dtrain join INVITE; to begin one: dtrain worker --run-id NAME"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain runs"
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object a run")
    parser.add_argument("--no-lan", action="store_true", help="look on this machine only")


def run(args: argparse.Namespace) -> int:
    """List the runs."""
    from dtrain.dht import rendezvous

    seen: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: {"here": set(), "network": set()})
    for local in rendezvous.find("*"):
        seen[local.run_id, local.manifest_hash]["here"].add(local.peer_id)
    problem = ""
    if not args.no_lan:
        from dtrain.dht import lan

        try:
            for worker in lan.find():
                seen[worker.run_id, worker.manifest_hash]["network"].add(worker.peer_id)
        except lan.LanError as error:
            problem = str(error)
    for (run_id, manifest_hash), where in sorted(seen.items()):
        here, network = len(where["here"]), len(where["network"] - where["here"])
        if args.json:
            fields = {"run_id": run_id, "manifest": manifest_hash, "here": here, "network": network}
            print(json.dumps(fields))
        else:
            print(
                f"{run_id}  (settings {manifest_hash[:8]}): {here} peers on this machine, "
                f"{network} on this network. Join with: dtrain worker --run-id {run_id}"
            )
    if problem and not args.json:
        print(f"Looked on this machine only: {problem}.")
    if not seen and not args.json:
        print(NONE_SEEN)
    return 0
