"""Applied, taken back, swapped: the bits are those of the trained model, of the base, of the other trained model."""

import copy
import threading

import pytest
import torch
from torch import nn

from lightning_gcfreeze import delta
from tests.delta.bag import Bag, contents, fail_at_the_third_write, masks, train_


def other_masks():
    """Of other places, some of them the same."""
    return {name: mask.flatten().flip(0).view(mask.shape) for name, mask in masks().items()}


def tuned(frozen, seed):
    """A trained Bag and its delta."""
    model = train_(Bag(), frozen)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            live = ~frozen.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
            tensor.copy_(torch.where(live, torch.full_like(tensor, seed), tensor))
    model.cache = Bag().cache
    return model, delta.of(model, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_apply_and_revert(dtype):
    """The bits of the base come back, NaN and -0.0 among what was applied; memory formats stay."""
    trained = train_(Bag(dtype), masks())
    found = delta.of(trained, masks())
    model = Bag(dtype)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    undo = delta.apply(model, found)
    assert contents(model) == contents(trained) != contents(Bag(dtype))
    delta.revert(model, undo)
    assert contents(model) == contents(Bag(dtype))
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


def test_an_undo_is_a_delta(tmp_path):
    """Saved, loaded and looked at like any other."""
    model = Bag()
    delta.save(delta.apply(model, tuned(masks(), 1.0)[1]), tmp_path / "undo")
    delta.revert(model, tmp_path / "undo")
    assert contents(model) == contents(Bag())
    assert delta.inspect(tmp_path / "undo").live == delta.inspect(tuned(masks(), 1.0)[1]).live


def test_an_undo_is_a_copy():
    """Of tensors that are stored as a whole, too."""
    model = Bag()
    undo = delta.apply(model, tuned(masks(), 1.0)[1])
    with torch.no_grad():
        model.live.add_(1)
    delta.revert(model, undo)
    assert contents(model) == contents(Bag())


@pytest.mark.parametrize("second", [masks, other_masks], ids=["same places", "other places"])
def test_swaps(second):
    """There and back a hundred times, and each time the one model or the other; at the end the base."""
    models = [tuned(masks(), 1.0), tuned(second(), 2.0)]
    model, base = Bag(), contents(Bag())
    undo = delta.apply(model, models[0][1])
    for i in range(1, 100):
        undo = delta.swap(model, undo, models[i % 2][1])
        assert contents(model) == contents(models[i % 2][0]) != base
    delta.revert(model, undo)
    assert contents(model) == base


def test_a_swap_that_does_not_fit_leaves_what_was_there():
    """Of another base, of other shapes; and the old one can still be taken back."""
    first, found = tuned(masks(), 1.0)
    other = Bag()
    with torch.no_grad():
        other.matrix.mul_(2)
    model = Bag()
    undo = delta.apply(model, found)
    wrong_base = delta.of(other, {name: torch.ones_like(mask) for name, mask in masks().items()})
    for wrong, error in ((wrong_base, delta.WrongBaseError), ({**found, "vector:values": torch.ones(1)}, ValueError)):
        with pytest.raises(error):
            delta.swap(model, undo, wrong)
        assert contents(model) == contents(first)
    delta.revert(model, undo)
    assert contents(model) == contents(Bag())


def test_a_write_that_fails_half_way_is_taken_back(monkeypatch):
    """Out of memory at the third tensor: the model has the bits that it had."""
    model, found, calls = Bag(), tuned(masks(), 1.0)[1], fail_at_the_third_write(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        delta.apply(model, found)
    assert len(calls) > 3
    assert contents(model) == contents(Bag())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=str)
def test_in_any_mode_of_autograd(context):
    """A model made in inference mode, or one that trains, called in any mode."""
    with context():
        model = Bag()
        undo = delta.apply(model, tuned(masks(), 1.0)[1])
        assert contents(model) == contents(tuned(masks(), 1.0)[0])
    delta.revert(model, undo)
    assert contents(model) == contents(Bag())


def test_the_optimizer_and_autograd_go_on():
    """Parameters stay the same objects, leaves that require a gradient."""
    model = nn.Linear(4, 3)
    frozen = {"weight": torch.arange(12).view(3, 4) % 3 > 0}
    tuned_ = copy.deepcopy(model)
    with torch.no_grad():
        tuned_.weight.add_((~frozen["weight"]).float())
    weight = model.weight
    delta.apply(model, delta.of(tuned_, frozen))
    assert model.weight is weight
    assert weight.is_leaf
    model(torch.ones(2, 4)).sum().backward()
    assert weight.grad is not None


def test_a_fingerprint_is_that_of_the_oracle():
    """SHA-256 over the state dict, by hand; a module, its state dict and a copy agree, one bit more does not."""
    import hashlib

    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    by_hand = hashlib.sha256()
    for name in sorted(model.state_dict()):
        array = model.state_dict()[name].numpy()
        by_hand.update(f"{name} {array.dtype} {array.shape}\n".encode())
        by_hand.update(array.tobytes())
    assert delta.fingerprint(model) == by_hand.hexdigest() == delta.fingerprint(model.state_dict())
    assert delta.fingerprint(copy.deepcopy(model)) == by_hand.hexdigest()
    with torch.no_grad():
        model[0].bias[0] = -model[0].bias[0]
    assert delta.fingerprint(model) != by_hand.hexdigest()


def test_two_threads_may_apply_to_two_modules():
    """Nothing is shared but what is passed."""
    found = tuned(masks(), 1.0)[1]
    models = [Bag() for _ in range(4)]
    threads = [threading.Thread(target=delta.apply, args=(model, found)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(contents(model) == contents(tuned(masks(), 1.0)[0]) for model in models)
