"""Fuzz one parser of what others send, guided by coverage (atheris, libFuzzer): `make fuzz-atheris` runs them all.

The parsers and their honest samples are those of tests/fuzz_parsers.py. What is found goes on from run to run in
.fuzz/PARSER; an input that crashes, hangs or takes too much memory is left there as crash-*, timeout-* or oom-*.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_INPUT_BYTES, MAX_MEMORY_MB, MAX_INPUT_S = 8192, 2048, 10
KERNELS = ROOT / "compression" / "kernels"
COMPILED = [
    f"dtrain.compression.kernels.{path.stem}" for path in KERNELS.glob("*.py")
]  # by numba, from the bytecode
SILENT = 'atheris is not installed: type pip install "dtrain[fuzz]" (Linux; not for every Python and machine)'


def main() -> int:
    """Never returns after a crash: libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parser", help="of tests/fuzz_parsers.py, such as manifest")
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    try:
        import atheris
    except ImportError:
        print(SILENT, file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "tests"))
    with atheris.instrument_imports(include=["dtrain"], exclude=COMPILED):
        import fuzz_parsers
    if args.parser not in fuzz_parsers.PARSERS:
        print(f"there is no parser {args.parser!r}: {', '.join(fuzz_parsers.PARSERS)}", file=sys.stderr)
        return 2
    chosen = fuzz_parsers.PARSERS[args.parser]
    folder = ROOT / ".fuzz" / args.parser
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(chosen.samples()):
        (folder / f"sample-{number}").write_bytes(sample)
    flags = {
        "max_total_time": round(60 * args.minutes),
        "max_len": MAX_INPUT_BYTES,
        "rss_limit_mb": MAX_MEMORY_MB,
        "timeout": MAX_INPUT_S,
        "artifact_prefix": f"{folder}/",
    }
    words = [sys.argv[0], *(f"-{key}={value}" for key, value in flags.items()), str(folder)]
    atheris.Setup(words, lambda data: chosen.read(data) and None)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
