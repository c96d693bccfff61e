"""`Probe` against gradients by `torch.autograd.grad`, put together by NumPy, and `ProbeCallback` against `Probe`."""

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from lightning_gcfreeze import GradCovFreezeCallback, Probe, ProbeCallback, orderings
from lightning_gcfreeze.masks import load, load_order, lowest
from tests import cases

BATCHES = 6


def batches(samples=8):
    return [tuple(batch) for batch in cases.loader(samples, samples * BATCHES, torch.float64)]


def loss_of(model, batch):
    x, y = batch
    return mse_loss(model(x), y)


def gradients(model, given=None):
    """Of each batch, (batches, elements)."""
    found = [
        torch.autograd.grad(loss_of(model, batch), list(model.parameters()), materialize_grads=True)
        for batch in given or batches()
    ]
    return np.stack([torch.cat([g.flatten() for g in of_batch]).numpy() for of_batch in found])


def probed(model, order, given=None, **arguments):
    with Probe(model, order, **arguments) as probe:
        for batch in given or batches():
            probe.backward(loss_of(model, batch))
    return probe


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()]).numpy()


@orderings.needs("mean", variance=False)
def mean_gradient(evidence):
    return {name: mean.abs() for name, mean in evidence.mean.items()}


SCORES = {
    "progress": lambda g, w: g.mean(0) ** 2 / np.sqrt((g**2).mean(0)),
    "variance": lambda g, w: g.var(0, ddof=1),
    "reverse": lambda g, w: -g.var(0, ddof=1),
    "second_moment": lambda g, w: (g**2).mean(0),
    "snr": lambda g, w: np.abs(g.mean(0)) / g.std(0, ddof=1),
    "magnitude": lambda g, w: np.abs(w),
    mean_gradient: lambda g, w: np.abs(g.mean(0)),
}


@pytest.mark.parametrize("order", SCORES, ids=str)
def test_scores_are_those_of_the_gradients_at_fixed_weights(order, tmp_path):
    model = cases.mlp(torch.float64)
    expected = SCORES[order](gradients(model), parameters_to_vector(model.parameters()).detach().numpy())
    probe = probed(model, order)
    probe.save_order(tmp_path / "order.pt")
    np.testing.assert_allclose(flat(load_order(tmp_path / "order.pt")), expected, rtol=1e-9, atol=1e-15)
    chosen = flat(probe.masks(0.4))
    assert set(np.flatnonzero(chosen)) == set(np.argsort(expected, kind="stable")[: round(0.4 * 57)])


def test_variance_survives_a_large_mean_gradient():
    """In float32, E[g²] - (E g)² would have nothing left of it."""
    torch.manual_seed(0)
    weight = nn.Linear(40, 1, bias=False)
    noise = torch.randn(BATCHES, 40)
    with Probe(weight, "variance") as probe:
        for row in noise:
            probe.backward((weight.weight * (row + 3000.0)).sum())
    expected = (noise.double() + 3000.0).float().double().numpy().var(0, ddof=1)
    scores = probe._scores("element")["weight"].flatten()
    np.testing.assert_allclose(scores, expected, rtol=1e-2)  # at 3000 float32 has steps of 2e-4


def test_a_parameter_that_some_batches_lack_has_a_gradient_of_zero_there():
    model = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)]).double()

    def loss(i, batch):
        return loss_of(model[0] if i % 3 else model[1], batch)

    expected = []
    with Probe(model, "variance") as probe:
        for i, batch in enumerate(batches()):
            of_batch = torch.autograd.grad(loss(i, batch), list(model.parameters()), materialize_grads=True)
            expected.append(torch.cat([g.flatten() for g in of_batch]).numpy())
            probe.backward(loss(i, batch))
    np.testing.assert_allclose(flat(probe._scores("element")), np.var(expected, 0, ddof=1), rtol=1e-9)


def test_module_is_left_as_it_was_although_its_batch_statistics_moved():
    model = cases.convnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = []
    with Probe(model) as probe:
        for x, y in cases.loader(8, 48):
            probe.backward(mse_loss(model(x), y))
            moved.append(not torch.equal(model[2].running_mean, before["2.running_mean"]))
    cases.assert_identical(dict(model.state_dict()), before)
    assert all(moved)
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, next(iter(cases.loader())))[None].backward()  # no hook is left
    assert all(p.grad is not None for p in model.parameters())


def test_no_two_gradients_exist_at_once():
    """Hooks on the outputs run between the gradients of the layers behind and before them."""
    model, most = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]), []

    def count(*_):
        most.append(sum(p.grad is not None for p in model.parameters()))

    for layer in model:
        layer.register_full_backward_pre_hook(count)
    with Probe(model) as probe:
        probe.backward(model(torch.randn(4, 8)).sum())
    assert max(most) == 0
    model(torch.randn(4, 8)).sum().backward()
    assert max(most) > 1


def test_what_is_left_out_gets_no_mask_and_no_gradient():
    model = cases.mlp(torch.float64)
    probe = probed(model, "progress", exclude="*.bias")
    assert probe.masks(0.5).keys() == {"0.weight", "2.weight"}
    assert all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    assert probed(model, "progress", optimizer=optimizer).masks(0.5).keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
