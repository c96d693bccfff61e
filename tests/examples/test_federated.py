"""Federated averaging: means by NumPy's loops, bits, and the messages between real processes."""

import numpy as np
import pytest
import torch
from torch import nn

from examples import federated
from examples.turned import digits, setup
from lightning_gcfreeze import delta


def test_average_is_the_weighted_mean_of_each_live_element():
    """Sums of Python floats, element by element, rounded to float32 once."""
    torch.manual_seed(0)
    frozen = {"weight": torch.rand(5, 7) < 0.7}
    clients = [nn.Linear(7, 5) for _ in range(3)]
    for client in clients[1:]:
        client.weight.data[frozen["weight"]] = clients[0].weight.data[frozen["weight"]]
    sizes = [10, 200, 31]
    averaged = federated.average([delta.of(client, frozen) for client in clients], sizes)
    network = nn.Linear(7, 5)
    network.load_state_dict(clients[0].state_dict())
    delta.apply(network, averaged)
    for name in ("weight", "bias"):
        values = [client.get_parameter(name).detach().numpy() for client in clients]
        for at in np.ndindex(values[0].shape):
            if name == "weight" and frozen[name][at]:
                expected = values[0][at]
            else:
                expected = np.float32(sum(float(v[at]) * n for v, n in zip(values, sizes, strict=True)) / sum(sizes))
            assert network.get_parameter(name)[at].item() == expected


def test_shares_divide_all_digits_and_give_each_client_classes_of_its_own():
    x, y = digits(seed=0)["train"]
    shares = federated.shares((x, y), seed=0)
    assert sum(len(own) for _, own in shares) == len(y)
    rows = np.concatenate([own.numpy() for own, _ in shares])
    assert np.array_equal(np.sort(rows.sum(axis=1)), np.sort(x.numpy().sum(axis=1)))
    for i, (_, own) in enumerate(shares):
        assert 0.85 < (own.numpy() % 3 == i).mean() < 1


@pytest.mark.slow
def test_clients_in_processes_keep_frozen_bits_and_send_values_alone():
    """Also: a second course on the same clients starts from the base again, and gives the same bits."""
    base, data = setup({federated.TASK: 1}, seed=2, epochs=1)
    clients = federated.started(base, federated.shares(data[federated.TASK]["train"], seed=2), seed=2)
    method = federated.Method("95 %", lr=0.01, k=0.95)
    course, again = (federated.run(base, clients, method, 2, data[federated.TASK]["val"], seed=2) for _ in range(2))
    for connection in clients:
        connection.send(None)

    before = {name: p.detach().numpy() for name, p in base.named_parameters()}
    moved = {name: np.zeros(old.shape, dtype=bool) for name, old in before.items()}
    for state in course.states:
        for name, old in before.items():
            moved[name] |= state[name].numpy().view(np.uint32) != old.view(np.uint32)
    body = [mask for name, mask in moved.items() if name.startswith("body")]
    live = sum(mask.sum() for mask in body) / sum(mask.size for mask in body)
    assert 0.03 < live <= 0.051  # pixels that are always dark have no gradient
    assert moved["heads.turned.weight"].mean() > 0.5

    server, *others = course.states
    assert len(others) == 3
    assert all((server["body.0.weight"] != other["body.0.weight"]).any() for other in others)
    for name, values in server.items():
        assert torch.equal(values, again.states[0][name])

    first, second = course.sent
    assert second == pytest.approx(6 * 4 * (0.05 * 177_100 + 1010), rel=0.05)  # three clients, both ways, float32
    assert second < first  # the places, once to each client
