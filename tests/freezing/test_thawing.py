"""`ThawStates` keeps the optimizer state of frozen elements and gives it back when they thaw."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gcfreeze.freezing import ELEMENTWISE, ThawStates
from tests.cases import OPTIMIZERS


def steps(optimizer: torch.optim.Optimizer, parameters: dict[str, Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def by_element(optimizer: torch.optim.Optimizer, p: Parameter) -> Iterator[Tensor]:
    return (v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.shape == p.shape)


@pytest.mark.parametrize("saved", [False, True], ids=["stored", "saved and loaded"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_thawed_elements_have_the_state_they_froze_with(optimizer, saved):
    """Elements freeze at two times and thaw in two parts; the state of all others stays the optimizer's."""
    torch.manual_seed(0)
    parameters = {"w": Parameter(torch.randn(6, 5)), "b": Parameter(torch.randn(5))}
    masks = [{n: torch.rand(p.shape) < 0.4 for n, p in parameters.items()} for _ in range(3)]
    first, second = masks[0], {n: masks[1][n] & ~masks[0][n] for n in parameters}
    optimizer = optimizer(list(parameters.values()))
    kept = ThawStates()

    steps(optimizer, parameters, 5)
    at_first = {n: [s.clone() for s in by_element(optimizer, p)] for n, p in parameters.items()}
    kept.store(optimizer, parameters, first)
    steps(optimizer, parameters, 3)
    at_second = {n: [s.clone() for s in by_element(optimizer, p)] for n, p in parameters.items()}
    kept.store(optimizer, parameters, second)
    steps(optimizer, parameters, 2)
    if saved:
        state = kept.state_dict()
        kept = ThawStates()
        kept.load_state_dict(state)

    frozen = {n: first[n] | second[n] for n in parameters}
    for part in (masks[2], {n: ~masks[2][n] for n in parameters}):
        thawing = {n: frozen[n] & part[n] for n in parameters}
        before = {n: [s.clone() for s in by_element(optimizer, p)] for n, p in parameters.items()}
        kept.restore_to(optimizer, parameters, thawing)
        for n, p in parameters.items():
            for now, then, one, two in zip(by_element(optimizer, p), before[n], at_first[n], at_second[n], strict=True):
                expected = torch.where(thawing[n] & first[n], one, torch.where(thawing[n] & second[n], two, then))
                if type(optimizer) not in ELEMENTWISE:  # its state is left alone
                    expected = then
                assert torch.equal(now, expected)
    if "Adam" in type(optimizer).__name__:
        assert not torch.equal(at_first["w"][0], at_second["w"][0])


def test_parameter_without_state_gets_none_when_it_thaws():
    p = {"w": Parameter(torch.ones(3))}
    optimizer, kept = torch.optim.SGD([p["w"]], 0.1), ThawStates()
    mask = {"w": torch.tensor([True, False, True])}
    kept.store(optimizer, p, mask)
    kept.restore_to(optimizer, p, mask)
    assert not optimizer.state[p["w"]]


def test_sparse_state_is_stored_and_comes_back_dense():
    """SGD's momentum of an embedding with sparse gradients."""
    layer = torch.nn.Embedding(4, 2, sparse=True)
    optimizer, kept = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9), ThawStates()
    layer(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    p = {"w": layer.weight}
    before = optimizer.state[layer.weight]["momentum_buffer"].to_dense().clone()
    mask = {"w": torch.tensor([[True, False]] * 4)}
    kept.store(optimizer, p, mask)
    optimizer.state[layer.weight]["momentum_buffer"].coalesce().values().zero_()
    kept.restore_to(optimizer, p, mask)
    after = optimizer.state[layer.weight]["momentum_buffer"]
    assert torch.equal(after[mask["w"]], before[mask["w"]])
    assert before[mask["w"]].any()
    layer(torch.tensor([0, 1])).sum().backward()
    optimizer.step()