@pytest.mark.parametrize("k", [5, 0.3, 0.9])
def test_saved_order_gives_the_masks_of_any_k(k, granularity, tmp_path):
    probe = probed(cases.mlp(torch.float64), "progress")
    probe.save_order(tmp_path / "order.pt")
    probe.save_masks(tmp_path / "masks.pt", k, granularity)
    masks = load(tmp_path / "masks.pt")
    cases.assert_identical(masks, probe.masks(k, granularity))
    module = cases.Regression(cases.mlp(torch.float64))
    own = {f"network.{name}": score for name, score in load_order(tmp_path / "order.pt").items()}
    callback = GradCovFreezeCallback(masks=lowest(own, k, granularity))
    if any(mask.any() for mask in masks.values()):
        cases.trainer(max_steps=1, callbacks=[callback]).fit(module, cases.loader(dtype=torch.float64))
        cases.assert_identical({n.removeprefix("network."): mask for n, mask in callback.frozen.items()}, masks)


def test_dead_elements_are_warned_of():
    model = nn.Embedding(50, 2)
    with Probe(model) as probe:
        probe.backward(model(torch.arange(5)).square().sum())
    with pytest.warns(UserWarning, match=r"80 of the 80 lowest elements had no gradient in the 1 batches"):
        probe.masks(0.8)


class TestErrors:
    @pytest.mark.parametrize("order", ["displacement", "momentum", "movement"])
    def test_an_order_that_reads_what_only_training_can_tell(self, order):
        with pytest.raises(ValueError, match="which only training can tell"):
            Probe(cases.mlp(), order)

    def test_gradients_that_are_there_already(self):
        model = cases.mlp()
        loss_of(model, next(iter(cases.loader()))).backward()
        with pytest.raises(RuntimeError, match=r"0\.weight, .* have gradients already"):
            Probe(model)

    def test_a_backward_pass_that_the_probe_does_not_know_of(self):
        model = cases.mlp()
        with (
            pytest.raises(RuntimeError, match=r"call `probe\.backward\(loss\)` in place of `loss\.backward\(\)`"),
            Probe(model),
        ):
            loss_of(model, next(iter(cases.loader()))).backward()

    def test_a_gradient_that_is_not_finite(self):
        model = cases.mlp()
        with Probe(model) as probe:
            probe.backward(loss_of(model, next(iter(cases.loader()))))
            with pytest.raises(RuntimeError, match="gradient of batch 2 is not finite"):
                probe.backward(model(torch.full((2, 5), torch.nan)).sum())

    def test_a_closed_probe(self):
        probe = probed(cases.mlp(torch.float64), "progress")
        with pytest.raises(RuntimeError, match="This Probe is closed"):
            probe.backward(torch.zeros((), requires_grad=True))

    def test_no_batch(self):
        with pytest.raises(RuntimeError, match="has seen no batch"):
            Probe(cases.mlp()).masks(0.5)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"k": 1.5}, ValueError, r"`k` as a float is a fraction"),
            ({"k": 0.5, "batches": 0}, ValueError, "`batches` must be at least 1"),
            ({"k": 0.5, "granularity": "column"}, ValueError, "`granularity` must be one of"),
            ({"k": 0.5, "order": "progres"}, ValueError, "Did you mean 'progress'"),
        ],
    )
    def test_arguments_of_the_callback(self, arguments, error, message):
        with pytest.raises(error, match=message):
            ProbeCallback("masks.pt", **arguments)

    def test_manual_optimization_is_refused(self, tmp_path):
        module = cases.Regression(cases.mlp())
        module.automatic_optimization = False
        with pytest.raises(MisconfigurationException, match=r"lightning_gcfreeze\.Probe"):
            cases.trainer(callbacks=[ProbeCallback(tmp_path / "m.pt", 0.5)]).fit(module, cases.loader())


class TestCallback:
    def probe(self, file, module, **arguments):
        callback = ProbeCallback(file, 0.5, **arguments)
        trainer = cases.trainer(callbacks=[callback], max_epochs=1)
        trainer.fit(module, cases.loader(8, 8 * BATCHES, torch.float64))
        return callback, trainer

    def test_masks_are_those_of_a_loop_and_nothing_is_trained(self, tmp_path):
        module = cases.Regression(cases.mlp(torch.float64), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5))
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        _, trainer = self.probe(tmp_path / "masks.pt", module)
        cases.assert_identical(dict(module.state_dict()), before)
        assert not any(trainer.optimizers[0].state.values())
        expected = probed(cases.mlp(torch.float64), "progress").masks(0.5)
        found = load(tmp_path / "masks.pt")
        cases.assert_identical({name.removeprefix("network."): mask for name, mask in found.items()}, expected)
        assert sum(mask.sum() for mask in found.values()) == 28
        freezing = GradCovFreezeCallback(masks=tmp_path / "masks.pt")
        cases.trainer(callbacks=[freezing], max_epochs=1).fit(module, cases.loader(dtype=torch.float64))
        cases.assert_identical(freezing.frozen, found)
        for name, p in module.named_parameters():
            assert torch.equal(p[found[name]], before[name][found[name]])
            assert (p != before[name])[~found[name]].all()

    def test_it_stops_after_enough_batches(self, tmp_path):
        module = cases.Regression(cases.mlp(torch.float64))
        callback, trainer = self.probe(tmp_path / "masks.pt", module, batches=2)
        assert (callback.probe.n_batches, trainer.global_step) == (2, 2)
        expected = SCORES["progress"](gradients(cases.mlp(torch.float64), batches()[:2]), None)
        np.testing.assert_allclose(flat(callback.probe._scores("element")), expected, rtol=1e-9)
