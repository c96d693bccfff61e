"""Running statistics of the gradients: the covariance of their noise, in full or its diagonal, and their moments."""

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
