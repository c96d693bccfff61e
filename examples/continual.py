"""Three tasks in a row that do not overwrite each other: `uv run python -m examples.continual`.

A network that knows upright digits learns them turned by one, two and three quarters: A, B and C, each with a head of
its own. Each task trains random elements of the body that no other task has, and all others are frozen. Beside it:
plain fine-tuning, and a LoRA adapter (PEFT) a task. `--tune` shows how the rates were found, with seeds of their own.
"""

import copy
import warnings
from collections.abc import Sequence
from itertools import combinations
from statistics import mean
from typing import NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import Tensor

from examples.turned import Data, Perceptron, accuracy, arguments, fit, restored, setup
from lightning_gcfreeze import GradCovFreezeCallback, delta
from lightning_gcfreeze.masks import at_random, layer

TURNS = {"A": 1, "B": 2, "C": 3}
PAIRS = [(task, after) for after in TURNS for task in TURNS if task <= after]
Networks = dict[str, Perceptron]  # by task
Masks = dict[str, dict[str, Tensor]]  # by task, then by parameter


class Method(NamedTuple):
    """How the three tasks are learnt."""

    name: str
    lr: float
    share: float = 1.0
    """Of the body's elements that a task trains."""
    rank: int = 0
    """Of the adapters."""


METHODS = (
    Method("fine-tuning", 0.0005),
    Method("masks, a third each", 0.008, share=1 / 3),
    Method("masks, 10 % each", 0.016, share=0.1),
    Method("masks, 3 % each", 0.032, share=0.03),
    Method("LoRA, rank 16", 0.004, rank=16),
    Method("LoRA, rank 4", 0.008, rank=4),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Learn by every method, and print a row for each and for each way to serve the tasks."""
    args = arguments(__doc__, argv)
    epochs = 1 if args.quick else 10
    setups = [(*setup(TURNS, seed, epochs), seed, epochs) for seed in args.seeds]
    print("| method | rate | served by |", *(f"{task} after {after} |" for task, after in PAIRS), "mean | kB a task |")
    for method in METHODS:
        for lr in [method.lr * factor for factor in args.factors]:
            runs = [measure(*each, method._replace(lr=lr), args.stage) for each in setups]
            for way in runs[0]:
                found = [mean(run[way][column] for run in runs) for column in range(len(PAIRS) + 1)]
                cells = [*(f"{v:.3f}" for v in (*found[:-1], mean(found[-4:-1]))), f"{found[-1] / 1000:.0f}"]
                print("|", " | ".join([method.name, f"{lr:g}", way, *cells]), "|", flush=True)


def measure(base: Perceptron, data: Data, seed: int, epochs: int, method: Method, stage: str) -> dict[str, list[float]]:
    """Learn the tasks; return by the way of serving the accuracies in the order of PAIRS, and the bytes of a task."""
    stages, live = learn(base, data, method, seed, epochs)
    ways = {"the last network": [stages[after] for _, after in PAIRS]}
    files = [save(base.state_dict())]
    if method.rank:
        ways = {"its adapter": [stages[task] for task, _ in PAIRS]}
        state = stages["C"].state_dict()
        files = [save({name: tensor for name, tensor in state.items() if f".{task}." in name}) for task in TURNS]
    elif live:
        parts = own_deltas(base, stages, live)
        own = {task: restored(base, delta.merge(base, *parts[: i + 1])) for i, task in enumerate(TURNS)}
        check(stages, live, own)
        alone = {task: restored(base, part) for task, part in zip(TURNS, parts, strict=True)}
        ways["base, deltas up to its own"] = [own[task] for task, _ in PAIRS]
        ways["base, its delta alone"] = [alone[task] for task, _ in PAIRS]
        files = [delta.pack(part) for part in parts]
    size = mean(len(file) for file in files)
    found = {
        way: [accuracy(network, data[t][stage], t) for network, (t, _) in zip(networks, PAIRS, strict=True)]
        for way, networks in ways.items()
    }
    return {way: [*accuracies, size] for way, accuracies in found.items()}


def learn(base: Perceptron, data: Data, method: Method, seed: int, epochs: int) -> tuple[Networks, Masks]:
    """Learn the tasks in a row; return the network after each, and which elements of the body each trained (True)."""
    network, stages, live = copy.deepcopy(base), Networks(), Masks()
    for i, task in enumerate(TURNS):
        network.lr, network.task, freeze = method.lr, task, None
        if method.rank:
            add_adapter(network, task, method.rank)
        elif method.share < 1:  # the same seed draws the same order: each task has its own part of it
            before, until = (at_random(method.share * n, seed=seed) for n in (i, i + 1))
            freeze = GradCovFreezeCallback(masks=layer("body") - (until - before))
        fit(network, data[task]["train"], epochs, seed, freeze)
        stages[task] = copy.deepcopy(network)
        if freeze:
            live[task] = {name: ~mask for name, mask in freeze.frozen.items() if name.startswith("body")}
    return stages, live


def add_adapter(network: Perceptron, task: str, rank: int) -> None:
    """Freeze the body, and let a new adapter train beside it, with the task's head."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["body.0", "body.2"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        peft.inject_adapter_in_model(config, network, adapter_name=task)
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(task)
    network.heads[task].requires_grad_(True)


def own_deltas(base: Perceptron, stages: Networks, live: Masks) -> list[dict[str, Tensor]]:
    """Return for each task the delta, from the base, of its elements and its head alone."""
    parts = []
    for task, network in stages.items():
        mine = copy.deepcopy(base)
        mine.heads[task].load_state_dict(network.heads[task].state_dict())
        for name, mask in live[task].items():
            mine.get_parameter(name).data[mask] = network.get_parameter(name).data[mask]
        parts.append(delta.diff(base, mine))
    return parts


def check(stages: Networks, live: Masks, own: Networks) -> None:
    """Raise unless tasks keep their bits while others move, and the deltas give the network after each to the bit."""
    bits = {t: {n: p.view(torch.int32) for n, p in network.named_parameters()} for t, network in stages.items()}
    for task, later in combinations(TURNS, 2):
        moved = {name: bits[task][name] != bits[later][name] for name in live[task]}
        assert any(mask.any() for mask in moved.values())
        assert not any((mask & live[task][name]).any() for name, mask in moved.items())
    for task, network in own.items():
        assert all(torch.equal(p.view(torch.int32), bits[task][name]) for name, p in network.named_parameters())


if __name__ == "__main__":
    main()
