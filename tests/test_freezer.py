"""`Freezer` in a plain loop against the callback in a Trainer: the same bits; and in loops that people write."""

import copy
import io
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lightning_gcfreeze import Freezer, FreezeSchedule, GradCovFreezeCallback, Growth, Settled, apply_delta
from tests import cases
from tests.oracles.learning_rate import multiply_by_hand

STEPS = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "variance": {"t0": 6, "k": 0.5},
    "all samples at every second step": {"t0": 6, "k": 0.5, "samples": "all", "every": 2},
    "full covariance": {"t0": 6, "k": 9, "covariance": "full"},
    "replayed": {"t0": 6, "k": 0.5, "gradients": "replay"},
    "progress": {"t0": 6, "k": 0.9, "order": "progress"},
    "momentum": {"t0": 6, "k": 0.9, "order": "momentum"},
    "rows, restored": {"t0": 6, "k": 0.5, "granularity": "row", "hold": "restore"},
    "tensors, compact": {"t0": 6, "k": 0.9, "granularity": "tensor", "hold": "compact"},
    "random": {"t0": 1, "k": 1.0, "order": "random", "seed": 3},
    "stages": {"schedule": FreezeSchedule([(4, 0.3), (8, 0.6)])},
    "stages that thaw": {"schedule": FreezeSchedule([(4, 0.6), (8, 0.3), (12, 0.5)], monotone=False)},
    "from the data": {
        "t0": Settled(max_t0=7, first=2),
        "k": Growth(every=2, patience=2, stages=2, max_loss_increase=0.5),
        "order": "progress",
    },
}


def batches() -> list[list[Tensor]]:
    return [list(batch) for batch in cases.loader(batch_size=4, samples=4 * STEPS)]


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.3)


class SeedByBatch(pl.Callback):
    """Dropout draws the same numbers in both loops."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 + batch_idx)


class ReadsGradients(pl.Callback):
    """With it the callback leaves gradients where they are, as `Freezer` does unless it is told otherwise."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        pass


