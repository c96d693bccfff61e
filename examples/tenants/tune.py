"""Choose the learning rate of every method, by tenants that are not reported.

    python -m examples.tenants.tune
    python -m examples.tenants.tune --methods ours,lora

Prints the mean accuracy at each rate; the best ones are `RATES` of `examples.tenants.training`.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from examples.tenants.data import TUNING
from examples.tenants.processes import compute
from examples.tenants.training import METHODS, Fit, Result, prepare, run, write_mask

TRIED = {
    "head": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "full": (1e-4, 2e-4, 4e-4, 8e-4),
    "lora": (2.5e-3, 5e-3, 1e-2),
    "shira": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "ours": (5e-3, 1e-2, 2e-2, 4e-2),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print as `argv` says, by default the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tenants.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="%(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    prepare()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        mask = Path(folder) / "mask.pt"
        write_mask(mask)
        methods = args.methods.split(",")
        fits = [Fit(tenant, method, lr, mask) for method in methods for lr in TRIED[method] for tenant in TUNING]
        results = list[Result]()
        for result in compute(run, fits, args.jobs):
            results.append(result)
            console.print(f"{len(results)} of {len(fits)}: {result.tenant}, {result.method}, {result.lr:g}")
    console.print(table(results))


def table(results: Sequence[Result]) -> Table:
    """A row for each method and rate; a column for each tenant, and their mean."""
    shown = Table("method", "rate", *TUNING, "mean")
    found = {(r.method, r.lr, r.tenant): r.accuracy for r in results}
    for method, lr in dict.fromkeys((method, lr) for method, lr, _ in sorted(found)):
        row = [found[method, lr, tenant] for tenant in TUNING]
        shown.add_row(method, f"{lr:g}", *(f"{one:.3f}" for one in row), f"{mean(row):.3f}")
    return shown


if __name__ == "__main__":
    main()
