"""The table as a page of the docs."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.optimizers.table import LEFT_OUT, LIBRARIES, TABLE

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"

_INTRO = """\
# Which optimizers

<!-- Written by `uv run python -m tests.optimizers`; do not edit. -->

The callback works with the optimizer that your module already has. What it does depends on the optimizer's class:

- **compact**: the optimizer gets the live elements alone. That saves its memory and its work.
- **restore**: the optimizer goes on as before, the gradients of frozen elements are zero, and their values are put back
  after each step. That saves nothing in the optimizer.
- **refused**: training stops before the first step with a message that says why. Such an optimizer has a second set of
  weights, takes gradients at other weights than those of the model, or hides its steps.

The tests train a small network with every optimizer of this table and freeze half of its elements after six steps. They
compare each step with a callback that freezes the plain way: it zeroes gradients and writes values back. Frozen
elements must keep their bits in every forward pass and after every step, and live elements must be equal to rounding.
For a refused optimizer they check that no weight has moved.

The outcomes are those of `hold="auto"`, on one device, with the options in `tests/optimizers/table.py`. Other options
can make an optimizer mix elements: gradient centralization, cautious updates, clipping by a norm of its own. So an
optimizer whose class is not in `ELEMENTWISE` is restored until you add it, with
`lightning_gcfreeze.freezing.ELEMENTWISE.add(Lion)`. An optimizer that is not in this table is restored, too, unless it
shows the signs of those that are refused.
"""


def page() -> str:
    """The whole page, in Markdown."""
    versions = ", ".join(f"{package} {version(package)}" for package in LIBRARIES.values())
    counts = Counter(case.outcome for case in TABLE.values())
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("compact", "restore", "refused"))
    lines = [_INTRO, f"{len(TABLE)} optimizers: {told}. Versions: {versions}.", ""]
    lines += ["| library | optimizer | outcome | reason |", "| --- | --- | --- | --- |"]
    for path, case in TABLE.items():
        library, _, name = path.rpartition(".")
        lines.append(f"| {LIBRARIES[library]} | {name} | {case.outcome} | {case.reason} |")
    lines += ["", "## Not in the table", "", "Lightning's automatic optimization cannot train with these:", ""]
    lines += ["| library | optimizer | reason |", "| --- | --- | --- |"]
    for path, reason in LEFT_OUT.items():
        library, _, name = path.rpartition(".")
        lines.append(f"| {LIBRARIES[library]} | {name} | {reason} |")
    return "\n".join([*lines, ""])
