"""Running statistics of gradients: the covariance of their noise, full or diagonal, and their moments."""

from lightning_gcfreeze.estimators.base import Estimator, Step
from lightning_gcfreeze.estimators.diagonal import DiagonalCovariance
from lightning_gcfreeze.estimators.full import FullCovariance
from lightning_gcfreeze.estimators.moments import BatchMean, BatchSecondMoment, RecentBatchMean

__all__ = [
    "BatchMean",
    "BatchSecondMoment",
    "DiagonalCovariance",
    "Estimator",
    "FullCovariance",
    "RecentBatchMean",
    "Step",
]
