"""Gradients by replay, and g_S, against formulas that are differentiated by `Tensor.backward`."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.gradients.replay import isolated_gradient

X = torch.randn(1, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


TOKENS = torch.tensor([[3, 1, 3, 0]])


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(15, 1)
    ).double()


def batch_norm():
    """In train mode, with running statistics that are not the initial ones."""
    module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2.0)
    return module.train()


class Tied(nn.Module):
    """One matrix as the embedding and the output layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2).double()
        self.head = nn.Linear(2, 5).double()
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens))


class PartlyUsed(nn.Module):
    """Half of it takes no part in the loss."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(5, 1).double()
        self.unused = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.used(x)


def embedding(sparse=False):
    return nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Flatten(), nn.Linear(12, 1)).double()


def by_hand_mlp(p, x):
    return (torch.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]).square().mean()


def by_hand_convolution(p, x):
    padded = torch.cat([torch.zeros(1, 1).double(), x, torch.zeros(1, 1).double()], dim=1)
    windows = torch.stack([padded[0, i : i + 3] for i in range(5)])  # (5, 3)
    features = (windows @ p["1.weight"][:, 0].T + p["1.bias"]).T.reshape(1, 15)
    return (features @ p["3.weight"].T + p["3.bias"]).square().mean()


def by_hand_batch_norm(p, x):
    h = x @ p["0.weight"].T + p["0.bias"]
    h = (h - p["1.running_mean"]) / (p["1.running_var"] + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
    return (h @ p["2.weight"].T + p["2.bias"]).square().mean()


def by_hand_embedding(p, tokens):
    h = F.one_hot(tokens, 6).double() @ p["0.weight"]
    return (h.reshape(1, 12) @ p["2.weight"].T + p["2.bias"]).square().mean()


def by_hand_tied(p, tokens):
    h = F.one_hot(tokens, 5).double() @ p["table.weight"]
    return (h @ p["table.weight"].T + p["head.bias"]).square().mean()


CASES = {  # a module, its input, and the loss as a formula of the module's state
    "mlp": (mlp, X, by_hand_mlp),
    "convolution": (convolution, X, by_hand_convolution),
    "batch norm": (batch_norm, X, by_hand_batch_norm),
    "embedding": (embedding, TOKENS, by_hand_embedding),
    "sparse embedding": (lambda: embedding(sparse=True), TOKENS, by_hand_embedding),
    "tied weights": (Tied, TOKENS, by_hand_tied),
    "unused parameters": (
        PartlyUsed,
        X,
        lambda p, x: (x @ p["used.weight"].T + p["used.bias"]).square().mean(),
    ),
}


def backward_by_hand(module, formula):
    """The oracle: a formula of leaves with the module's values, differentiated by `Tensor.backward`."""
    leaves = {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        leaves[name].requires_grad_()
    formula(leaves).backward()
    return {name: torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad for name in names}


@pytest.mark.parametrize("case", CASES)
def test_isolated_gradient_equals_that_of_the_formula(case):
    """In float64 it equals the formula's gradient; dense, detached, and zero where the loss does not reach."""
    make, x, formula = CASES[case]
    module = make()
    parameters = dict(module.named_parameters())
    g_one = isolated_gradient(module, lambda: module(x).square().mean(), parameters)
    expected = backward_by_hand(module, lambda leaves: formula(leaves, x))
    assert list(g_one) == list(expected)
    assert any(g.any() for g in expected.values())
    for name, g in g_one.items():
        assert (g.layout, g.requires_grad) == (torch.strided, False)
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


def test_batch_norm_uses_running_statistics_in_a_replay():
    """The case above tells the two modes apart: with the statistics of its batch of one, here 3 rows, g differs."""
    module = batch_norm()
    rows = torch.randn(3, 5).double()
    loss = lambda: module(rows).square().mean()  # noqa: E731
    replayed = isolated_gradient(module, loss, dict(module.named_parameters()))
    loss().backward()
    assert not torch.allclose(replayed["0.weight"], module[0].weight.grad)


def test_isolated_gradient_has_only_the_parameters_asked_for():
    """Some of the parameters, under the names they were given; one that requires no gradient gets zeros."""
    module = mlp()
    module[2].weight.requires_grad_(False)
    asked = {"a": module[0].bias, "b": module[2].weight}
    g_one = isolated_gradient(module, lambda: module(X).square().mean(), asked)
    expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
    assert list(g_one) == ["a", "b"]
    torch.testing.assert_close(g_one["a"], expected["0.bias"], rtol=1e-12, atol=1e-14)
    assert torch.equal(g_one["b"], torch.zeros(1, 4, dtype=torch.float64))
    assert expected["2.weight"].all()


def test_isolated_gradient_works_under_no_grad():
    """As they are in hooks that run under `torch.no_grad`."""
    module = mlp()
    with torch.no_grad():
        g_one = isolated_gradient(module, lambda: module(X).square().mean(), dict(module.named_parameters()))
    expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
    for name, g in g_one.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


def test_loss_of_none_gives_no_gradient():
    """A `training_step` that returns None skips its batch; so does the replay."""
    assert isolated_gradient(mlp(), lambda: None, {}) is None


def test_tensor_hooks_change_g_1_as_they_change_g_s():
    """A tensor hook that halves the gradient halves both; a hook for accumulated gradients runs for g_S alone."""
    module, accumulated = mlp(), []
    expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
    module[0].weight.register_hook(lambda g: g / 2)
    module[0].weight.register_post_accumulate_grad_hook(accumulated.append)
    g_one = isolated_gradient(module, lambda: module(X).square().mean(), dict(module.named_parameters()))
    assert accumulated == []
    torch.testing.assert_close(g_one["0.weight"], expected["0.weight"] / 2, rtol=1e-12, atol=1e-14)
    module(X).square().mean().backward()
    assert len(accumulated) == 1
    assert torch.equal(module[0].weight.grad, g_one["0.weight"])


def test_dropout_in_a_replay_draws_what_the_next_draw_would_be():
    """g_1 has the mask that the next draw would have, and the next draw has it again."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1)).double()
    parameters = dict(module.named_parameters())
    torch.manual_seed(3)
    once, again = (isolated_gradient(module, lambda: module(X).sum(), parameters) for _ in range(2))
    dropped = F.dropout(X, 0.5)
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(once["1.weight"], dropped)
    assert torch.equal(again["1.weight"], dropped)


class TestBatchGradients:
    """g_S is what backward left in ``p.grad``."""

    def test_dense_gradient_is_not_copied(self):
        """No copy is made of a dense one."""
        module = mlp()
        module(X).square().mean().backward()
        parameters = dict(module.named_parameters())
        g_batch = batch_gradients(parameters)
        assert all(
            g_batch[name] is not None and g_batch[name].data_ptr() == p.grad.data_ptr()
            for name, p in parameters.items()
        )
        expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
        for name, g in g_batch.items():
            torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)

    def test_loss_scale_is_divided_out(self):
        """A scaler multiplied the loss by 1024; ``p.grad`` keeps that factor, g_S does not have it."""
        module = mlp()
        (1024 * module(X).square().mean()).backward()
        before = module[0].weight.grad.clone()
        expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
        for name, g in batch_gradients(dict(module.named_parameters()), scale=1024.0).items():
            torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)
        assert torch.equal(module[0].weight.grad, before)

    @pytest.mark.parametrize("scale", [1.0, 4.0])
    def test_sparse_gradient_becomes_dense(self, scale):
        """Rows that occurred twice are added up; ``p.grad`` stays sparse."""
        module = embedding(sparse=True)
        (scale * module(TOKENS).square().mean()).backward()
        g_batch = batch_gradients(dict(module.named_parameters()), scale)
        expected = backward_by_hand(module, lambda leaves: by_hand_embedding(leaves, TOKENS))
        torch.testing.assert_close(g_batch["0.weight"], expected["0.weight"], rtol=1e-12, atol=1e-14)
        assert module[0].weight.grad.is_sparse

    def test_missing_gradient_is_zero(self):
        """A parameter that took no part in the loss has zeros of its shape and dtype; it gets no ``p.grad``."""
        parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        g_batch = batch_gradients({"w": parameter})
        assert torch.equal(g_batch["w"], torch.zeros(2, 3, dtype=torch.float64))
        assert not g_batch["w"].requires_grad
        assert parameter.grad is None
