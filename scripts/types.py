"""Run mypy over all packages, and fail if it saw fewer files than there are: a broken link in typings/ hides them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDERS = ("trainer", "compression", "dht", "experiments")


def main() -> int:
    """Exit code for the shell."""
    root = Path(__file__).resolve().parent.parent
    wanted = sum(1 for folder in FOLDERS for _ in (root / folder).rglob("*.py"))
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=root, capture_output=True, text=True)
    print(result.stdout + result.stderr, end="")
    if result.returncode:
        return result.returncode
    counted = re.search(r"no issues found in (\d+) source file", result.stdout)
    if counted is None or int(counted[1]) < wanted:
        print(f"mypy checked {counted[1] if counted else 0} files of {wanted}: is a link in typings/ broken?")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
