"""Frozen elements keep their bits under every optimizer, on bare tensors; live ones train on."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from lightning_gcfreeze.freezing import ELEMENTWISE, Restore
from tests import conformance
from tests.conformance import DTYPES, half_of, variants
from tests.witnesses import INTEGERS
from tests.witnesses import flat_bits as bits

OPTIMIZERS = conformance.optimizers_of_torch()


def start(name, dtype, **choice):
    """Return parameters by name, and their optimizer with ten steps of state."""
    parameters = conformance.parameters_for(name, dtype)
    optimizer = OPTIMIZERS[name](parameters.values(), **conformance.OPTIMIZERS[name], **choice)
    for _ in range(10):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters, optimizer, before=lambda: None, after=lambda: None):
    conformance.set_gradients_(parameters, sparse=isinstance(optimizer, torch.optim.SparseAdam))
    before()
    optimizer.step()
    after()


def test_every_optimizer_of_torch_is_tested():
    """A new class in `torch.optim` needs a line in the table; LBFGS is refused by the callback."""
    classes = {cls for cls in vars(torch.optim).values() if inspect.isclass(cls) and issubclass(cls, Optimizer)}
    assert classes - {Optimizer, LBFGS} == set(OPTIMIZERS.values())


@DTYPES
@pytest.mark.parametrize(("name", "choice"), variants())
def test_frozen_elements_keep_their_bits(name, choice, dtype):
    """From warm state, 20 steps with decay and momentum: frozen bits stay, live ones move; without restoring all do."""
    parameters, optimizer = start(name, dtype, **choice)
    twins, control = copy.deepcopy((parameters, optimizer))
    frozen = half_of(parameters)
    before = {n: bits(p) for n, p in parameters.items()}

    holder = Restore(parameters, frozen)
    for _ in range(20):
        step(parameters, optimizer, holder.mask_gradients_, holder.restore_)
    masker = Restore(twins, frozen)
    for _ in range(20):
        step(twins, control, masker.mask_gradients_)

    drifted = 0
    for n, p in parameters.items():
        mask = frozen[n].flatten()
        moved = bits(p) != before[n]
        assert not moved[mask].any(), n
        assert mask.all() or moved[~mask].float().mean() >= 0.5, n  # in bfloat16 small steps are rounded away
        drifted += int((bits(twins[n]) != before[n])[mask].sum())
    assert (drifted > 0) == (name not in conformance.HELD_BY_A_ZERO_GRADIENT)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restoring_holds_values_without_masked_gradients(name):
    """The optimizer's step moves frozen elements; `restore_` puts their values back."""
    parameters, optimizer = start(name, torch.float32)
    frozen = half_of(parameters)
    before = {n: bits(p) for n, p in parameters.items()}
    holder = Restore(parameters, frozen)
    step(parameters, optimizer)
    assert any((bits(p) != before[n])[frozen[n].flatten()].any() for n, p in parameters.items())
    holder.restore_()
    assert not any((bits(p) != before[n])[frozen[n].flatten()].any() for n, p in parameters.items())
    assert any((bits(p) != before[n]).any() for n, p in parameters.items())


@DTYPES
def test_special_values_are_restored_to_the_bit(dtype):
    """The sign of a zero, infinities, the smallest numbers and the payload of a NaN."""
    integers = torch.tensor([0, 1, -1, 5], dtype=INTEGERS[dtype.itemsize])  # 0.0, the smallest number, two NaN
    values = torch.cat([torch.tensor([-0.0, float("inf"), float("-inf"), 1.0], dtype=dtype), integers.view(dtype)])
    p = Parameter(values.clone())
    holder = Restore({"w": p}, {"w": torch.tensor([True] * 3 + [False] + [True] * 4)})
    with torch.no_grad():
        p.fill_(7.0)
    assert not (bits(p) == bits(values)).any()
    holder.restore_()
    assert (bits(p) == bits(values)).tolist() == [True] * 3 + [False] + [True] * 4


