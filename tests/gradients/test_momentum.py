"""m and the update in optimizers' states, against sums over recorded gradients."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import optim
from torch.nn import Parameter

from lightning_gcfreeze.gradients import momentum
from tests.oracles import momentum as oracle

STEPS = 7
SHAPES = {"matrix": (3, 2), "late": (4,), "scalar": (), "unused": (2,)}
CASES = {
    "Adam": (lambda p: optim.Adam(p, 0.01), lambda g: oracle.adam(g, 0.9, 0.999, 1e-8)),
    "Adam of a GAN": (
        lambda p: optim.Adam(p, 0.01, betas=(0.5, 0.9), eps=0.1),
        lambda g: oracle.adam(g, 0.5, 0.9, 0.1),
    ),
    "Adam, fused": (lambda p: optim.Adam(p, 0.01, fused=True), lambda g: oracle.adam(g, 0.9, 0.999, 1e-8)),
    "Adam, for each": (lambda p: optim.Adam(p, 0.01, foreach=True), lambda g: oracle.adam(g, 0.9, 0.999, 1e-8)),
    "Adam that maximizes": (
        lambda p: optim.Adam(p, 0.01, maximize=True),
        lambda g: oracle.adam([None if x is None else -x for x in g], 0.9, 0.999, 1e-8),
    ),
    "amsgrad": (
        lambda p: optim.Adam(p, 0.01, betas=(0.9, 0.6), amsgrad=True),
        lambda g: oracle.adam(g, 0.9, 0.6, 1e-8, True),
    ),
    "AdamW": (lambda p: optim.AdamW(p, 0.01, weight_decay=0.5), lambda g: oracle.adam(g, 0.9, 0.999, 1e-8)),
    "NAdam": (lambda p: optim.NAdam(p, 0.01), lambda g: oracle.adam(g, 0.9, 0.999, 1e-8)),
    "RAdam": (lambda p: optim.RAdam(p, 0.01), lambda g: oracle.adam(g, 0.9, 0.999, 1e-8)),
    "Adamax": (lambda p: optim.Adamax(p, 0.01), lambda g: oracle.adamax(g, 0.9, 0.999, 1e-8)),
    "SGD": (lambda p: optim.SGD(p, 0.01, momentum=0.9), lambda g: oracle.sgd(g, 0.9)),
    "SGD, nesterov": (lambda p: optim.SGD(p, 0.01, momentum=0.8, nesterov=True), lambda g: oracle.sgd(g, 0.8)),
    "SGD, dampened": (lambda p: optim.SGD(p, 0.01, momentum=0.9, dampening=0.5), lambda g: oracle.sgd(g, 0.9, 0.5)),
    "RMSprop": (lambda p: optim.RMSprop(p, 0.01, momentum=0.9), lambda g: oracle.rmsprop(g, 0.99, 0.9, 1e-8, False)),
    "RMSprop, centered": (
        lambda p: optim.RMSprop(p, 0.01, alpha=0.8, momentum=0.7, centered=True),
        lambda g: oracle.rmsprop(g, 0.8, 0.7, 1e-8, True),
    ),
}


def drawn(dtype=torch.float64):
    """Parameters, and the gradients of each step: None for "late" until step 3, and always for "unused"."""
    draw = np.random.default_rng(5)
    parameters = {name: Parameter(torch.tensor(draw.normal(size=s), dtype=dtype)) for name, s in SHAPES.items()}
    steps = []
    for t in range(1, STEPS + 1):
        gradients = {name: draw.normal(loc=0.3, size=shape) for name, shape in SHAPES.items()}
        steps.append(gradients | {"unused": None} | ({"late": None} if t < 3 else {}))
    return parameters, steps


def trained(optimizer, parameters, steps):
    for gradients in steps:
        for name, p in parameters.items():
            p.grad = None if gradients[name] is None else torch.tensor(gradients[name], dtype=p.dtype)
        optimizer.step()


def expected(name, steps, of_element):
    """The oracle, element by element: two arrays of the parameter's shape."""
    shape = SHAPES[name]
    found = np.zeros((2, *shape))
    for index in np.ndindex(*shape):
        gradients = [None if g[name] is None else float(np.asarray(g[name])[index]) for g in steps]
        found[(slice(None), *index)] = of_element(gradients)
    return found


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_the_recorded_gradients(case):
    """Of each element of each parameter; one has gradients from step 3 on, another none at all: zeros."""
    make, of_element = CASES[case]
    parameters, steps = drawn()
    optimizer = make(parameters.values())
    assert momentum.why_unreadable(optimizer, parameters) is None
    trained(optimizer, parameters, steps)
    before = copy.deepcopy(optimizer.state_dict())
    assert momentum.why_unreadable(optimizer, parameters) is None
    found = momentum.moments(optimizer, parameters)
    for name in SHAPES:
        m, update = expected(name, steps, of_element)
        np.testing.assert_allclose(found.momentum[name].numpy(), m, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(found.update[name].numpy(), update, rtol=1e-9, err_msg=name)
        divisor = found.divisor[name].numpy()
        np.testing.assert_allclose(divisor * update, m, rtol=1e-9, atol=1e-300, err_msg=name)
        assert (name == "unused") == (not np.any(m))
        assert np.all(divisor > 0) if name != "unused" or case.startswith("SGD") else not np.any(divisor)
    for tensors in found:  # copies
        for tensor in tensors.values():
            tensor.add_(100.0)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert parameters["unused"] not in optimizer.state


def test_moments_of_groups_are_by_their_own_hyperparameters():
    """Betas and ε of Adam, momentum of SGD."""
    parameters, steps = drawn()
    matrix, *others = parameters.values()
    optimizer = optim.Adam([{"params": [matrix], "betas": (0.5, 0.7), "eps": 0.2}, {"params": others}])
    trained(optimizer, parameters, steps)
    found = momentum.moments(optimizer, parameters)
    for name, (beta1, beta2, eps) in {"matrix": (0.5, 0.7, 0.2), "late": (0.9, 0.999, 1e-8)}.items():
        m, update = expected(name, steps, lambda g, b1=beta1, b2=beta2, e=eps: oracle.adam(g, b1, b2, e))
        np.testing.assert_allclose(found.momentum[name].numpy(), m, rtol=1e-9)
        np.testing.assert_allclose(found.update[name].numpy(), update, rtol=1e-9)

    parameters, steps = drawn()
    matrix, *others = parameters.values()
    optimizer = optim.SGD([{"params": others, "momentum": 0.5}, {"params": [matrix]}], 0.01, momentum=0.9)
    trained(optimizer, parameters, steps)
    found = momentum.moments(optimizer, parameters)
    for name, mu in {"matrix": 0.9, "late": 0.5}.items():
        m, update = expected(name, steps, lambda g, mu=mu: oracle.sgd(g, mu))
        np.testing.assert_allclose(found.momentum[name].numpy(), m, rtol=1e-9)
        np.testing.assert_allclose(found.update[name].numpy(), update, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_moments_are_float32_or_wider(dtype):
    """The state of narrow parameters is as narrow as they are: it is widened before it is divided and rooted."""
    parameters, steps = drawn(dtype)
    optimizer = optim.Adam(parameters.values(), 0.01)
    trained(optimizer, parameters, steps)
    found = momentum.moments(optimizer, parameters)
    for named in found:
        assert {t.dtype for t in named.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    state = optimizer.state[parameters["matrix"]]
    m = state["exp_avg"].double() / (1 - 0.9**STEPS)
    update = m / ((state["exp_avg_sq"].double() / (1 - 0.999**STEPS)).sqrt() + 1e-8)
    np.testing.assert_allclose(found.update["matrix"].double(), update, rtol=1e-12 if dtype == torch.float64 else 1e-6)


def test_elements_that_never_moved_have_no_update_without_eps():
    """0/0 is 0, not NaN."""
    p = Parameter(torch.ones(2))
    optimizer = optim.Adam([p], eps=0.0)
    p.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    assert momentum.moments(optimizer, {"p": p}).update["p"].tolist() == [0.0, 1.0]


def test_state_of_a_fused_step_that_did_not_count_is_no_state():
    """A fused optimizer makes its state in a step that a loss scaler has it leave out: the count is 0."""
    p = Parameter(torch.ones(3))
    optimizer = optim.Adam([p], fused=True)
    p.grad = torch.full((3,), float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 0.0
    assert [t["p"].tolist() for t in momentum.moments(optimizer, {"p": p})] == [[0.0] * 3] * 3


def test_sparse_momentum_is_read_as_a_dense_one():
    """Of an embedding with sparse gradients; rows that did not occur have none."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = optim.SGD(table.parameters(), 0.1, momentum=0.9)
    for rows in ([0, 3], [3, 3]):
        optimizer.zero_grad()
        table(torch.tensor(rows)).sum().backward()
        optimizer.step()
    assert optimizer.state[table.weight]["momentum_buffer"].is_sparse
    found = momentum.moments(optimizer, {"w": table.weight})
    np.testing.assert_allclose(found.update["w"][:, 0], [0.9, 0.0, 0.0, 2.9, 0.0], rtol=1e-6)


class Custom(optim.Optimizer):
    """Leaves a given state after its step."""

    def __init__(self, parameters, state, **defaults):
        super().__init__(parameters, defaults)
        self.left = state

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.left(p)


def test_mean_alone_is_its_own_update():
    """As of Lion, whose step is a sign: the order of the means. A count in the group is not one of a corrected mean."""
    p = Parameter(torch.tensor([3.0, -1.0]))
    optimizer = Custom([p], lambda p: {"exp_avg": p.detach() / 2}, betas=(0.9, 0.99), step=1)
    optimizer.step()
    assert momentum.why_unreadable(optimizer, {"p": p}) is None
    found = momentum.moments(optimizer, {"p": p})
    assert found.momentum["p"].tolist() == found.update["p"].tolist() == [1.5, -0.5]


def test_count_of_steps_may_be_that_of_the_group():
    """As libraries keep it."""
    p = Parameter(torch.tensor([3.0, -1.0]))
    state = {"exp_avg": torch.tensor([0.1, -0.2]), "exp_avg_sq": torch.tensor([0.001, 0.009])}
    optimizer = Custom([p], lambda p: state, betas=(0.9, 0.999), eps=0.0, step=1)
    optimizer.step()
    found = momentum.moments(optimizer, {"p": p})
    np.testing.assert_allclose(found.momentum["p"], [1.0, -2.0], rtol=1e-6)
    np.testing.assert_allclose(found.update["p"], [1.0, -2 / 3], rtol=1e-6)


class Quantized(torch.Tensor):
    """As of a library of narrow states."""


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (lambda p: {"state1": torch.zeros(4), "step": torch.tensor(1.0)}, "keeps state1, step, and not `exp_avg`"),
        (lambda p: {"momentum_buffer": torch.zeros(2, 2)}, "keeps momentum_buffer, and not"),
        (lambda p: {"exp_avg": torch.zeros(4), "exp_avg_var": torch.zeros(4)}, "keeps exp_avg_var, whose part in a s"),
        (lambda p: {"exp_avg": torch.zeros(4), "Q": [torch.eye(4)]}, "keeps Q, whose part in a step"),
        (lambda p: {"exp_avg": torch.zeros(4, dtype=torch.uint8)}, r"keeps its state as torch\.uint8"),
        (lambda p: {"exp_avg": torch.zeros(4).as_subclass(Quantized)}, "keeps its state as Quantized"),
    ],
    ids=["other names", "other shape", "other statistics", "lists", "integers", "subclass"],
)
def test_state_of_another_meaning_is_refused(state, text):
    """Once it is there; before, nothing tells."""
    p = Parameter(torch.ones(4))
    optimizer = Custom([p], state)
    assert momentum.why_unreadable(optimizer, {"p": p}) is None
    assert not momentum.has_state(optimizer, {"p": p})
    optimizer.step()
    assert momentum.has_state(optimizer, {"p": p})
    assert re.search(rf"{text}.*\(p\)", momentum.why_unreadable(optimizer, {"p": p}))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: optim.SGD(p, 0.1), "remembers no gradient but the last with `momentum=0`, as b, a has it"),
        (lambda p: optim.RMSprop(p, 0.1), "`momentum=0`"),
        (lambda p: optim.Adam(p, betas=(0.0, 0.9)), r"`betas\[0\]=0`"),
        (lambda p: optim.Adagrad(p), "keeps no running mean"),
        (lambda p: optim.Rprop(p), "keeps no running mean"),
        (lambda p: optim.SGD([{"params": p[:1], "momentum": 0.9}, {"params": p[1:]}], 0.1), "as a has it"),
    ],
)
def test_optimizer_without_a_memory_is_refused_before_its_first_step(make, text):
    """By its class, or by the hyper-parameters of a group that has one of the parameters."""
    named = {"b": Parameter(torch.ones(2)), "a": Parameter(torch.ones(3))}
    optimizer = make([*named.values()])
    assert re.search(text, momentum.why_unreadable(optimizer, named))
    if "as a has" in text:  # what is not eligible may have none
        assert momentum.why_unreadable(optimizer, {"b": named["b"]}) is None


def test_momentum_that_was_switched_off_is_refused():
    """The buffer stays, and the optimizer does not use it any more."""
    p = Parameter(torch.ones(2))
    optimizer = optim.SGD([p], 0.1, momentum=0.9)
    p.grad = torch.ones(2)
    optimizer.step()
    assert momentum.why_unreadable(optimizer, {"p": p}) is None
    optimizer.param_groups[0]["momentum"] = 0.0
    assert "`momentum=0`" in momentum.why_unreadable(optimizer, {"p": p})


def test_learning_rates_are_those_of_the_groups_and_1_without_any():
    """Numbers, tensors, and classes of other libraries that choose their steps themselves."""
    a, b, c = (Parameter(torch.ones(1)) for _ in range(3))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "lr": torch.tensor(0.25)}, {"params": [c], "lr": None}]
    optimizer = Custom(groups, lambda p: {})
    groups = momentum.group_indices(optimizer, {"a": a, "b": b, "c": c})
    assert momentum.learning_rates(optimizer, groups) == {"a": 0.5, "b": 0.25, "c": 1.0}
