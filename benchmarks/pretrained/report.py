"""Tables of what was found, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pretrained.tasks import TASKS_BY_NAME
from benchmarks.quality.summary import table

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By "method@fraction"; a run has the entries of `run.run`."""

TITLES = {
    "full": "all train",
    "recommended": "the preset, in place",
    "from_the_base": "its masks, from the base",
    "probed": "masks of a probe",
    "random": "random elements",
    "random_rows": "random rows",
    "last_layers": "last layers",
    "lora": "LoRA",
    "shira": "SHiRA",
}


def of_task(name: str, before: Mapping[str, float], runs: Runs) -> str:
    """One task: every method with what it reaches, forgets, ships, and takes."""
    task = TASKS_BY_NAME[name]
    plain = runs["full@0.0"]
    rows = [["before", "", "", _shown(before["test"]), "", _shown(before["kept"]), "", "", ""]]
    for key, of in runs.items():
        method, fraction = key.split("@")
        if "left_out" in of[0]:
            rows.append([TITLES[method], fraction, "", of[0]["left_out"], "", "", "", "", ""])
            continue
        cells = [TITLES[method], fraction if float(fraction) else "", f"{of[0]['lr']:.2g}", _shown(_mean(of, "test"))]
        cells += [f"{gain(before, plain, of):.2f}", _shown(_mean(of, "kept")), f"{of[0]['shipped'] / 1e6:.2f}"]
        cells += [f"{_mean(of, 'seconds') / _mean(plain, 'seconds'):.2f}", f"{_mean(of, 'peak') / 2**20:.0f}"]
        rows.append(cells)
    head = ["method", "frozen", "rate", task.quality_name, "gain", task.kept_name, "MB to ship", "seconds", "peak, MiB"]
    return f"{task.title}\n\n{table(head, rows)}\n"


def headline(before: Mapping[str, Mapping[str, float]], found: Mapping[str, Runs]) -> str:
    """All tasks: the share of the unfrozen run's gain, and what is left of the source's."""
    rows = []
    for key in next(iter(found.values())):
        method, fraction = key.split("@")
        cells = [TITLES[method], fraction if float(fraction) else ""]
        for name, runs in found.items():
            if "left_out" in runs[key][0]:
                cells.append("-")
                continue
            share = gain(before[name], runs["full@0.0"], runs[key])
            cells.append(f"{share:.2f} ({_shown(_mean(runs[key], 'kept'))})")
        rows.append(cells)
    return f"Share of the gain (the source)\n\n{table(['method', 'frozen', *found], rows)}\n"


def gain(before: Mapping[str, float], plain: Sequence[Mapping[str, Any]], of: Sequence[Mapping[str, Any]]) -> float:
    """What a method improves the test quality by, as a share of what training all parameters does."""
    return (_mean(of, "test") - before["test"]) / (_mean(plain, "test") - before["test"])


def _mean(of: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(run[key] for run in of) / len(of))


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
