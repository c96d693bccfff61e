"""Fine-tune one encoder for a dozen tenants, and ship each as a delta of a shared mask.

    python -m examples.tenants
    python -m examples.tenants --quick

Each tenant tells the docstrings of a package's classes, functions and methods and its error messages apart. Beside the
mask, which leaves 1 % of the encoder live, the same tenants are trained by the head alone, in full, by LoRA and by
SHiRA. Then a server answers for all tenants from one copy of the encoder: under load, while one of them is updated,
and after it was killed. Leaves TENANT.safetensors and mask.pt in DIR.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from examples.tenants.data import TENANTS
from examples.tenants.processes import compute
from examples.tenants.serving import measure
from examples.tenants.training import METHODS, RATES, STEPS, Fit, Result, prepare, run_all, write_mask

QUICK = (3, 4)  # tenants, steps
LOAD, QUICK_LOAD = (1000, 10_000), (60, 200)  # requests, swaps


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write and print as `argv` says, by default the command line."""
    args = _parser().parse_args(argv)
    count, steps = QUICK if args.quick else (len(TENANTS), STEPS)
    prepare()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    tenants = list(TENANTS)[: args.tenants or count]
    console.print(table(train(tenants, steps, args.jobs, args.out, console)))
    measure(args.out, tenants, *(QUICK_LOAD if args.quick else LOAD), console)
    console.print(f"To ask them: uv run python -m examples.tenants.server --folder {args.out}", soft_wrap=True)


def train(tenants: Sequence[str], steps: int, jobs: int, out: Path, console: Console) -> list[Result]:
    """Train each tenant by each method; write the mask, and the deltas of "ours"."""
    write_mask(out / "mask.pt")
    fits = [
        [
            Fit(tenant, method, RATES[method], out / "mask.pt", out / f"{tenant}.safetensors", steps)
            for method in METHODS
        ]
        for tenant in tenants
    ]
    results = list[Result]()
    for found in compute(run_all, fits, jobs):
        results += found
        console.print(f"{found[0].tenant} is trained, {len(results) // len(METHODS)} of {len(tenants)}.")
    return results


def table(results: Sequence[Result]) -> Table:
    """Test accuracies, a row for each tenant and a column for each method; means, and what is to be shipped."""
    shown = Table("test accuracy", *METHODS)
    for column in shown.columns[1:]:
        column.justify = "right"
    found = {(r.tenant, r.method): r for r in results}
    tenants = [tenant for tenant in TENANTS if (tenant, "ours") in found]
    for tenant in tenants:
        shown.add_row(
            tenant, *(f"{found[tenant, method].accuracy:.3f}" for method in METHODS), end_section=tenant == tenants[-1]
        )
    shown.add_row("mean", *(f"{mean(found[t, method].accuracy for t in tenants):.3f}" for method in METHODS))
    shown.add_row("trained, encoder", *(f"{found[tenants[0], method].live:,}" for method in METHODS))
    shown.add_row("kB to ship", *(f"{found[tenants[0], method].shipped / 1000:,.0f}" for method in METHODS))
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tenants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="{} tenants and {} steps: does it run?".format(*QUICK))
    add(
        "--tenants", type=int, choices=range(2, len(TENANTS) + 1), metavar="N", help=f"the first N (all {len(TENANTS)})"
    )
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes; no result depends on it (%(default)s)")
    add("--out", type=Path, default=Path("runs/tenants"), metavar="DIR", help="folder of results (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
