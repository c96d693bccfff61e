"""PEFT's adapters as rivals: LoRA, and SHiRA, which trains random elements of the weights."""

import math
from collections.abc import Collection

from peft import LoraConfig, ShiraConfig, inject_adapter_in_model
from torch import nn

KINDS = ("lora", "shira")
FACTOR = 1.5
"""How far the number of trained parameters may be from that of the live elements."""


def add(
    model: nn.Module, kind: str, live: int, seed: int, leave: Collection[str] = (), convolutions: bool = False
) -> bool:
    """Put adapters on the linear layers, of the rank that comes nearest to `live` parameters, and freeze all else.

    SHiRA's r means r (in + out) elements of a layer; layers that have fewer get none. LoRA's product counts twice,
    its usual α = 2 r. Layers that do not train get none.

    Args:
        model: changed in place.
        kind: of `KINDS`.
        live: parameters to train.
        seed: of SHiRA's elements.
        leave: names of layers that get none.
        convolutions: whether LoRA has those, too.

    Returns:
        Whether there is a rank that comes near enough; if not, the model is as it was.
    """
    layers = {
        name: (m.weight[0].numel(), m.weight.shape[0])
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d) if convolutions and kind == "lora" else nn.Linear)
        and m.weight.requires_grad
        and name not in leave
    }
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
