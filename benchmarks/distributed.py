"""What a step of two processes sends and costs after the freeze, and what it costs to select what freezes.

    uv run python -m benchmarks.distributed [--models M2] [--fractions 0.5 0.9 0.99] [--rounds 60] [--selection 1e6]
    uv run python -m benchmarks.distributed --models --selection --shards M2 [--fractions 0.5 0.9] [--rounds 60]

Traffic: two gloo processes on this machine, which talk over the loopback device, each pinned to a core and with one
thread. A step is forward, backward with DDP, the default Adam; each process has batches of its own, the masks are those
of `benchmarks.frozen`. A round takes one step of every way, in turn, with a barrier before each, and a step takes as
long as the slower process; figures are medians of the rounds' ratios to plain DDP. Bytes are what a process gives to be
averaged in a step.

Shards: the same with FSDP2, each layer with parameters sharded over the two processes. Bytes are those of the
optimizer's state on a process, with the indices of the live elements, and of the gradients that it has between the
backward pass and the step; of the process that has more. They are ratios to plain FSDP2.

Selection: half of p positive float32 scores in 20 tensors is marked, by one thread; the scores are squared normal
numbers, or all equal. The other ways find the k-th lowest score of the concatenation and mark what is not above it, so
that of equal scores they mark too many. Memory is the most that a process of its own takes beyond the scores; masks are
a quarter of these. Two processes have half of every tensor each.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.frozen import Decision, Plain, most_from_now
from benchmarks.observe import MODELS, Batch, Step, alternated, built, keep_freed_memory
from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.decision import scores_now
from lightning_gcfreeze.distributed import Shards, World, local
from lightning_gcfreeze.distributed.comm_hook import Hook, LiveAllReduce
from lightning_gcfreeze.freezing import Holder, HoldMode, HoldPlan, WeightUses

PROCESSES = 2


def backward(loss: Tensor, held: Holder | None) -> None:
    """Run the backward pass of a step, with what the callback does around it."""
    if held:
        held.begin_step()
        held.begin_backward(loss)
    loss.backward()
    if held:
        held.after_backward()
        held.before_step()


class Parallel(Plain):
    """A training step with DDP; with a `granularity` as the callback has it at t0 and after it, without the Trainer."""

    held: Holder | None = None

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        decision: Decision,
        granularity: Granularity | None = None,
        hook: Hook | None = None,
    ) -> None:
        self.granularity, self.hook, self.all_reduce = granularity, hook, LiveAllReduce(hook)
        super().__init__(model, batch, decision, fused=False)

    def adapted(self, model: nn.Module) -> nn.Module:
        self.ddp = DistributedDataParallel(model)
        if self.granularity:
            assert self.all_reduce.register(self.ddp) is None
        elif self.hook:
            self.ddp.register_comm_hook(None, self.hook)
        return model

    def __call__(self) -> None:
        self.all_reduce.begin_step()
        loss = F.cross_entropy(self.ddp(self.batch[0]), self.batch[1])
        backward(loss, self.held)
        self.optimizer.step()
        if self.held:
            self.held.after_step()
        self.optimizer.zero_grad()

    def freeze(self) -> None:
        if not self.granularity:
            return
        masks = self.decision.masks(self.granularity)
        Shards(world=World(PROCESSES)).check_agreement(masks)
        uses = WeightUses(self.model, self.parameters)
        uses.listen()
        self()
        uses.stop()
        plan = HoldPlan("compact", late=False, puts_back=False, skips_gradients=True)
        where = (self.parameters, masks, uses.uses_per_step)
        self.held = Holder(plan, self.optimizer, self.model, self.ddp, *where, resumed=False)
        self.all_reduce.leave_out({self.parameters[name]: mask for name, mask in masks.items()})

    def sent(self) -> int:
        """Bytes of one step."""
        if self.granularity:
            return self.all_reduce.bytes_sent or 0
        return self.trained * (2 if self.hook else 4)


class Sharded(Plain):
    """A training step with FSDP2; with `mode` as the callback has it at t0 and after it, without the Trainer."""

    held: Holder | None = None

    def __init__(self, model: nn.Module, batch: Batch, decision: Decision, mode: HoldMode | None = None) -> None:
        self.mode: HoldMode | None = mode
        super().__init__(model, batch, decision, fused=False)

    def adapted(self, model: nn.Module) -> nn.Module:
        for layer in model:  # type: ignore[attr-defined]
            if next(layer.parameters(), None) is not None:
                fully_shard(layer)
        fully_shard(model)
        return model

    def __call__(self) -> None:
        loss = F.cross_entropy(self.model(self.batch[0]), self.batch[1])
        backward(loss, self.held)
        self.gradients = sum(local(p.grad).nbytes for p in self.stepped() if p.grad is not None)
        self.optimizer.step()
        if self.held:
            self.held.after_step()
        self.optimizer.zero_grad()

    def stepped(self) -> list[Tensor]:
        """What has a gradient: the optimizer's parameters now, and the module's."""
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [*{id(p): p for p in (*own, *self.model.parameters())}.values()]

    def freeze(self) -> None:
        if self.mode is None:
            return
        shards = Shards(self.parameters, World(PROCESSES))
        masks = shards.parts(self.decision.masks())
        plan = HoldPlan(self.mode, late=False, puts_back=False, skips_gradients=True)
        where = (self.parameters, masks, {})
        n_frozen = shards.n_marked(masks)
        self.held = Holder(plan, self.optimizer, self.model, None, *where, resumed=False, n_frozen=n_frozen)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on this process, with indices."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        return sum(local(v).nbytes for v in state) + (self.held.savings.index_bytes if self.held else 0)


def sharded(name: str, fractions: Sequence[float], rounds: int) -> dict[str, dict[str, float]]:
    """In each of the processes: ratios to steps and bytes of plain FSDP2, by way; "plain" is in ms and bytes."""
    torch.manual_seed(0)
    _, make, data = MODELS[name]
    model = make().train()
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    made = {"plain": partial(Sharded, decision=Decision(scores, 0.0))}
    modes: tuple[HoldMode, ...] = ("compact", "restore")
    made |= {
        f"{mode}, f = {f:g}": partial(Sharded, decision=Decision(scores, f), mode=mode)
        for mode in modes
        for f in fractions
    }
    torch.manual_seed(1 + dist.get_rank())
    steps: dict[str, Sharded] = built(made, model, data(), name)
    times = in_turn(steps, rounds)
    world = World(PROCESSES)
    most = {w: world.all_reduce_max(torch.tensor([s.state_bytes(), s.gradients])).tolist() for w, s in steps.items()}
    ratios, (state, gradients) = (times / times[0]).quantile(0.5, dim=1).tolist(), most["plain"]
    found = {
        way: {"step": r, "state": most[way][0] / state, "gradients": most[way][1] / gradients}
        for r, way in zip(ratios, steps, strict=True)
    }
    return found | {"plain": {"step": 1000 * float(times[0].quantile(0.5)), "state": state, "gradients": gradients}}


def in_turn(steps: Mapping[str, Callable[[], None]], rounds: int) -> Tensor:
    """Return how long each way takes in each round, (ways, rounds), in the slower process."""
    times = torch.empty(len(steps), rounds, dtype=torch.float64)
    for i in range(rounds):
        for of_way, step in zip(times, steps.values(), strict=True):
            dist.barrier()
            start = time.perf_counter()
            step()
            of_way[i] = time.perf_counter() - start
    return World(PROCESSES).all_reduce_max(times)


def ways(scores: Named, fractions: Sequence[float]) -> dict[str, Callable[..., Parallel]]:
    """For each way what makes a step of a model and a batch; of ours with the fp16 hook at f = 0.9 alone."""
    plain, most = partial(Parallel, decision=Decision(scores, 0.0)), Decision(scores, 0.9)
    before = partial(plain, granularity="element")
    ours = {
        f"{granularity}, f = {f:g}": partial(Parallel, decision=Decision(scores, f), granularity=granularity)
        for granularity in ("element", "row")
        for f in fractions
    }
    both = partial(Parallel, decision=most, granularity="element", hook=fp16_compress_hook)
    return {
        "plain": plain,
        "fp16_compress_hook": partial(plain, hook=fp16_compress_hook),
        "nothing frozen": before,
        **ours,
        "element, f = 0.9, fp16_compress_hook": both,
    }


def traffic(name: str, fractions: Sequence[float], rounds: int) -> dict[str, dict[str, float]]:
    """In each of the processes: ratios of steps and bytes to those of plain DDP, by way; "plain" is in ms and bytes."""
    torch.manual_seed(0)
    _, make, data = MODELS[name]
    step = Step(make().train(), data(), count=None)
    for _ in range(24):
        step.batch = data()
        step()
    scores = scores_now(step.statistics, orderings.variance, step.parameters, 0, "element")
    torch.manual_seed(1 + dist.get_rank())
    steps = built(ways(scores, fractions), step.model, data(), name)
    times = in_turn(steps, rounds)
    ratios, one = (times / times[0]).quantile(0.5, dim=1).tolist(), steps["plain"].sent()
    found = {w: {"step": r, "bytes": s.sent() / one} for r, (w, s) in zip(ratios, steps.items(), strict=True)}
    return found | {"plain": {"step": 1000 * float(times[0].quantile(0.5)), "bytes": one}}


def scores_of(p: int, equal: bool) -> dict[str, Tensor]:
    """20 tensors, the largest of which is 400 times the smallest, all in one piece of memory."""
    flat = torch.ones(p) if equal else torch.empty(p).normal_(generator=torch.Generator().manual_seed(0)).square_()
    sizes = [p * i * i // 2870 for i in range(1, 20)]
    return {str(i): score for i, score in enumerate(flat.split([*sizes, p - sum(sizes)]))}


def up_to(kth: Callable[[Tensor, int], Any], scores: Named, k: int) -> dict[str, Tensor]:
    """Mark what is not above the k-th lowest score."""
    threshold = float(kth(torch.cat(list(scores.values())), k))
    return {name: score <= threshold for name, score in scores.items()}


def partitioned(flat: Tensor, k: int) -> Tensor:
    flat.numpy().partition(k - 1)
    return flat[k - 1]


SELECT: dict[str, Callable[[Named, int], dict[str, Tensor]]] = {
    "plain": partial(up_to, lambda flat, k: flat.sort().values[k - 1]),
    "selection.lowest": selection.lowest_k,
    "torch.kthvalue": partial(up_to, lambda flat, k: flat.kthvalue(k).values),
    "numpy.partition": partial(up_to, partitioned),
}
TWO = "selection.lowest_k, two processes"


class Counting(World):
    """Counts the bytes that a process gives to be added up."""

    sent = 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        self.sent += tensor.nbytes
        return super().all_reduce_sum(tensor)


def select(p: int, equal: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Ratios of the time to that of torch.sort, and of the memory to the scores', by way; "plain" is in ms."""
    scores = scores_of(p, equal)
    rounds = max(1, min(rounds, 3 * 10**8 // p))
    times = alternated({way: partial(marked, scores, p // 2) for way, marked in SELECT.items()}, rounds)  # type: ignore[misc]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.frozen"])
    found = {}
    for way, ratio in times.items():
        with ProcessPoolExecutor(1, context) as process:
            found[way] = {"time": ratio, "memory": process.submit(peak, way, p, equal).result()}
    ms, sent = in_processes(select_together, p, equal, rounds)
    return found | {TWO: {"time": ms / times["plain"], "bytes": sent}}


def peak(way: str, p: int, equal: bool) -> float:
    """How much memory a selection takes at most, as a ratio to the scores'. Needs Linux and glibc."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back
    SELECT[way](scores_of(10**5, equal), 5 * 10**4)  # from here on all code has been loaded
    scores = scores_of(p, equal)
    before = most_from_now()
    SELECT[way](scores, p // 2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before) * 2**20 / (4 * p)


def select_together(p: int, equal: bool, rounds: int) -> tuple[float, int]:
    """In each of the processes: the median in ms, and the bytes that it sends."""
    mesh, times = init_device_mesh("cpu", (PROCESSES,)), []
    parameters = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in scores_of(p, equal).items()}
    scores = {name: local(p) for name, p in parameters.items()}
    for _ in range(rounds):
        world = Counting(PROCESSES)
        shards = Shards(parameters, world)
        dist.barrier()
        start = time.perf_counter()
        masks = selection.lowest_k(scores, p // 2, shards=shards)
        times.append(time.perf_counter() - start)
        assert world.all_reduce_sum(torch.tensor(sum(int(mask.sum()) for mask in masks.values()))) == p // 2
    slower = World(PROCESSES).all_reduce_max(torch.tensor(times, dtype=torch.float64))
    return 1000 * float(slower.quantile(0.5)), world.sent - 8


def in_processes(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns on the first of two gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = mp.get_context("spawn").SimpleQueue()
        mp.spawn(in_process, (folder, result, work, args), nprocs=PROCESSES)
        return result.get()


def in_process(rank: int, folder: str, result: Any, work: Callable[..., Any], args: Sequence[Any]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    prepare()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = work(*args)
    if rank == 0:
        result.put(found)
    dist.destroy_process_group()


def prepare() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # see `benchmarks.frozen`


def table(title: str, results: Mapping[str, Mapping[str, Mapping[str, float]]], what: str, plain: str) -> str:
    """A column for each model or number of scores, a row for each way."""
    rows = [["way", *results], ["---"] * (1 + len(results))]
    for way, of_first in next(iter(results.values())).items():
        if what in of_first:
            figures = [of_way[way][what] for of_way in results.values()]
            cells = (f"{x:.3f}" if x < 10 else f"{x:,.1f}" if x < 10**4 else f"{x:,.0f}" for x in figures)
            rows.append([plain if way == "plain" else way, *cells])
    return "\n".join([f"\n{title}\n", *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["M2"], choices=MODELS, help="(M2)")
    parser.add_argument("--shards", nargs="*", default=[], choices=MODELS, help="models under FSDP2 (none)")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.5, 0.9, 0.99], help="of frozen elements")
    parser.add_argument("--rounds", type=int, default=60, help="steps of every way; selections at most (%(default)s)")
    parser.add_argument("--selection", nargs="*", type=float, default=[1e6, 1e7, 1e8], help="numbers of scores")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    prepare()
    print(f"torch {torch.__version__}, {platform.machine()}, a thread each, {args.rounds} rounds")
    steps = {name: in_processes(traffic, name, args.fractions, args.rounds) for name in args.models}
    if steps:
        print(table("Step, as a ratio to plain DDP", steps, "step", "plain DDP, ms"))
        print(table("Bytes sent in a step, as a ratio to plain DDP", steps, "bytes", "plain DDP, bytes"))
    shards = {name: in_processes(sharded, name, args.fractions, args.rounds) for name in args.shards}
    if shards:
        print(table("Step, as a ratio to plain FSDP2", shards, "step", "plain FSDP2, ms"))
        print(table("State with indices, as a ratio to plain FSDP2", shards, "state", "plain FSDP2, bytes"))
        print(table("Gradients, as a ratio to plain FSDP2", shards, "gradients", "plain FSDP2, bytes"))
    cases = {f"p = {p:g}{', all equal' * equal}": (int(p), equal) for p in args.selection for equal in (False, True)}
    selections = {case: select(p, equal, args.rounds) for case, (p, equal) in cases.items()}
    if selections:
        print(table("Selecting p/2, as a ratio to torch.sort", selections, "time", "torch.sort, ms"))
        print(table("Peak of the memory beyond the scores, as a ratio to them", selections, "memory", "torch.sort"))
        print(table("Bytes that a process sends", selections, "bytes", ""))
    if args.json:
        args.json.write_text(
            json.dumps({"steps": steps, "shards": shards, "selections": selections}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
