"""PEFT's adapters as rivals: LoRA, and SHiRA, which trains random elements of the weights."""

import math

from peft import LoraConfig, ShiraConfig, inject_adapter_in_model
from torch import nn

KINDS = ("lora", "shira")
FACTOR = 1.5
"""How far the number of trained parameters may be from that of the live elements."""


def add(model: nn.Module, kind: str, live: int, seed: int) -> bool:
    """Put adapters on the linear layers, of the rank that comes nearest to `live` parameters, and freeze all else.

    SHiRA's r means r (in + out) elements of a layer; layers that have fewer get none. LoRA's product counts twice,
    its usual α = 2 r.

    Returns:
        Whether there is a rank that comes near enough; if not, the model is as it was.
    """
    layers = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    best, rank, targets = math.inf, 0, []
    for r in range(1, live + 1):
        fitting = [
            name for name, (n_in, n_out) in layers.items() if kind == "lora" or r * (n_in + n_out) <= n_in * n_out
        ]
        count = sum(r * sum(layers[name]) for name in fitting)
        if not fitting or count > 2 * live:
            break
        if abs(math.log(count / live)) < best:
            best, rank, targets = abs(math.log(count / live)), r, fitting
    if best > math.log(FACTOR):
        return False
    config = (
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, bias="none")
        if kind == "lora"
        else ShiraConfig(r=rank, random_seed=seed, target_modules=targets)
    )
    inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        p.requires_grad_(kind in name)
    return True
