"""``python -m lightning_gcfreeze.delta inspect FILE …`` says what the files have, and whether they are whole."""

import argparse
import sys

from lightning_gcfreeze.delta.errors import DeltaError
from lightning_gcfreeze.delta.inspecting import inspect


def _printable(text: str) -> str:
    """Return a text in which names that a file made up cannot steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lightning_gcfreeze.delta", description=__doc__)
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("files", nargs="+", metavar="FILE")
    failed = 0
    arguments = parser.parse_args()
    for file in arguments.files:
        try:
            print(f"{file}: {_printable(str(inspect(file)))}")
        except (DeltaError, OSError, ImportError) as error:
            print(f"{file}: {type(error).__name__}: {_printable(str(error))}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
