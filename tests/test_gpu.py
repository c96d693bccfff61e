"""The whole method on a GPU: bits that stay, an order that is the CPU's, runs that resume, memory that comes back.

Skipped where there is none. ``GCFREEZE_TEST_DEVICE=cpu`` runs what is not about CUDA alone on a CPU, to try the tests.
"""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, Growth, Settled, apply_delta, selection
from lightning_gcfreeze.freezing import blocks
from tests import cases
from tests.interruptions import DropoutByStep, Interrupted, SaveAndStop
from tests.oracles.freezing import PlainFreeze
from tests.processes.launch import ROOT
from tests.selection.scores import named_scores
from tests.witnesses import Witness

DEVICE = os.environ.get("GCFREEZE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="There is no GPU."),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # by the runs that the GPU's are compared with
]
of_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="It is about CUDA alone.")

optim = torch.optim
OPTIMIZERS = {
    "Adam": lambda p: optim.Adam(p, 0.01),
    "AdamW fused": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "SGD momentum": lambda p: optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.01),
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
T0 = 6


@pytest.fixture(autouse=True)
def _small_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute blocks of any size, and keep convolutions in float32."""
    monkeypatch.setattr(blocks, "MIN_SAVED_MACS", 1)
    monkeypatch.setattr(blocks, "MAX_BLOCK_FRACTION", 1.0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network() -> nn.Sequential:
    """A convolution and three linear layers, smooth, without random numbers: 2,465 parameters."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1),
    )  # fmt: skip


def trainer(**kwargs: Any) -> pl.Trainer:
    """As `cases.trainer`, on the device of these tests, a loss scaler there included."""
    if kwargs.get("precision") == "16-mixed":
        scaler = kwargs.pop("scaler", None) or torch.amp.GradScaler(DEVICE)
        kwargs["plugins"] = MixedPrecision(kwargs.pop("precision"), DEVICE, scaler=scaler)
    return cases.trainer(**({"accelerator": "gpu" if DEVICE == "cuda" else "cpu"} | kwargs))


def fit(optimizer: str, *callbacks: pl.Callback, net: nn.Module | None = None, **kwargs: Any) -> cases.Regression:
    module = cases.Regression(net or network(), OPTIMIZERS[optimizer])
    trainer(callbacks=list(callbacks), **({"max_epochs": 4} | kwargs)).fit(module, cases.loader())
    return module


