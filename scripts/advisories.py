"""Ask the OSV database, through pip-audit, whether a pinned dependency has a known advisory.

Exit code 1 if one has. Where the database cannot be reached, one line says that nothing was checked, and the exit code
is 0: `make check` works without a network. A clean answer holds for a day.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

# Advisory -> why it does no harm here, and until when it is to be looked at again.
ACCEPTED: dict[str, str] = {}

OSV_URL = "https://api.osv.dev/v1/query"
ANSWER_S = 5  # longest wait for one answer
PATIENCE_S = 120.0  # and for all of them
FRESH_S = 24 * 3600.0
# What pip-audit's last words have in them when the database, and not the list of packages, is at fault.
UNREACHABLE = ("requests.exceptions.", "ServiceError", "ConnectionError", "Could not connect")


def main(arguments: list[str] | None = None) -> int:
    """Exit code for the shell."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pins", type=Path, default=root / "constraints.txt", help="NAME==VERSION lines")
    parser.add_argument("--osv-url", default=OSV_URL)
    parser.add_argument("--memo", type=Path, default=Path(sys.prefix) / ".advisories.json")
    args = parser.parse_args(arguments)
    asked = hashlib.sha256(args.pins.read_bytes() + repr(sorted(ACCEPTED)).encode()).hexdigest()
    if _is_fresh(args.memo, asked):
        print("advisories: none, as of today")
        return 0
    try:
        audit = subprocess.run(
            _command(args.pins, args.osv_url), capture_output=True, text=True, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        print("advisories: NOT CHECKED, the database did not answer in time")
        return 0
    try:
        packages = json.loads(audit.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return _failed(audit.stderr)
    found = [(package, flaw) for package in packages for flaw in package.get("vulns", ())]
    for package, flaw in found:
        fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
        print(f"advisories: {package['name']} {package['version']}: {flaw['id']}, mended in {fixed}")
    if found:
        print(
            "advisories: move the pins in constraints.txt, or say in scripts/advisories.py why it does no harm"
        )
        return 1
    print(f"advisories: none on {len(packages)} packages")
    args.memo.write_text(json.dumps({"asked": asked, "at": time.time()}))
    return 0


def _command(pins: Path, osv_url: str) -> list[str]:
    ignored = [word for advisory in ACCEPTED for word in ("--ignore-vuln", advisory)]
    return [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps", "--disable-pip"),
        *("--vulnerability-service", "osv", "--osv-url", osv_url, "--timeout", str(ANSWER_S)),
        *("--progress-spinner", "off", "--format", "json", *ignored),
    ]


def _is_fresh(memo: Path, asked: str) -> bool:
    try:
        note = json.loads(memo.read_text())
        return bool(note["asked"] == asked and 0 <= time.time() - note["at"] < FRESH_S)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _failed(said: str) -> int:
    """pip-audit gave no result: was it the network?"""
    last = said.strip().splitlines()[-1:] or ["pip-audit said nothing"]
    if any(sign in said for sign in UNREACHABLE):
        print("advisories: NOT CHECKED, the database cannot be reached")
        return 0
    print(f"advisories: pip-audit failed: {last[0]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