def by_the_callback(options: dict[str, Any], accumulate: int, clip: float | None, skips: bool) -> Any:
    module = cases.Regression(cases.convnet(), adamw)
    callback = GradCovFreezeCallback(**options)
    trainer = cases.trainer(
        callbacks=[SeedByBatch(), callback, *([] if skips else [ReadsGradients()])],
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    torch.manual_seed(0)
    trainer.fit(module, cases.loader(batch_size=4, samples=4 * STEPS))
    return results(module.network, trainer.optimizers[0], callback)


def results(network: nn.Module, optimizer: torch.optim.Optimizer, front: Any) -> dict[str, Any]:
    prefix = "" if isinstance(front, Freezer) else "network."
    of_front = {"frozen": front.frozen, "variance": front.variance}
    return {
        "weights": network.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "fraction": front.frozen_fraction,
        **{what: {name.removeprefix(prefix): t for name, t in named.items()} for what, named in of_front.items()},
    }


class Loop:
    """What a user writes, with the lines of the freezer."""

    def __init__(self, options: dict[str, Any], accumulate: int = 1, clip: float | None = None, **more: Any) -> None:
        torch.manual_seed(0)
        self.network = cases.convnet()
        torch.manual_seed(0)
        self.optimizer = adamw(self.network.parameters())
        self.accumulate, self.clip = accumulate, clip
        self.freezer = Freezer(
            self.network, self.optimizer, loss=loss_of, accumulate=accumulate, planned_steps=STEPS, **options, **more
        )

    def train(self, start: int = 0, stop: int = STEPS) -> None:
        for number, batch in enumerate(batches()[start:stop], start=start):
            torch.manual_seed(1000 + number)
            self.freezer.begin_batch(batch)
            loss = loss_of(self.network, batch) / self.accumulate
            self.freezer.backward(loss)
            if (number + 1) % self.accumulate:
                continue
            if self.clip:  # as a Trainer does
                stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(stepped, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def results(self) -> dict[str, Any]:
        self.freezer.close()
        return results(self.network, self.optimizer, self.freezer)


@pytest.mark.parametrize("skips", [False, True], ids=["gradients stay", "gradients skipped"])
@pytest.mark.parametrize("name", OPTIONS)
def test_freezer_in_a_plain_loop_gives_the_callbacks_bits(name, skips):
    """Weights, buffers, optimizer state, masks and variances; dropout and BatchNorm run, some elements freeze."""
    expected = by_the_callback(OPTIONS[name], 1, None, skips)
    loop = Loop(OPTIONS[name], skip_frozen_gradients=skips)
    loop.train()
    cases.assert_identical(loop.results(), expected)
    assert loop.freezer.frozen_fraction > 0


def given_masks(prefix: str = "") -> dict[str, Tensor]:
    """Masks of half the elements of each parameter but the last, which has none."""
    generator = torch.Generator().manual_seed(8)
    drawn = {
        f"{prefix}{n}": torch.rand(p.shape, generator=generator) < 0.5 for n, p in cases.convnet().named_parameters()
    }
    drawn.popitem()
    return drawn


@pytest.mark.parametrize("skips", [False, True], ids=["gradients stay", "gradients skipped"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.5)])
def test_freezer_with_masks_gives_the_callbacks_bits(skips, accumulate, clip):
    """Frozen from the first step on; no loss has to be given, since nothing is observed."""
    loop = Loop({"masks": given_masks()}, accumulate, clip, skip_frozen_gradients=skips)
    start = {name: p.detach().clone() for name, p in loop.network.named_parameters()}
    assert loop.freezer.phase == "observing"
    loop.train()
    expected = by_the_callback({"masks": given_masks("network.")}, accumulate, clip, skips)
    cases.assert_identical(loop.results(), expected)
    for name, mask in given_masks().items():
        moved = loop.network.get_parameter(name) != start[name]
        assert not moved[mask].any()
        assert moved[~mask].all() or name == "1.bias"  # whose gradient is rounding: BatchNorm takes the mean off


def test_freezer_with_masks_is_resumed_and_saves_them(tmp_path):
    """By its own state and the optimizer's; without a function for the loss."""
    loop = Loop({"masks": given_masks()})
    loop.train()
    loop.freezer.save_masks(tmp_path / "masks.pt")
    broken = Loop({"masks": tmp_path / "masks.pt"})
    broken.train(0, 5)
    saved = io.BytesIO()
    torch.save(
        {"f": broken.freezer.state_dict(), "m": broken.network.state_dict(), "o": broken.optimizer.state_dict()}, saved
    )
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = Loop({"masks": given_masks()})
    resumed.network.load_state_dict(state["m"])
    resumed.optimizer.load_state_dict(state["o"])
    resumed.freezer.load_state_dict(state["f"])
    resumed.train(5)
    cases.assert_identical(resumed.results(), loop.results())
    network = cases.convnet()
    optimizer = adamw(network.parameters())
    freezer = Freezer(network, optimizer, masks=tmp_path / "masks.pt")
    before = network[1].weight.detach().clone()
    for batch in batches()[:3]:
        freezer.begin_batch(batch)
        freezer.backward(loss_of(network, batch))
        optimizer.step()
        optimizer.zero_grad()
    freezer.close()
    mask = given_masks()["1.weight"]
    assert torch.equal(network[1].weight[mask], before[mask])
    assert not torch.equal(network[1].weight, before)


def test_masks_work_with_a_loss_scaler_and_with_fabric():
    """Steps that overflow are left out; a wrapped module's names are those of the module inside."""
    from lightning.fabric import Fabric

    mask = given_masks()["1.weight"]
    for uses_fabric in (False, True):
        network = cases.convnet()
        optimizer = adamw(network.parameters())
        before = network[1].weight.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=100)
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        model, stepped = fabric.setup(network, optimizer) if uses_fabric else (network, optimizer)
        freezer = Freezer(model, stepped, masks=given_masks(), scaler=None if uses_fabric else scaler)
        for batch in batches():
            freezer.begin_batch(batch)
            loss = loss_of(model, batch)
            if uses_fabric:
                freezer.backward(loss, backward=fabric.backward)
                stepped.step()
            else:
                freezer.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
            stepped.zero_grad()
        assert freezer.steps == STEPS if uses_fabric else 0 < freezer.steps < STEPS
        freezer.close()
        assert torch.equal(network[1].weight[mask], before[mask])
        assert (network[1].weight != before)[~mask].all()


