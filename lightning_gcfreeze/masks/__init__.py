"""Masks that are known before training: from a file, by hand, or by a wish such as "all but these rows".

    from lightning_gcfreeze.masks import everything, lowest, rows

    GradCovFreezeCallback(masks="masks.pt")                                             # what `save_masks` wrote
    GradCovFreezeCallback(masks={"embed.weight": torch.tensor([...]), "head.bias": True})
    GradCovFreezeCallback(masks=everything() - rows("embed.weight", [50_000, 50_001]))  # train two new tokens
    GradCovFreezeCallback(masks=lowest("order.pt", k=0.9, granularity="row"))           # what `save_order` wrote

True = held constant, everywhere.
"""

from lightning_gcfreeze.masks.files import load, load_order, save, save_gathered, save_order
from lightning_gcfreeze.masks.resolving import Masks, check, resolve
from lightning_gcfreeze.masks.selections import Selection, at_random, everything, layer, lowest, pattern, rows

__all__ = [
    "Masks",
    "Selection",
    "at_random",
    "check",
    "everything",
    "layer",
    "load",
    "load_order",
    "lowest",
    "pattern",
    "resolve",
    "rows",
    "save",
    "save_gathered",
    "save_order",
]