class TestLayouts:
    """Parameters that are not contiguous, or that have no axes."""

    @pytest.mark.parametrize("name", ["scalar", "vector", "matrix", "transposed", "conv"])
    def test_elements_are_held_by_position_in_the_tensor(self, name):
        """The position in memory does not matter; the parameter keeps its memory and strides."""
        p = conformance.parameters_for("Adam", torch.float32)[name]
        assert p.is_contiguous() == (name not in ("transposed", "conv"))
        where, strides = p.data_ptr(), p.stride()
        mask = torch.rand(p.shape) < 0.5 if p.dim() else torch.tensor(True)
        expected = torch.where(mask, p.detach(), p.detach() + 1.0).clone()
        p.grad = torch.ones_like(p)
        holder = Restore({"w": p}, {"w": mask})
        holder.mask_gradients_()
        assert torch.equal(p.grad, (~mask).float())
        with torch.no_grad():
            p.add_(1.0)
        assert mask.any()
        assert not torch.equal(p, expected)
        holder.restore_()
        assert torch.equal(p, expected)
        assert (p.data_ptr(), p.stride()) == (where, strides)

    def test_gradient_in_another_format_than_its_parameter_is_masked_by_position(self):
        """A channels-last gradient of a contiguous weight."""
        p = Parameter(torch.zeros(2, 3, 4, 4))
        p.grad = torch.ones_like(p).to(memory_format=torch.channels_last)
        mask = torch.rand(p.shape) < 0.5
        Restore({"w": p}, {"w": mask}).mask_gradients_()
        assert torch.equal(p.grad, (~mask).float())