@pytest.mark.parametrize("skips", [False, True], ids=["gradients stay", "gradients skipped"])
@pytest.mark.parametrize("name", ["variance", "progress", "rows, restored", "tensors, compact"])
def test_freezer_with_accumulation_and_clipping_gives_the_callbacks_bits(name, skips):
    """Two micro-batches a step; the norm of live gradients is clipped."""
    options = OPTIONS[name] | {"t0": 3}
    loop = Loop(options, 2, 0.5, skip_frozen_gradients=skips)
    loop.train()
    cases.assert_identical(loop.results(), by_the_callback(options, 2, 0.5, skips))
    assert loop.freezer.steps == STEPS // 2


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 7, 8, 12, 15])
@pytest.mark.parametrize("name", ["variance", "progress", "momentum", "stages that thaw", "from the data"])
def test_freezer_resumed_at_any_step_gives_the_bits_of_the_unbroken_loop(name, stop):
    """Saved with torch.save, loaded with weights_only, into a new model, optimizer and freezer."""
    unbroken, first, second = Loop(OPTIONS[name]), Loop(OPTIONS[name]), Loop(OPTIONS[name])
    unbroken.train()
    first.train(stop=stop)
    parts = ("network", "optimizer", "freezer")
    torch.save({part: getattr(first, part).state_dict() for part in parts}, file := io.BytesIO())
    file.seek(0)
    for part, state in torch.load(file, weights_only=True).items():
        getattr(second, part).load_state_dict(state)
    second.train(start=stop)
    cases.assert_identical(second.results(), unbroken.results())


def test_saving_in_the_middle_changes_nothing():
    """The loop that saves at each step ends as the one that does not."""
    plain, saving = Loop(OPTIONS["variance"]), Loop(OPTIONS["variance"])
    plain.train()
    for step in range(STEPS):
        saving.train(step, step + 1)
        copy.deepcopy([saving.freezer.state_dict(), saving.optimizer.state_dict()])
    cases.assert_identical(saving.results(), plain.results())


def test_frozen_elements_keep_their_bits_while_live_ones_move_and_the_delta_rebuilds_the_model():
    """AdamW with strong weight decay would move every element."""
    loop = Loop(OPTIONS["variance"])
    loop.train(stop=6)
    start = copy.deepcopy(loop.network)
    loop.train(start=6)
    for name, p in loop.network.named_parameters():
        frozen, before = loop.freezer.frozen[name], start.get_parameter(name)
        assert torch.equal(p[frozen].view(torch.int32), before[frozen].view(torch.int32))
        assert not (p[~frozen] == before[~frozen]).any()
    apply_delta(start, loop.freezer.delta())
    cases.assert_identical(start.state_dict(), loop.network.state_dict())


def test_user_code_that_reads_gradients_between_backward_and_step_sees_all_of_them():
    """By default gradients stay where they are: those of frozen elements are zero, those of live ones are not."""
    loop = Loop({"t0": 2, "k": 0.5})
    loop.train(stop=3)
    batch = batches()[3]
    loop.freezer.begin_batch(batch)
    loop.freezer.backward(loss_of(loop.network, batch))
    seen = {name: p.grad.clone() for name, p in loop.network.named_parameters()}
    for name, frozen in loop.freezer.frozen.items():
        assert not seen[name][frozen].any()
        assert seen[name][~frozen].any() or frozen.all()
    loop.optimizer.step()


def test_scheduler_and_scaler_of_the_loop_go_on_working():
    """A GradScaler whose first scale overflows float16 skips steps: these are neither counted nor observed."""
    torch.manual_seed(0)
    network = cases.mlp()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    freezer = Freezer(network, optimizer, t0=4, k=0.5, loss=loss_of, scaler=scaler)
    taken = 0
    for batch in batches():
        freezer.begin_batch(batch)
        before, scale = network[0].weight.detach().clone(), scaler.get_scale()
        freezer.backward(scaler.scale(loss_of(network, batch)))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() == scale:
            taken += 1
            scheduler.step()
            assert not torch.equal(before, network[0].weight)
    freezer.close()
    assert 0 < taken < STEPS
    assert freezer.steps == taken
    assert freezer.frozen_fraction == pytest.approx(0.5, abs=0.01)


