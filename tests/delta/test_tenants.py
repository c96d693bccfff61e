"""Many tenants on one module: each answers as a model of its own would, whatever the others do meanwhile."""

import asyncio
import copy
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_gcfreeze import delta
from tests.delta.bag import Bag, contents, fail_at_the_third_write


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 3)).eval()


def tuned(seed, mask_seed=0):
    """A tuned copy of the network, and its delta."""
    generator = torch.Generator().manual_seed(mask_seed)
    model = network()
    frozen = {name: torch.rand(p.shape, generator=generator) < 0.8 for name, p in model.named_parameters()}
    generator.manual_seed(100 + seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            new = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            tensor.copy_(torch.where(frozen.get(name, torch.tensor(False)), tensor, new))
    return model, delta.of(model, frozen)


def served(count, other_places=False):
    """Tenants of the network, and a model for each by name; None is the base."""
    tenants, models = delta.Tenants(network()), {None: network()}
    for i in range(count):
        model, found = tuned(i, mask_seed=i if other_places else 0)
        models[str(i)] = model
        tenants.add(str(i), found)
    return tenants, models


X = torch.linspace(-1, 1, 30).view(5, 6)


@pytest.mark.parametrize("other_places", [False, True])
def test_each_tenant_answers_as_its_own_model(other_places):
    """And the base comes back to the bit after a thousand swaps."""
    tenants, models = served(5, other_places)
    answers = {name: model(X) for name, model in models.items()}
    assert len({answer.sum().item() for answer in answers.values()}) == 6
    draw = random.Random(0)
    for _ in range(1000):
        name = draw.choice(list(models))
        with tenants.use(name) as model:
            assert tenants.current == name
        assert torch.equal(model(X), answers[name])
    assert tenants.verify() == tenants.base == delta.fingerprint(network())
    assert contents(tenants.model) == contents(network())


@pytest.mark.parametrize("other_places", [False, True])
def test_threads_get_their_own_tenants_answers_while_deltas_are_updated(other_places):
    """Eight threads; two more replace, remove and add. Each answer is one that its tenant had at some time."""
    tenants, models = served(4, other_places)
    updates = {str(i): tuned(10 + i, mask_seed=i if other_places else 0) for i in range(4)}
    first = {name: tenants.delta(name) for name in tenants}
    warm = network()  # torch sets a thread's number of threads at its first operation, which rounds in another way
    allowed = {name: [model(X)] + ([updates[name][0](X)] if name in updates else []) for name, model in models.items()}
    wrong, done = [], threading.Event()

    def ask(seed):
        draw = random.Random(seed)
        warm(X)
        for _ in range(150):
            name = draw.choice(list(models))
            with tenants.use(name) as model:
                first = model(X)
                time.sleep(0.0001 * draw.random())
                second = model(X)
            if not torch.equal(first, second) or not any(torch.equal(first, answer) for answer in allowed[name]):
                wrong.append(name)

    def change():
        draw = random.Random(9)
        while not done.is_set():
            name = draw.choice(list(updates))
            tenants.update(name, draw.choice([updates[name][1], first[name]]))
            tenants.add("new", updates[name][1])
            tenants.remove("new")

    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    changer = threading.Thread(target=change)
    for thread in (*askers, changer):
        thread.start()
    for thread in askers:
        thread.join(60)
    done.set()
    changer.join(60)
    assert not any(thread.is_alive() for thread in (*askers, changer))
    assert wrong == []
    assert tenants.verify() == tenants.base == delta.fingerprint(network())


def test_passes_of_one_tenant_run_side_by_side_and_another_waits():
    """In the order of asking: a tenant that waits is not overtaken for ever."""
    tenants, _ = served(2)
    inside, leave, order = threading.Barrier(3), threading.Event(), []

    def hold():
        with tenants.use("0"):
            inside.wait(10)
            leave.wait(10)

    def ask(name):
        with tenants.use(name):
            order.append(name)

    holders = [threading.Thread(target=hold) for _ in range(2)]
    for thread in holders:
        thread.start()
    inside.wait(10)  # both are in it at once
    waiting = []
    for name in ("1", "0"):
        waiting.append(threading.Thread(target=ask, args=(name,)))
        waiting[-1].start()
        time.sleep(0.05)
    assert order == []  # "0" could run, but "1" asked before
    leave.set()
    for thread in (*holders, *waiting):
        thread.join(10)
    assert order == ["1", "0"]


def test_who_waits_for_a_tenant_goes_in_together():
    """One swap serves all who have asked by then, whoever asked between them."""
    tenants, _ = served(2)
    leave, order = threading.Event(), []

    def hold():
        with tenants.use(None):
            leave.wait(10)

    def ask(name):
        with tenants.use(name):
            order.append(name)
            time.sleep(0.02)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    for name in ("0", "1", "0", "1", "0"):
        time.sleep(0.02)
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
    time.sleep(0.05)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["0", "0", "0", "1", "1"]
    assert [tenants.info(name).swaps for name in "01"] == [1, 1]


def test_memory_is_that_of_the_live_places():
    """Values for each tenant; places and the base's values once for all that share them."""
    tenants, _ = served(3)
    info = tenants.info("0")
    frozen = {name: p.numel() for name, p in network().named_parameters()}
    assert info.live < sum(frozen.values()) // 3
    assert info.nbytes <= 8 * info.live
    entries = [tenants._tenants[name].entries for name in tenants]
    assert all(len({id(of[i].indices) for of in entries}) == 1 for i in range(len(entries[0])))


def test_the_base_is_hashed_once_for_tenants_of_the_same_places(monkeypatch):
    """Another base's delta is found out all the same."""
    from lightning_gcfreeze.delta import tenants as module

    hashed, check = [], module.check_unchanged
    monkeypatch.setattr(module, "check_unchanged", lambda entries: (hashed.append(1), check(entries)))
    tenants, _ = served(3)
    assert len(hashed) == 1
    other = network()
    with torch.no_grad():
        other[0].weight.add_(1)
    frozen = {name: torch.arange(p.numel()).view(p.shape) % 5 > 0 for name, p in other.named_parameters()}
    with pytest.raises(delta.WrongBaseError, match=r"0\.weight differ"):
        tenants.add("other", delta.of(other, frozen))
    wrong = {**tuned(7)[1], "0.weight:frozen": torch.zeros(32, dtype=torch.uint8)}
    with pytest.raises(delta.WrongBaseError, match=r"0\.weight differ"):
        tenants.add("other", wrong)
    assert list(tenants) == ["0", "1", "2"]


def test_updates_by_values_alone():
    """For the places that the tenant has; of other places they are refused, and so are old ones."""
    tenants, _ = served(2)
    model, found = tuned(20)
    tenants.update("0", delta.pack(found, mask=found))
    with tenants.use("0") as network_:
        assert torch.equal(network_(X), model(X))
    other = tuned(20, mask_seed=5)[1]
    with pytest.raises(delta.MismatchError, match="`mask` has other names"):
        tenants.update("1", delta.pack(other, mask=other))
    tenants.update("1", {**found, "number": torch.tensor(3)})
    for number in (3, 2):
        with pytest.raises(delta.ChainError, match=f"Update {number} of '1' comes after update 3"):
            tenants.update("1", {**found, "number": torch.tensor(number)})
    tenants.update("1", {**found, "number": torch.tensor(4)})
    assert tenants.info("1").number == 4


def test_a_tenants_delta_can_be_saved_and_given_to_another_server():
    tenants, models = served(2)
    other = delta.Tenants(network())
    other.add("copy", delta.pack(tenants.delta("1")))
    other.add("in memory", tenants.delta("1"))
    other.update("in memory", tenants.delta("1"))
    for name in other:
        with other.use(name) as model:
            assert torch.equal(model(X), models["1"](X))
    model = network()
    delta.apply(model, tenants.delta("1"))
    assert torch.equal(model(X), models["1"](X))


def test_a_delta_is_saved_when_it_is_checked_and_before_it_is_served():
    """If it cannot be saved, or does not fit, the tenant has the one that it had."""
    tenants, models = served(1)
    saved = []

    def save():
        with tenants.use("0") as model:
            saved.append(torch.equal(model(X), models["0"](X)))

    def fail():
        raise OSError(28, "No space left on device")

    for name, put in (("0", tenants.update), ("1", tenants.add)):
        with pytest.raises(OSError, match="No space"):
            put(name, tuned(5)[1], save=fail)
        with pytest.raises(delta.DeltaError):
            put(name, {**tuned(5)[1], "0.weight:values": torch.ones(1)}, save=save)
    assert (saved, list(tenants)) == ([], ["0"])
    with tenants.use("0") as model:
        assert torch.equal(model(X), models["0"](X))
    tenants.update("0", tuned(5)[1], save=save)
    assert saved == [True]
    with tenants.use("0") as model:
        assert torch.equal(model(X), tuned(5)[0](X))


def test_what_cannot_be_served_is_refused_and_the_rest_goes_on():
    """Names, other models, corrupted files; a block within a block; and errors within a block let go."""
    tenants, models = served(2)
    with pytest.raises(ValueError, match="There is a tenant '0' already"):
        tenants.add("0", tuned(0)[1])
    for call in (tenants.remove, tenants.info, tenants.delta, lambda name: tenants.use(name).__enter__()):
        with pytest.raises(KeyError, match=r"no tenant 'x'; there are: 0, 1\."):
            call("x")
    with pytest.raises(KeyError, match="no tenant 'x'"):
        tenants.update("x", tuned(0)[1])
    with pytest.raises(delta.MismatchError):
        tenants.add("bag", delta.of(Bag(), {}))
    spoilt = bytearray(delta.pack(tuned(3)[1]))
    spoilt[-1] ^= 1
    with pytest.raises(delta.CorruptFileError):
        tenants.add("spoilt", bytes(spoilt))
    with tenants.use("0"):
        with tenants.use("0") as model:  # of the same tenant it is no matter
            assert torch.equal(model(X), models["0"](X))
        with pytest.raises(RuntimeError, match="uses '0' and asked for '1'"), tenants.use("1"):
            pass
        for call in (tenants.verify, lambda: tenants.remove("1"), lambda: tenants.add("2", tuned(2)[1])):
            with pytest.raises(RuntimeError, match="This thread uses '0': leave"):
                call()
    with pytest.raises(ZeroDivisionError), tenants.use("0"):
        raise ZeroDivisionError
    assert tenants.verify() == tenants.base


def test_a_swap_that_fails_leaves_the_base(monkeypatch):
    """Out of memory while values are written: the next one who asks gets what he asked for."""
    tenants, models = served(3)
    with tenants.use("0"):
        pass
    fail_at_the_third_write(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError), tenants.use("1"):
        pass
    assert tenants.current is None
    assert contents(tenants.model) == contents(network())
    with tenants.use("2") as model:
        assert torch.equal(model(X), models["2"](X))


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        tenants = delta.Tenants(network())
    tenants.add("0", tuned(0)[1])
    with tenants.use("0") as model, torch.inference_mode():
        assert torch.equal(model(X), tuned(0)[0](X))
    assert tenants.verify() == tenants.base


def test_copies_of_the_module_are_not_served():
    """A copy has the values of its time, and keeps them."""
    tenants, models = served(2)
    with tenants.use("0") as model:
        kept = copy.deepcopy(model)
    with tenants.use("1"):
        assert torch.equal(kept(X), models["0"](X))


def test_a_block_that_is_entered_in_one_thread_and_left_in_another():
    """As where a server streams the parts of an answer, each from another thread of a pool."""
    tenants, models = served(2)

    def parts():
        with tenants.use("0") as model:
            yield model(X)
            yield model(X)

    def answer(name, seconds=0.0):
        with tenants.use(name) as model:
            entered.set()
            time.sleep(seconds)
            return model(X)

    entered = threading.Event()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        open_block = parts()
        assert_close(first.submit(next, open_block).result(), models["0"](X))
        assert len(second.submit(list, open_block).result()) == 1
        assert_close(first.submit(answer, "1").result(), models["1"](X))
        entered.clear()
        slow = first.submit(answer, "0", 0.2)
        entered.wait()
        assert_close(second.submit(answer, "1").result(), models["1"](X))
        assert_close(slow.result(), models["0"](X))


def test_coroutines_of_one_tenant_hold_the_module_each():
    """One that leaves its block lets nobody in while the other one is in."""
    tenants, models = served(2)

    async def wait_within(event):
        with tenants.use("0") as model:
            await event.wait()
            return model(X)

    def other():
        with tenants.use("1") as model:
            return model(X)

    async def main():
        events = asyncio.Event(), asyncio.Event()
        first, second = (asyncio.create_task(wait_within(event)) for event in events)
        await asyncio.sleep(0)
        events[0].set()
        await first
        waiting = asyncio.create_task(asyncio.to_thread(other))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        events[1].set()
        return await second, await waiting

    answers = asyncio.run(main())
    assert_close(answers[0], models["0"](X))
    assert_close(answers[1], models["1"](X))


def test_a_swap_that_is_interrupted_while_it_takes_back(monkeypatch):
    tenants, models = served(2, other_places=True)
    with tenants.use("0"):
        pass
    index_copy_, calls = Tensor.index_copy_, []

    def interrupt(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return index_copy_(self, *args)

    monkeypatch.setattr(Tensor, "index_copy_", interrupt)
    with pytest.raises(KeyboardInterrupt), tenants.use("1"):
        pass
    for name in ("0", "1"):
        with tenants.use(name) as model:
            assert torch.equal(model(X), models[name](X))
    assert tenants.verify() == tenants.base


def test_autocast_sees_the_swap():
    """It keeps copies of the weights in half precision until its block ends."""
    tenants, models = served(2)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("0", "1", None):
            with tenants.use(name) as model:
                assert torch.equal(model(X), models[name](X))
        undo = delta.apply(tenants.model, tuned(0)[1])
        assert torch.equal(tenants.model(X), models["0"](X))
        delta.revert(tenants.model, undo)
        assert torch.equal(tenants.model(X), models[None](X))


def test_places_that_no_tenant_has_any_more_are_forgotten():
    tenants, _ = served(1)
    for i in range(5):
        tenants.update("0", tuned(0, mask_seed=i)[1])
        assert len(tenants._masks) == 1


@pytest.mark.parametrize("name", [None, 1])
def test_a_name_must_be_a_string(name):
    tenants, _ = served(1)
    with pytest.raises(TypeError, match="must be a string"):
        tenants.add(name, tuned(1)[1])
