"""The front for `transformers.Trainer`; needs ``pip install lightning-gcfreeze[transformers]``."""

from lightning_gcfreeze.huggingface.callback import GradCovFreezeTrainerCallback

__all__ = ["GradCovFreezeTrainerCallback"]
