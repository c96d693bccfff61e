"""Continual learning by disjoint masks: bits are compared with NumPy, and the table is read as it is printed."""

import copy

import numpy as np
import pytest

from examples import continual
from examples.turned import setup
from lightning_gcfreeze import delta

TASKS = ["A", "B", "C"]
MASKED = continual.Method("masks", lr=0.008, share=0.2)


@pytest.fixture(scope="module")
def learnt():
    """The base, the network after each task and the live elements, of one epoch each."""
    base, data = setup(continual.TURNS, seed=3, epochs=1)
    return base, *continual.learn(base, data, MASKED, seed=3, epochs=1)


def _bits(network):
    return {name: p.detach().numpy().view(np.uint32).copy() for name, p in network.named_parameters()}


def test_masks_of_tasks_are_disjoint_and_of_the_asked_size(learnt):
    """A fifth is counted among the elements of body and head, of which chance puts some into the head."""
    _, _, live = learnt
    body = {"body.0.weight": (200, 784), "body.0.bias": (200,), "body.2.weight": (100, 200), "body.2.bias": (100,)}
    assert list(live) == TASKS
    for task in TASKS:
        assert {name: mask.shape for name, mask in live[task].items()} == body
        share = sum(int(mask.sum()) for mask in live[task].values()) / sum(np.prod(shape) for shape in body.values())
        assert share == pytest.approx(0.2, abs=0.002)
    for name in body:
        assert np.sum([live[task][name].numpy() for task in TASKS], axis=0).max() == 1


@pytest.mark.parametrize("task", TASKS)
def test_task_changes_its_own_elements_and_head_and_no_other_bit(learnt, task):
    base, stages, live = learnt
    i = TASKS.index(task)
    before, after = _bits(base if i == 0 else stages[TASKS[i - 1]]), _bits(stages[task])
    for name, old in before.items():
        changed = old != after[name]
        if name.startswith("body"):
            own = live[task][name].numpy()
            assert not changed[~own].any()
            assert changed[own].any()
        else:
            assert changed.any() == name.startswith(f"heads.{task}.")


def test_deltas_of_tasks_are_disjoint_and_together_the_last_network(learnt):
    base, stages, live = learnt
    parts = continual.own_deltas(base, stages, live)
    assert not delta.overlap(parts[0], parts[1])
    assert not delta.overlap(parts[0], parts[2])
    assert not delta.overlap(parts[1], parts[2])
    for order in (parts, parts[::-1]):
        network = copy.deepcopy(base)
        delta.apply(network, delta.merge(base, *order))
        expected, got = _bits(stages["C"]), _bits(network)
        assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_delta_of_the_first_task_gives_the_network_after_it(learnt):
    base, stages, live = learnt
    network = copy.deepcopy(base)
    delta.apply(network, delta.pack(continual.own_deltas(base, stages, live)[0]))
    expected, got = _bits(stages["A"]), _bits(network)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)
    assert any((got[name] != old).any() for name, old in _bits(base).items())


def test_check_finds_an_element_of_an_earlier_task_that_moved(learnt):
    base, stages, live = learnt
    parts = continual.own_deltas(base, stages, live)
    own = {task: stages[task] for task in TASKS}
    continual.check(stages, live, own)
    damaged = copy.deepcopy(stages)
    weight = damaged["C"].get_parameter("body.2.weight").detach()
    weight[live["A"]["body.2.weight"]] += 1
    with pytest.raises(AssertionError):
        continual.check(damaged, live, own)
    assert len(parts) == 3


@pytest.mark.slow
def test_quick_run_prints_a_row_for_each_way_of_serving(capsys):
    """A's row does not fall where A has its own delta or adapter; the last network's does, for fine-tuning."""
    continual.main(["--quick"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == [
        "method",
        "rate",
        "served by",
        *(f"{a} after {b}" for a, b in continual.PAIRS),
        "mean",
        "kB a task",
    ]
    by_way = {(row[0], row[2]): dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert len(by_way) == 1 + 3 * 3 + 2
    for (_, way), row in by_way.items():
        if way != "the last network":
            assert row["A after A"] == row["A after B"] == row["A after C"]
            assert row["B after B"] == row["B after C"]
    plain = by_way["fine-tuning", "the last network"]
    assert float(plain["A after C"]) < float(plain["A after A"])
    sizes = {name: float(row["kB a task"]) for (name, _), row in by_way.items()}
    assert sizes["masks, 3 % each"] < sizes["masks, 10 % each"] < sizes["masks, a third each"] < sizes["fine-tuning"]