def test_two_freezers_serve_a_generator_and_a_discriminator_with_their_own_t0_and_k():
    """Each optimizer is followed by itself; the discriminator steps twice as often."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    ours = {"generator": torch.optim.Adam(generator.parameters()), "critic": torch.optim.Adam(critic.parameters())}

    def loss_of_critic(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() - model(generator(batch).detach()).mean()

    freezers = {
        "generator": Freezer(
            generator, ours["generator"], t0=2, k=0.5, loss=lambda model, z: critic(model(z)).square().mean()
        ),
        "critic": Freezer(critic, ours["critic"], t0=6, k=0.25, loss=loss_of_critic),
    }
    for step in range(8):
        x = torch.randn(6, 2)
        for _ in range(2):
            freezers["critic"].begin_batch(x)
            freezers["critic"].backward(loss_of_critic(critic, x))
            ours["critic"].step()
            ours["critic"].zero_grad()
        freezers["generator"].begin_batch(x)
        freezers["generator"].backward(critic(generator(x)).square().mean())
        ours["generator"].step()
        critic.zero_grad()
        ours["generator"].zero_grad()
        assert [freezers["generator"].phase, freezers["critic"].phase] == [
            "frozen" if step >= 1 else "observing",
            "frozen" if step >= 2 else "observing",
        ]
    assert {name: round(freezer.frozen_fraction, 2) for name, freezer in freezers.items()} == {
        "generator": 0.5,
        "critic": 0.24,
    }
    for freezer in freezers.values():
        freezer.close()


def test_batch_that_was_not_announced_is_an_error():
    """Without `begin_batch` nothing could be observed, and nothing would freeze."""
    loop = Loop(OPTIONS["variance"])
    with pytest.raises(RuntimeError, match=r"Call `freezer.begin_batch\(batch\)` before the forward pass"):
        loop.freezer.backward(loss_of(loop.network, batches()[0]))


def test_order_by_variance_without_a_loss_is_an_error():
    """The error names the orders that do without."""
    network = cases.mlp()
    with pytest.raises(ValueError, match=r"`loss` is needed .* `order='progress'`"):
        Freezer(network, adamw(network.parameters()), t0=2, k=0.5)


def test_training_that_ends_before_t0_is_warned_of_when_the_freezer_is_closed():
    """A freeze that did not happen is said so."""
    loop = Loop(OPTIONS["variance"])
    loop.train(stop=3)
    with pytest.warns(UserWarning, match="Nothing was frozen: training ended after 3 optimizer steps, before `t0=6`"):
        loop.freezer.close()
    with pytest.raises(RuntimeError, match="This Freezer is closed"):
        loop.freezer.begin_batch(batches()[0])


def test_state_of_other_options_is_refused():
    """Resuming with another k would be another run."""
    first, second = Loop(OPTIONS["variance"]), Loop(OPTIONS["variance"] | {"k": 0.6})
    first.train(stop=2)
    second.freezer.load_state_dict(first.freezer.state_dict())
    with pytest.raises(RuntimeError, match=r"k=0.5 \(now 0.6\)"):
        second.train(start=2)


def test_metrics_name_the_frozen_fraction_and_new_findings_once():
    """For the user's own logger."""
    loop = Loop(OPTIONS["variance"])
    loop.train(stop=6)
    found = loop.freezer.metrics()
    assert found["gcfreeze/frozen_fraction"] == pytest.approx(0.5, abs=0.02)
    assert found["gcfreeze/t0"] == 6.0
    assert "gcfreeze/t0" not in loop.freezer.metrics()


def test_second_freezer_on_the_same_optimizer_is_an_error_until_the_first_is_closed():
    """Both would hold elements, against each other."""
    loop = Loop(OPTIONS["variance"] | {"order": "progress"})
    loop.train(stop=1)
    other = Freezer(loop.network, loop.optimizer, t0=2, k=0.5, order="progress")
    with pytest.raises(RuntimeError, match=r"AdamW is followed by another .*`freezer.close\(\)`"):
        other.begin_batch(batches()[1])
    with pytest.warns(UserWarning, match="Nothing was frozen"):
        loop.freezer.close()
    other.begin_batch(batches()[1])


