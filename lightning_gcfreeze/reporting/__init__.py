"""What a person sees of a freeze: numbers and images for loggers, a report, plots."""

from lightning_gcfreeze.reporting.board import FROZEN_FRACTION, Board, scalars
from lightning_gcfreeze.reporting.groups import MAX_GROUPS, by_module, grouped, history_by_layer
from lightning_gcfreeze.reporting.plots import plot_frozen, plot_mask
from lightning_gcfreeze.reporting.report import Report, report

__all__ = [
    "FROZEN_FRACTION",
    "MAX_GROUPS",
    "Board",
    "Report",
    "by_module",
    "grouped",
    "history_by_layer",
    "plot_frozen",
    "plot_mask",
    "report",
    "scalars",
]