def home(value: Any) -> Any:
    """The same on the CPU, all the way down."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: home(item) for key, item in value.items()}
    return type(value)(map(home, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
@pytest.mark.parametrize("hold", ["auto", "compact", "restore"])
def test_frozen_elements_are_constant_to_the_bit(hold, granularity, precision, optimizer):
    """Live ones move; in float32 they end where a mask and a copy by hand end."""
    callback = GradCovFreezeCallback(t0=T0, k=0.6, hold=hold, granularity=granularity)
    witness = Witness(callback)
    module = fit(optimizer, witness, callback, precision=precision)
    witness.check()
    if precision == "32-true":
        expected = fit(optimizer, PlainFreeze(T0, callback.frozen))
        assert_close(home(module.state_dict()), home(expected.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"k": 1.0}, {"k": 0.0}, {"k": 1.0, "granularity": "tensor"}, {"k": 1.0, "hold": "restore"}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_or_nothing_freezes(optimizer, precision, arguments):
    """An optimizer without elements steps, and so does a loss scaler without gradients."""
    callback = GradCovFreezeCallback(t0=T0, **arguments)
    witness = Witness(callback)
    fit(optimizer, witness, callback, precision=precision)
    moved = sum(int(m.sum()) for m in witness.moved.values())
    assert witness.steps > 8
    assert (moved == 0) == (arguments["k"] == 1.0)


@pytest.mark.parametrize(
    "order", ["variance", "progress", "momentum", "movement", "random", "snr", "displacement", "magnitude"]
)
def test_the_order_is_the_cpus(order):
    """The same run on either device freezes the same, but for elements whose scores are equal to rounding."""
    found = []
    for accelerator in ("cpu", "gpu" if DEVICE == "cuda" else "cpu"):
        callback = GradCovFreezeCallback(t0=T0, k=0.6, order=order, seed=3)
        fit("Adam", callback, accelerator=accelerator)
        found.append(torch.cat([mask.flatten().cpu() for mask in callback.frozen.values()]))
    assert int((found[0] != found[1]).sum()) <= 0.01 * len(found[0])
    assert order != "random" or torch.equal(*found)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradients": "replay"},
        {"gradients": "capture"},
        {"samples": 3},
        {"samples": "all"},
        {"samples": "all", "gain": 0.2},
        {"samples": "all", "every": 2},
        {"covariance": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("net", [network, cases.convnet])
def test_the_covariance_is_the_cpus(net, arguments):
    """C_t of the same steps, to float32's rounding after a few of them; with BatchNorm, dropout, and without."""
    if net is cases.convnet and arguments.get("gradients") == "capture":
        pytest.skip("capture alone takes batch statistics, where the two devices need not be compared")
    found = []
    for accelerator in ("cpu", "gpu" if DEVICE == "cuda" else "cpu"):
        callback = GradCovFreezeCallback(t0=T0, k=0.5, **arguments)
        module = net()
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # the devices draw other numbers
        fit("SGD momentum", callback, net=module, accelerator=accelerator, max_epochs=1)
        matrix = callback.covariance
        found.append(home(callback.variance | ({} if matrix is None else {"C": matrix})))
    for name, expected in found[0].items():
        assert float(expected.abs().max()) > 0
        assert_close(found[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@settings(max_examples=40, deadline=None)
@given(named_scores())
def test_selection_is_the_cpus_exactly(case):
    """Ties, both zeros, infinities, neighbours in the last bit, empty tensors."""
    scores, k = case
    there = {name: score.to(DEVICE) for name, score in scores.items()}
    cases.assert_identical(home(selection.lowest_k(there, k)), selection.lowest_k(scores, k))
    cases.assert_identical(home(selection.ranks(there)), selection.ranks(scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_selection_among_ten_million_scores_is_the_cpus(dtype):
    """A size at which digits are longer; a tenth of all scores in few values, subnormal numbers and infinities."""
    size = 10**7 if DEVICE == "cuda" else 10**5
    values = torch.randn(size, dtype=torch.float64) * 10
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40])
    values[::10] = special[torch.randint(len(special), (len(values[::10]),))].double()
    if dtype.is_floating_point:
        values[5], values[-1] = torch.inf, -torch.inf
    flat = values.to(dtype)
    scores = {
        "a": flat[: size // 2].view(-1, 1000), "b": flat[size // 2 : size // 2 + 1], "c": flat[size // 2 + 1 :],
    }  # fmt: skip
    there = {name: score.to(DEVICE) for name, score in scores.items()}
    for k in (1, size // 100, size // 2, size // 2 + 12345, size - 1, size):
        here = selection.lowest_k(scores, k)
        assert sum(int(mask.sum()) for mask in here.values()) == k
        cases.assert_identical(home(selection.lowest_k(there, k)), here)
    if dtype == torch.float32:
        cases.assert_identical(home(selection.ranks(there)), selection.ranks(scores))
    for granularity in ("row", "tensor"):
        pooled = selection.pooled(scores, granularity)
        on_device = {name: score.to(DEVICE) for name, score in pooled.items()}
        here = selection.lowest_k(pooled, size // 2, granularity)
        cases.assert_identical(home(selection.lowest_k(on_device, size // 2, granularity)), here)


RESUMED: dict[str, dict[str, Any]] = {
    "element": {"t0": 7, "k": 0.5},
    "row by progress": {"t0": 7, "k": 0.5, "granularity": "row", "order": "progress"},
    "restore": {"t0": 7, "k": 0.5, "hold": "restore", "samples": "all"},
    "stages": {"schedule": FreezeSchedule([(5, 0.3), (9, 0.5), (16, 0.7)])},
    "stages that thaw": {"schedule": FreezeSchedule([(5, 0.3), (9, 0.5), (16, 0.4)], monotone=False)},
    "growing": {"t0": 5, "k": Growth(every=3, max_loss_increase=0.5)},
    "thawing": {"t0": Settled(first=2, growth=1.3, overlap=0.9, improvement=0.01), "k": Growth(every=2)},
}


def resumable(callback: GradCovFreezeCallback, *more: pl.Callback, ckpt: Path | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.25), nn.Tanh(), nn.Linear(32, 1))
    module = cases.Regression(net, lambda p: optim.AdamW(p, 0.01, weight_decay=0.3, fused=True))
    run = trainer(callbacks=[callback, *more, DropoutByStep()], max_epochs=4, **kwargs)
    run.fit(module, cases.ResumableLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    state = run.optimizers[0].state_dict()["state"]
    return home({"weights": module.state_dict(), "optimizer": state, "callback": callback.state_dict()})


@pytest.mark.parametrize("after", [3, 7, 12])
@pytest.mark.parametrize("arguments", RESUMED.values(), ids=RESUMED.keys())
def test_resuming_equals_the_unbroken_run_to_the_bit(tmp_path, arguments, after):
    """Interrupted before, at and after decisions: observing, frozen, and on the way to another stage."""
    unbroken = resumable(GradCovFreezeCallback(**arguments))
    path = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        resumable(GradCovFreezeCallback(**arguments), SaveAndStop(path, after))
    resumed = resumable(GradCovFreezeCallback(**arguments), ckpt=path)
    cases.assert_identical(resumed, unbroken)


@pytest.mark.parametrize("arguments", [RESUMED["element"], RESUMED["stages"]], ids=["element", "stages"])
def test_masks_lie_on_one_device_after_a_resume_as_before(tmp_path, arguments):
    """What can be seen of a run does not depend on whether it was interrupted."""
    devices = []
    for ckpt in (None, tmp_path / "run.ckpt"):
        callback = GradCovFreezeCallback(**arguments)
        if ckpt:
            with pytest.raises(Interrupted):
                resumable(GradCovFreezeCallback(**arguments), SaveAndStop(ckpt, 12))
        resumable(callback, ckpt=ckpt)
        named = (callback.frozen, callback.variance, callback.ranks)
        devices.append([{t.device.type for t in each.values()} for each in named])
    assert devices[0] == devices[1]


class Looks(pl.Callback):
    """May look at gradients, so that they are left where they are."""

    def on_before_optimizer_step(self, *args: Any) -> None: ...


def scaled(optimizer: str, scaler: Any, *more: pl.Callback, **arguments: Any) -> Any:
    callback = GradCovFreezeCallback(**({"t0": T0, "k": 0.6} | arguments))
    witness = Witness(callback)
    module = fit(optimizer, witness, callback, *more, precision="16-mixed", scaler=scaler, max_epochs=8)
    witness.check()
    return callback, home(module.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_overflows_is_neither_counted_nor_observed(optimizer):
    """A loss scale that is too large at first costs steps, and nothing else."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40, growth_interval=1000)
    callback, _ = scaled(optimizer, scaler)
    skipped = 40 - int(torch.tensor(scaler.get_scale()).log2())
    state = callback.state_dict()
    assert skipped > 0
    assert (state["steps"], state["decision"]["observed"], state["decision"]["skipped"]) == (64 - skipped, T0, skipped)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_that_overflow_after_the_freeze_leave_no_trace(optimizer):
    """A loss scale that doubles after every step overflows again and again; all ways to hold go on alike."""
    found = []
    for more, arguments in [([], {"hold": "restore"}), ([], {"hold": "compact"}), ([Looks()], {"hold": "compact"})]:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, growth_interval=1)
        callback, weights = scaled(optimizer, scaler, *more, **arguments, skip_frozen_gradients=False)
        found.append((callback.state_dict()["steps"], scaler.get_scale(), weights))
    assert found[0][0] < 64
    for steps, scale, weights in found[1:]:
        assert (steps, scale) == found[0][:2]
        assert_close(weights, found[0][2], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("arguments", [{}, {"granularity": "row"}, {"hold": "restore"}], ids=str)
def test_deterministic_algorithms_suffice(arguments):
    """`Trainer(deterministic=True)` refuses operations that are not, and two runs have the same bits."""
    try:
        found = [
            home(fit("Adam", GradCovFreezeCallback(t0=T0, k=0.6, **arguments), deterministic=True).state_dict())
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    cases.assert_identical(*found)


def test_weights_in_channels_last_are_held():
    """Convolutions whose weights lie in memory in another order than their index."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 8, (1, 3), padding=(0, 1)), nn.Tanh(), nn.Conv2d(8, 6, (1, 3)),
        nn.Tanh(), nn.Flatten(), nn.Linear(18, 1),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    for hold, granularity in itertools.product(["compact", "restore"], ["element", "row"]):
        callback = GradCovFreezeCallback(t0=T0, k=0.6, hold=hold, granularity=granularity)
        witness = Witness(callback)
        ours = fit("Adam", witness, callback, net=copy.deepcopy(net))
        witness.check()
        expected = fit("Adam", PlainFreeze(T0, callback.frozen), net=copy.deepcopy(net))
        assert_close(home(ours.state_dict()), home(expected.state_dict()), rtol=1e-4, atol=1e-5)


def test_other_callbacks_and_loggers_take_what_is_published(tmp_path):
    """TensorBoard's histograms, a monitored fraction, a delta during and after the fit, ranks."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    pytest.importorskip("tensorboard")
    callback = GradCovFreezeCallback(t0=T0, k=0.6)
    start: dict[str, Tensor] = {}

    class During(pl.Callback):
        def on_train_batch_end(self, run: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if callback.phase == "frozen":
                start.setdefault("weights", copy.deepcopy(pl_module.state_dict()))
                callback.delta()
                assert callback.ranks

    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="gcfreeze/frozen_fraction", save_top_k=2, mode="max")
    stop = EarlyStopping("gcfreeze/frozen_fraction", mode="max", patience=2, check_on_train_epoch_end=True)
    module = fit(
        "Adam", callback, During(), checkpoint, stop, logger=TensorBoardLogger(tmp_path), enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    copied = cases.Regression(network())
    copied.load_state_dict(start["weights"])
    apply_delta(copied.to(DEVICE), callback.delta())
    cases.assert_identical(home(copied.state_dict()), home(module.state_dict()))
    assert checkpoint.best_model_path


@of_cuda
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW fused"])
@pytest.mark.parametrize(("granularity", "most"), [("element", 0.16), ("row", 0.11)])
def test_memory_comes_back_at_the_freeze(optimizer, granularity, most):
    """Of 12 million parameters a tenth keeps an optimizer state; gradients and statistics of the rest are let go of."""
    size, width = [], 2000
    net = nn.Sequential(nn.Linear(5, width), *(nn.Linear(width, width) for _ in range(3)), nn.Linear(width, 1))
    own = sum(p.numel() for p in net.parameters()) * 4
    callback = GradCovFreezeCallback(t0=T0, k=0.9, order="progress", granularity=granularity)

    class Memory(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            size.append(torch.cuda.memory_allocated())

    fit(optimizer, callback, Memory(), net=net, max_epochs=2)
    savings = callback.savings
    assert savings is not None
    assert savings.after.state + savings.index_bytes <= most * savings.before.state
    before, after = size[T0 - 1], size[-1]
    # Before: weights, gradients or none, Adam's two moments, two of the order. After: weights, masks and scores.
    assert before - after > 2.0 * own, (before / own, after / own)


@of_cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_what_is_compiled_is_held(granularity):
    """By inductor: frozen bits stay, live elements end where they end without a compiler."""
    torch.compiler.reset()
    callback = GradCovFreezeCallback(t0=T0, k=0.6, granularity=granularity)
    witness = Witness(callback)
    net = network()
    net.compile()
    module = fit("AdamW fused", witness, callback, net=net)
    witness.check()
    expected = fit("AdamW fused", PlainFreeze(T0, callback.frozen))
    assert_close(home(module.state_dict()), home(expected.state_dict()), rtol=1e-3, atol=1e-4)


@of_cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_replayed_as_a_cuda_graph_is_held():
    """Its gradients lie in memory that the next step writes to."""
    torch.compiler.reset()
    callback = GradCovFreezeCallback(t0=T0, k=0.6)
    witness = Witness(callback)
    net = network()
    net.compile(mode="reduce-overhead")
    module = fit("AdamW fused", witness, callback, net=net)
    witness.check()
    expected = fit("AdamW fused", PlainFreeze(T0, callback.frozen))
    assert_close(home(module.state_dict()), home(expected.state_dict()), rtol=1e-3, atol=1e-4)


RANKS_ON_A_GPU = """
import itertools
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.freezing import blocks
from tests import cases, test_gpu
from tests.oracles.freezing import PlainFreeze
from tests.witnesses import Witness
from tests.interruptions import Interrupted, SaveAndStop

warnings.simplefilter("ignore")
blocks.MIN_SAVED_MACS, blocks.MAX_BLOCK_FRACTION = 1, 1.0
folder, backend, nodes = Path(sys.argv[1]), os.environ["BACKEND"], int(os.environ["NODES"])


class Parts(cases.ResumableLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield [part[int(os.environ["NODE_RANK"]) :: nodes] for part in (x, y)]


class Sharded(cases.Regression):
    def configure_model(self):
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def fit(*callbacks, ckpt=None, ddp=None, make=cases.Regression, **kwargs):
    if ddp is not None:
        kwargs["strategy"] = DDPStrategy(process_group_backend=backend, **ddp)
    module = make(test_gpu.network(), test_gpu.OPTIMIZERS["AdamW fused"])
    trainer = test_gpu.trainer(
        callbacks=list(callbacks), num_nodes=nodes, use_distributed_sampler=False, max_epochs=3, **kwargs
    )
    trainer.fit(module, Parts(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer, test_gpu.home(module.state_dict())


def same(named):
    for name, tensor in named.items():
        first = tensor.to(test_gpu.DEVICE, torch.float32)
        mine = first.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, mine), name


def failed(what, error):
    print("FAILED", what, type(error).__name__, str(error).splitlines()[:3], flush=True)
    return 1


errors = 0
wrappers = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]
ways = [("element", "compact"), ("row", "compact"), ("tensor", "compact"), ("element", "restore"), ("row", "restore")]
for (granularity, hold), ddp in itertools.product(ways, wrappers):
    callback = GradCovFreezeCallback(t0=6, k=0.6, granularity=granularity, hold=hold)
    witness = Witness(callback)
    try:
        trainer, weights = fit(witness, callback, ddp=ddp)
        witness.check()
        same(weights)
        same(callback.frozen)
        _, expected = fit(PlainFreeze(6, callback.frozen), ddp=ddp)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    except Exception as error:
        errors += failed((granularity, hold, ddp), error)

for arguments, after in itertools.product([{"k": 0.6}, {"k": 0.6, "granularity": "row", "order": "progress"}], (3, 9)):
    path = folder / f"{after}.ckpt"
    try:
        _, unbroken = fit(GradCovFreezeCallback(6, **arguments), ddp={})
        try:
            fit(GradCovFreezeCallback(6, **arguments), SaveAndStop(path, after), ddp={})
        except Interrupted:
            pass
        _, resumed = fit(GradCovFreezeCallback(6, **arguments), ddp={}, ckpt=path)
        torch.testing.assert_close(resumed, unbroken, rtol=1e-4, atol=1e-5)
    except Exception as error:
        errors += failed(("resume", arguments, after), error)

if dist.get_world_size() == 1:
    for name in ("all_reduce_sum", "all_reduce_max", "all_reduce_min"):
        world = World(2, test_gpu.DEVICE)  # so that it does send
        assert getattr(world, name)(torch.arange(3)).tolist() == [0, 1, 2]
    assert World(2, test_gpu.DEVICE).broadcast_object(("a", 1)) == ("a", 1)
    if test_gpu.DEVICE == "cuda":
        try:
            callback = GradCovFreezeCallback(t0=6, k=0.6, granularity="row")
            fit(callback, make=Sharded, strategy=ModelParallelStrategy(1, 1))
            assert callback.phase == "frozen"
        except Exception as error:
            errors += failed("FSDP2", error)
if not errors:
    print(f"rank {dist.get_rank()} agrees", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def alone(folder: Path, backend: str, nodes: int, port: int) -> list[Any]:
    """Ranks of DDP as nodes of one process, so that several of them may have the same GPU."""
    script = folder / "ranks.py"
    script.write_text(RANKS_ON_A_GPU)
    processes = []
    for rank in range(nodes):
        env = os.environ | {
            "BACKEND": backend, "NODES": str(nodes), "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1", "GCFREEZE_TEST_DEVICE": DEVICE,
        }  # fmt: skip
        command = [sys.executable, str(script), str(folder)]
        with (folder / f"{rank}.out").open("w") as out:
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
    for process in processes:
        try:
            process.wait(200)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [(folder / f"{rank}.out").read_text() for rank in range(nodes)]


def _failures(out: str) -> str:
    """What a script said of them, or what it said last."""
    return "\n".join(line for line in out.splitlines() if line.startswith("FAILED")) or out[-4000:]


@of_cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="There is no NCCL.")
def test_one_rank_over_nccl(tmp_path):
    """DDP's wrapper, its buckets and the communication hook on CUDA's streams; resuming; FSDP2 on a mesh of one."""
    (out,) = alone(tmp_path, "nccl", 1, 29611)
    assert "rank 0 agrees" in out, _failures(out)


@pytest.mark.slow
def test_two_ranks_on_one_device_over_gloo(tmp_path):
    """What NCCL refuses to do on one GPU: two ranks that really differ, and end with the same bits."""
    for rank, out in enumerate(alone(tmp_path, "gloo", 2, 29613)):
        assert f"rank {rank} agrees" in out, _failures(out)