class TestGradients:
    """Before the step: norms, clipping and optimizers that look at whole tensors see live elements only."""

    @pytest.fixture
    def parameters(self):
        parameters = conformance.parameters_for("Adam", torch.float64)
        conformance.set_gradients_(parameters)
        return parameters

    def test_live_gradients_keep_their_bits_and_frozen_ones_are_zero(self, parameters):
        """Masked ones are 0.0 to the bit, not -0.0; all were something else before."""
        before = {n: bits(p.grad) for n, p in parameters.items()}
        frozen = half_of(parameters)
        Restore(parameters, frozen).mask_gradients_()
        for n, p in parameters.items():
            mask = frozen[n].flatten()
            assert before[n].all()
            assert not bits(p.grad)[mask].any()
            assert torch.equal(bits(p.grad)[~mask], before[n][~mask])

    def test_nan_and_infinity_of_frozen_elements_become_zero(self, parameters):
        """They would survive a multiplication by 0, and make the norm of everything NaN."""
        frozen = half_of(parameters)
        before = {n: p.grad.clone() for n, p in parameters.items()}
        for n, p in parameters.items():
            p.grad.masked_fill_(frozen[n], float("nan"))
        parameters["vector"].grad[frozen["vector"].nonzero()[0]] = float("inf")
        Restore(parameters, frozen).mask_gradients_()
        for n, p in parameters.items():
            assert torch.equal(p.grad, torch.where(frozen[n], 0.0, before[n]))

    def test_the_norm_counts_live_elements_only(self, parameters):
        """Clipping sees the norm that NumPy finds over live elements, which is less than that of all."""
        frozen = half_of(parameters)
        gradients = {n: p.grad.numpy().copy() for n, p in parameters.items()}
        live = np.concatenate([gradients[n][~mask.numpy()] for n, mask in frozen.items()])
        every = np.concatenate([g.flatten() for g in gradients.values()])
        Restore(parameters, frozen).mask_gradients_()
        norm = float(nn.utils.clip_grad_norm_(parameters.values(), 1.0))
        assert norm == pytest.approx(np.linalg.norm(live), rel=1e-12)
        assert norm < 0.99 * np.linalg.norm(every)

    @pytest.mark.parametrize("coalesced", [True, False])
    def test_sparse_gradient_stays_sparse(self, coalesced):
        """The frozen elements of its rows are zero, repeated rows are added up."""
        table = nn.Embedding(6, 3, sparse=True)
        (table(torch.tensor([4, 1, 4])) * torch.arange(1.0, 10.0).view(3, 3)).sum().backward()
        if coalesced:
            table.weight.grad = table.weight.grad.coalesce()
        frozen = torch.rand(6, 3) < 0.5
        frozen[4] = torch.tensor([True, False, True])
        expected = torch.zeros(6, 3)
        expected[1], expected[4] = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([8.0, 10.0, 12.0])
        assert torch.equal(table.weight.grad.to_dense(), expected)
        Restore({"w": table.weight}, {"w": frozen}).mask_gradients_()
        assert table.weight.grad.is_sparse
        assert table.weight.grad._nnz() <= 3
        assert torch.equal(table.weight.grad.to_dense(), torch.where(frozen, 0.0, expected))

    def test_nan_of_a_frozen_element_in_a_sparse_gradient_becomes_zero(self):
        """A NaN of a live element stays."""
        p = Parameter(torch.zeros(3, 2))
        p.grad = torch.sparse_coo_tensor([[1]], [[float("nan"), 2.0]], (3, 2), check_invariants=True)
        Restore({"w": p}, {"w": torch.tensor([[True, False]] * 3)}).mask_gradients_()
        assert p.grad.to_dense().tolist() == [[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]

    def test_parameter_without_a_gradient_gets_none(self):
        """It took no part in the loss; the optimizer passes it by, and still has to."""
        p = Parameter(torch.zeros(3))
        Restore({"w": p}, {"w": torch.tensor([True, True, False])}).mask_gradients_()
        assert p.grad is None


class TestState:
    """The optimizer's state of frozen elements is cleared when they freeze."""

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_state_by_element_is_cleared_where_frozen(self, name):
        """State of the parameter's shape is zero where frozen, else as before; Adam's step and its like stay.

        All of it stays where an entry of that shape need not be by element.
        """
        parameters, optimizer = start(name, torch.float32)
        frozen = half_of(parameters)
        before = copy.deepcopy([optimizer.state[p] for p in parameters.values()])
        Restore(parameters, frozen).clear_state_(optimizer)
        cleared = 0
        for (n, p), state in zip(parameters.items(), before, strict=True):
            assert optimizer.state[p].keys() == state.keys()
            for key, old in state.items():
                new = optimizer.state[p][key]
                by_element = type(optimizer) in ELEMENTWISE and p.dim() > 0
                if by_element and isinstance(old, torch.Tensor) and old.shape == p.shape:
                    assert torch.equal(new, torch.where(frozen[n], 0.0, old))
                    cleared += int((new != old).sum())
                elif isinstance(old, torch.Tensor):
                    assert torch.equal(new, old)
                else:
                    assert new == old
        assert bool(cleared) is (type(optimizer) in ELEMENTWISE)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_training_continues_after_the_state_was_cleared(self, name):
        """The optimizer does not fail, no live value becomes NaN, and frozen bits stay."""
        parameters, optimizer = start(name, torch.float32)
        frozen = half_of(parameters)
        before = {n: bits(p) for n, p in parameters.items()}
        holder = Restore(parameters, frozen)
        holder.clear_state_(optimizer)
        for _ in range(5):
            step(parameters, optimizer, holder.mask_gradients_, holder.restore_)
        for n, p in parameters.items():
            mask = frozen[n].flatten()
            assert p.isfinite().all()
            assert not (bits(p) != before[n])[mask].any()
            assert mask.all() or (bits(p) != before[n])[~mask].any()

    def test_optimizer_without_state_gets_none(self):
        """Before its first step, and SGD without momentum at any time."""
        p = Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([p], lr=0.1)
        Restore({"w": p}, {"w": torch.tensor([True, True, False])}).clear_state_(optimizer)
        assert not optimizer.state


def test_parameters_without_frozen_elements_keep_values_and_gradients():
    """A mask without True, and a parameter without a mask, change nothing."""
    parameters = {name: Parameter(torch.zeros(3)) for name in ("held", "free", "unnamed")}
    masks = {"held": torch.tensor([True, False, True]), "free": torch.zeros(3, dtype=torch.bool)}
    holder = Restore(parameters, masks)
    for p in parameters.values():
        p.grad = torch.ones(3)
        p.data.fill_(5.0)
    holder.mask_gradients_()
    holder.restore_()
    assert {n: p.tolist() for n, p in parameters.items()} == {"held": [0, 5, 0], "free": [5] * 3, "unnamed": [5] * 3}
    assert {n: p.grad.tolist() for n, p in parameters.items()} == {
        "held": [0, 1, 0],
        "free": [1] * 3,
        "unnamed": [1] * 3,
    }


def test_empty_parameter_is_ignored():
    """A tensor without elements has nothing to hold."""
    p = Parameter(torch.zeros(0, 3))
    holder = Restore({"w": p}, {"w": torch.zeros(0, 3, dtype=torch.bool)})
    p.grad = torch.zeros(0, 3)
    holder.mask_gradients_()
    holder.restore_()
    assert p.shape == (0, 3)