class EvaluatesTwice(torch.optim.SGD):
    """Calls its closure twice in each step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_optimizer_that_evaluates_the_loss_twice_in_a_step_is_refused():
    """Before it steps a second time on weights that are not those of the step."""
    network = cases.mlp()
    optimizer = EvaluatesTwice(network.parameters(), lr=0.1)
    freezer, batch = Freezer(network, optimizer, t0=2, k=0.5, loss=loss_of), batches()[0]

    def closure() -> Tensor:
        evaluations.append(loss := loss_of(network, batch))
        freezer.backward(loss)
        return loss

    evaluations: list[Tensor] = []
    freezer.begin_batch(batch)
    with pytest.raises(RuntimeError, match="EvaluatesTwice evaluates the loss several times in one step"):
        optimizer.step(closure)
    assert len(evaluations) == 2


def test_everything_that_the_loss_runs_through_is_left_as_it_was_if_the_module_contains_it():
    """The critic's running statistics do not see the samples that are replayed for the generator."""

    def trained(with_freezer: bool) -> Tensor:
        torch.manual_seed(0)
        both = nn.ModuleDict(
            {"generator": nn.Linear(2, 2), "critic": nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))}
        )
        optimizer = torch.optim.Adam(both["generator"].parameters())

        def loss(model: Any, z: Tensor) -> Tensor:
            return model["critic"](model["generator"](z)).square().mean()

        freezer = Freezer(both, optimizer, t0=3, k=0.5, loss=loss, gradients="replay") if with_freezer else None
        for z in torch.randn(5, 6, 2):
            if freezer:
                freezer.begin_batch(z)
                freezer.backward(loss(both, z))
            else:
                loss(both, z).backward()
            optimizer.step()
            optimizer.zero_grad()
        if freezer:
            freezer.close()
            assert set(freezer.frozen) == {"generator.weight", "generator.bias"}
        return both["critic"][0].running_mean

    frozen, free = trained(True), trained(False)
    torch.testing.assert_close(frozen, free, rtol=0.05, atol=1e-3)  # half of the generator froze
    assert free.abs().max() > 0.01


def test_window_that_ends_early_without_being_told_so_is_an_error():
    """One backward pass of `accumulate=2` was left out: the later windows would be shifted."""
    loop = Loop(OPTIONS["variance"], accumulate=2)
    loop.train(stop=2)
    batch = batches()[2]
    loop.freezer.begin_batch(batch)
    loop.freezer.backward(loss_of(loop.network, batch) / 2)
    loop.optimizer.step()
    with pytest.raises(RuntimeError, match=r"stepped after 1 of `accumulate=2` backward passes\. Pass `is_last"):
        loop.freezer.begin_batch(batch)


def test_state_is_refused_after_the_first_batch():
    """What is held could not be taken back."""
    loop = Loop(OPTIONS["variance"])
    loop.train(stop=8)
    with pytest.raises(RuntimeError, match="A state is loaded before the first batch"):
        loop.freezer.load_state_dict(loop.freezer.state_dict())
    assert loop.freezer.phase == "frozen"


def test_freezer_cannot_be_copied_or_pickled():
    """A copy would follow the original's model."""
    loop = Loop(OPTIONS["variance"])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"load this one's `state_dict\(\)`"):
            copied(loop.freezer)


def test_closing_lets_go_of_the_optimizer_even_where_the_warning_is_an_error():
    """Else no other freezer could follow it."""
    loop = Loop(OPTIONS["variance"] | {"order": "progress"})
    loop.train(stop=1)
    with pytest.raises(UserWarning, match="Nothing was frozen"):
        loop.freezer.close()
    other = Freezer(loop.network, loop.optimizer, t0=2, k=0.5, order="progress")
    other.begin_batch(batches()[1])


def test_freezer_that_was_refused_does_not_give_the_optimizer_away_when_it_is_closed():
    """The first one still follows it."""
    loop = Loop(OPTIONS["variance"] | {"order": "progress"})
    loop.train(stop=1)
    refused = Freezer(loop.network, loop.optimizer, t0=2, k=0.5, order="progress")
    for freezer in (refused, Freezer(loop.network, loop.optimizer, t0=2, k=0.5, order="progress")):
        with pytest.raises(RuntimeError, match="followed by another"):
            freezer.begin_batch(batches()[1])
        with pytest.warns(UserWarning, match="Nothing was frozen"):
            freezer.close()


def test_losses_are_recorded_without_the_scale_of_a_scaler_that_scales_inside_of_backward():
    """Fabric's and Accelerate's `backward` multiply the loss themselves: `loss` comes without the scale."""
    loop = Loop(OPTIONS["from the data"] | {"k": 0.5})
    loop.freezer._scaler, loop.freezer._scales_inside = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    recorded = []
    loop.freezer._state.plan.record_loss = lambda loss, step: recorded.append(float(loss))
    batch = batches()[0]
    loop.freezer.begin_batch(batch)
    loss = loss_of(loop.network, batch)
    loop.freezer.before_backward(loss)
    assert recorded == [pytest.approx(float(loss.detach()))]


class Fails(torch.optim.SGD):
    """Raises in step `at`."""

    at, taken = 9, 0

    def step(self, closure: Any = None) -> Any:
        self.taken += 1
        if self.taken == self.at:
            raise RuntimeError("out of memory")
        return super().step(closure)


RATED: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.02}, {"params": p[2:]}], 0.005),
    "Adam, tensor": lambda p: torch.optim.Adam(p, torch.tensor(0.01), foreach=False),
    "Fails": lambda p: Fails(p, 0.02),
}


def rated_loop(
    name: str, plain: bool, factor: float | None, frozen: dict[str, Tensor] | None = None, t0: int = 6
) -> tuple[nn.Module, Any, list[Any], list[Any]]:
    """A loop with a scheduler, a Freezer or masks by hand, and a rate that is multiplied by it or by hand."""
    network = cases.mlp()
    optimizer = RATED[name](list(network.parameters()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    freezer = (
        None if plain else Freezer(network, optimizer, t0, 0.5, loss=loss_of, hold="restore", lr_after_freeze=factor)
    )
    if plain and factor:
        multiply_by_hand(optimizer, lambda t: factor if t > t0 else 1.0)
    rates, factors, held = [], [], {}
    for number, batch in enumerate(batches()):
        if freezer:
            freezer.begin_batch(batch)
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
        if freezer:
            freezer.backward(loss_of(network, batch))
        else:
            loss_of(network, batch).backward()
            for parameter in held:
                network.get_parameter(parameter).grad[frozen[parameter]] = 0.0  # type: ignore[index]
        try:
            optimizer.step()
        except RuntimeError:
            optimizer.zero_grad()
            continue
        with torch.no_grad():
            for parameter, value in held.items():
                network.get_parameter(parameter)[frozen[parameter]] = value[frozen[parameter]]  # type: ignore[index]
        if number + 1 == t0:
            held = {n: p.detach().clone() for n, p in network.named_parameters()} if frozen else {}
        optimizer.zero_grad()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        factors.append(freezer.metrics().get("gcfreeze/lr_factor") if freezer else None)
        schedule.step()
    if freezer:
        freezer.close()
    return network, freezer, rates, factors


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam, tensor"])
def test_weights_with_a_factor_are_those_of_a_plain_loop_that_masks_and_multiplies_by_hand(name):
    """No line of the package runs in the plain loop. The schedule is the same in both, and without a factor."""
    network, freezer, rates, factors = rated_loop(name, plain=False, factor=0.3)
    by_hand, _, rates_by_hand, _ = rated_loop(name, plain=True, factor=0.3, frozen=freezer.frozen)
    unmultiplied, _, rates_without, absent = rated_loop(name, plain=False, factor=None)
    cases.assert_identical(dict(network.state_dict()), dict(by_hand.state_dict()))
    assert any(not torch.equal(p, q) for p, q in zip(network.parameters(), unmultiplied.parameters(), strict=True))
    assert rates == rates_by_hand == rates_without
    assert factors == [1.0] * 5 + [0.3] * (STEPS - 5)
    assert absent == [None] * STEPS


def test_loop_that_goes_on_after_a_step_that_raised_has_its_own_rates():
    """The raising step is left out, as in the loop by hand; its rate was multiplied when it raised."""
    network, freezer, rates, _ = rated_loop("Fails", plain=False, factor=0.3)
    by_hand, _, rates_by_hand, _ = rated_loop("Fails", plain=True, factor=0.3, frozen=freezer.frozen)
    cases.assert_identical(dict(network.state_dict()), dict(by_hand.state_dict()))
    assert rates == rates_by_hand
    assert len(rates) == STEPS - 1


def test_step_that_is_taken_to_have_a_state_to_save_does_not_count():
    """torch.distributed.checkpoint steps an optimizer that has neither state nor gradients, with a rate of 0."""
    module, stepped = cases.mlp(), []
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    freezer = Freezer(module, optimizer, t0=6, k=0.5, order="random")
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    for number, batch in enumerate(batches()[:8], start=1):
        freezer.begin_batch(batch)
        freezer.backward(loss_of(module, batch))
        optimizer.step()
        optimizer.zero_grad()
        get_optimizer_state_dict(module, optimizer)
        assert freezer.steps == number
        assert (freezer.phase == "frozen") == (number >= 6)
    assert len(stepped) == 16
    freezer.close()
