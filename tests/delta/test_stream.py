"""A training publishes, a follower applies: at each update the follower's module is the training's, to the bit."""

import copy
import os
import shutil

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gcfreeze import Freezer, FreezeSchedule, GradCovFreezeCallback, delta
from tests import cases
from tests.delta.bag import contents


class Keep(pl.Callback):
    """The state dict after each optimizer step, and at the freeze."""

    def __init__(self):
        self.states = {}

    def on_train_start(self, trainer, pl_module):
        self.states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


def masks():
    torch.manual_seed(5)
    return {f"network.{n}": torch.rand(p.shape) < 0.8 for n, p in cases.convnet().named_parameters() if "weight" in n}


def fit(folder, every=3, steps=10, module=None, ckpt_path=None, **arguments):
    """A fit that streams; return what was kept of it, and the module."""
    arguments = arguments or {"masks": masks()}
    freeze = GradCovFreezeCallback(**arguments, stream=delta.Stream(folder, every=every))
    keep, module = Keep(), module or cases.Regression(cases.convnet())
    trainer = cases.trainer(callbacks=[freeze, keep], max_steps=steps, max_epochs=-1)
    trainer.fit(module, cases.loader(), ckpt_path=ckpt_path)
    return keep.states, module, freeze, trainer


def bits(state):
    return {name: tensor.flatten().view(torch.uint8).tolist() for name, tensor in state.items()}


def follow(folder, base):
    module = cases.Regression(cases.convnet())
    module.load_state_dict(base)
    return delta.Follower(module, folder)


def of_stream(follower):
    with follower.tenants.use(follower.name) as module:
        return bits(module.state_dict())


def test_every_update_is_the_training_at_its_step(tmp_path):
    """From the first step on, each third, and the last; all but the first without places."""
    states, module, _, _ = fit(tmp_path / "all")
    names = sorted(os.listdir(tmp_path / "all"))
    assert names == ["000000000000-whole.safetensors"] + [f"{i:012d}-values.safetensors" for i in range(1, 5)]
    follower = follow(tmp_path / "some", states[0])
    assert (follower.poll(), follower.number, follower.step) == (0, None, None)
    (tmp_path / "some").mkdir()
    steps = []
    for name in names:  # as they come
        shutil.copy(tmp_path / "all" / name, tmp_path / "some")
        assert follower.poll() == 1
        assert of_stream(follower) == bits(states[follower.step])
        steps.append(follower.step)
    assert steps == [0, 3, 6, 9, 10]
    assert bits(states[0]) != bits(states[10]) == bits(module.state_dict())
    assert follower.poll() == 0
    late = follow(tmp_path / "all", states[0])
    assert late.poll() == 2  # the places and the newest
    assert of_stream(late) == bits(states[10])
    assert late.digest == follower.digest
    assert follower.tenants.verify() == follower.tenants.base == delta.fingerprint(follow(".", states[0]).tenants.model)


def test_a_stream_that_begins_at_t0(tmp_path):
    """Its base are the weights of that step, which the first update names."""
    states, _, _, _ = fit(tmp_path, t0=4, k=0.9)
    follower = follow(tmp_path, states[4])
    assert delta.inspect(tmp_path / "000000000000-whole.safetensors").base == follower.tenants.base
    follower.poll()
    assert follower.step == 10
    assert of_stream(follower) == bits(states[10])
    with pytest.raises(delta.WrongBaseError):
        follow(tmp_path, states[3]).poll()


@pytest.mark.filterwarnings("ignore:.*never had a gradient")
@pytest.mark.parametrize(
    "schedule",
    [
        FreezeSchedule([(2, 0.3), (5, 0.6), (8, 0.9)]),
        FreezeSchedule([(2, 0.9), (5, 0.5), (8, 0.7)], monotone=False),
    ],
    ids=["more and more", "some thaw"],
)
def test_masks_that_change(schedule, tmp_path):
    """A follower that has the weights of the first freeze has the training at each update."""
    states, _, _, _ = fit(tmp_path, every=2, schedule=schedule)
    follower = follow(tmp_path, states[2])
    follower.poll()
    assert of_stream(follower) == bits(states[10])
    for number, kind in delta.stream.Folder(tmp_path).updates().items():
        found = delta.stream.Folder(tmp_path).read(number, kind)
        follower = follow(tmp_path, states[2])
        if kind == "whole":
            delta.apply(follower.tenants.model, found)
            assert contents(follower.tenants.model) == contents_of(states[delta.inspect(found).step])


def contents_of(state):
    module = cases.Regression(cases.convnet())
    module.load_state_dict(state)
    return contents(module)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_run_goes_on_with_the_stream(tmp_path):
    """From a checkpoint, a step behind what was published: numbers and digests go on, and the follower with them."""
    states, _, _, trainer = fit(tmp_path / "stream", steps=7)
    trainer.save_checkpoint(tmp_path / "ckpt")
    follower = follow(tmp_path / "stream", states[0])
    follower.poll()
    assert (follower.number, follower.step) == (3, 7)
    later, _, _, _ = fit(tmp_path / "stream", steps=12, ckpt_path=tmp_path / "ckpt")
    assert follower.poll() == 3  # at once, and at steps 9 and 12
    assert of_stream(follower) == bits(later[12]) != bits(states[7])
    updates = delta.stream.Folder(tmp_path / "stream").updates()
    assert list(updates.values()) == ["whole"] + ["values"] * (len(updates) - 1)


def test_a_new_run_goes_on_from_what_was_published_and_one_from_another_base_is_refused(tmp_path):
    """From the last run's end, with other masks: the places of both are published. Another base is no continuation."""
    states, _, _, _ = fit(tmp_path)
    other = {name: mask.flip(0) for name, mask in masks().items()}
    module = cases.Regression(cases.convnet())
    module.load_state_dict(states[10])
    follower = follow(tmp_path, states[0])
    follower.poll()
    later, _, _, _ = fit(tmp_path, module=module, masks=other)
    follower.poll()
    assert of_stream(follower) == bits(later[10]) != bits(states[10])
    module = cases.Regression(cases.convnet())
    with torch.no_grad():
        module.network[1].weight.add_(1)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(delta.WrongBaseError):
        fit(tmp_path, module=module)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_update_that_cannot_be_written_is_made_up_for(tmp_path, monkeypatch):
    """Training goes on with a warning; at its end it is an error."""
    folder, failing = delta.stream.Folder, []
    write = folder.write

    def fail(self, number, kind, data):
        if failing:
            raise OSError(28, "No space left on device")
        write(self, number, kind, data)

    monkeypatch.setattr(folder, "write", fail)

    class Fill(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            failing[:] = [1] if trainer.global_step in (4, 5) else []

    freeze = GradCovFreezeCallback(masks=masks(), stream=delta.Stream(tmp_path, every=3))
    keep, module = Keep(), cases.Regression(cases.convnet())
    with pytest.warns(UserWarning, match=r"update 2 of the stream could not be written .*No space left"):
        cases.trainer(callbacks=[Fill(), freeze, keep], max_steps=10, max_epochs=-1).fit(module, cases.loader())
    follower = follow(tmp_path, keep.states[0])
    follower.poll()
    assert (follower.number, of_stream(follower)) == (3, bits(keep.states[10]))
    failing[:] = [1]
    freeze = GradCovFreezeCallback(masks=masks(), stream=delta.Stream(tmp_path / "new"))
    with pytest.warns(UserWarning, match="could not be written"), pytest.raises(OSError, match="No space"):
        cases.trainer(callbacks=[freeze], max_steps=3, max_epochs=-1).fit(
            cases.Regression(cases.convnet()), cases.loader()
        )


def test_a_loop_of_ones_own(tmp_path):
    """The `Freezer` streams as the callback does; closing it publishes the last step."""
    model = cases.mlp()
    base = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    freezer = Freezer(
        model, optimizer, masks={"0.weight": torch.rand(8, 5) < 0.9}, stream=delta.Stream(tmp_path, every=4)
    )
    for x, y in [*cases.loader()][:6]:
        freezer.begin_batch((x, y))
        freezer.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    follower = delta.Follower(copy.deepcopy(base), tmp_path)
    follower.poll()
    assert follower.step == 4
    freezer.close()
    follower.poll()
    assert follower.step == 6
    with follower.tenants.use("stream") as served:
        assert contents(served) == contents(model) != contents(base)


def test_an_object_store(tmp_path):
    """Any address that fsspec knows."""
    states, _, _, _ = fit("memory://bucket/run")
    try:
        follower = follow("memory://bucket/run", states[0])
        assert follower.poll() == 2
        assert of_stream(follower) == bits(states[10])
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_old_updates_are_removed_where_that_is_wished(tmp_path):
    """The places stay, and a follower that was away jumps to what there is."""
    states, _, _, _ = fit(tmp_path / "all", every=1)
    follower = follow(tmp_path / "few", states[0])
    freeze = GradCovFreezeCallback(masks=masks(), stream=delta.Stream(tmp_path / "few", every=1, keep=2))
    cases.trainer(callbacks=[freeze], max_steps=4, max_epochs=-1).fit(cases.Regression(cases.convnet()), cases.loader())
    follower.poll()
    assert sorted(delta.stream.Folder(tmp_path / "few").updates()) == [0, 3, 4]
    freeze = GradCovFreezeCallback(masks=masks(), stream=delta.Stream(tmp_path / "few", every=1, keep=2))
    keep = Keep()
    cases.trainer(callbacks=[freeze, keep], max_steps=9, max_epochs=-1).fit(
        cases.Regression(cases.convnet()), cases.loader()
    )
    assert follower.poll() == 2
    assert of_stream(follower) == bits(keep.states[9])


def test_updates_out_of_order_are_refused(tmp_path):
    """Of another run, under another's number, damaged: the follower stays where it is."""
    states, _, _, _ = fit(tmp_path / "one")
    fit(tmp_path / "other", module=cases.Regression(cases.convnet(), lambda p: torch.optim.SGD(p, 0.1)))
    names = sorted(os.listdir(tmp_path / "one"))
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in names[:2]:
        shutil.copy(tmp_path / "one" / name, folder)
    follower = follow(folder, states[0])
    follower.poll()
    before = of_stream(follower)
    shutil.copy(tmp_path / "other" / names[2], folder)
    with pytest.raises(delta.ChainError, match="Update 2 does not follow the update 1 that was applied"):
        follower.poll()
    shutil.copy(tmp_path / "one" / names[3], folder / names[2])
    with pytest.raises(delta.ChainError, match="file of update 2 has update 3"):
        follower.poll()
    (folder / names[2]).write_bytes((tmp_path / "one" / names[2]).read_bytes()[:-9])
    with pytest.raises(delta.CorruptFileError):
        follower.poll()
    assert (of_stream(follower), follower.number) == (before, 1)
    shutil.copy(tmp_path / "one" / names[2], folder)
    assert follower.poll() == 1


def test_two_runs_in_one_folder_are_refused(tmp_path):
    """The second one at once, the first at its next update; what was published before stays."""

    class Other(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                fit(tmp_path, steps=2)

    freeze = GradCovFreezeCallback(masks=masks(), stream=delta.Stream(tmp_path, every=3))
    with pytest.raises(delta.ChainError, match="has update 3, and this run wrote 1 last: another run writes to it"):
        cases.trainer(callbacks=[freeze, Other()], max_steps=10, max_epochs=-1).fit(
            cases.Regression(cases.convnet()), cases.loader()
        )
    assert list(delta.stream.Folder(tmp_path).updates()) == [0, 1, 2, 3]


def test_a_follower_goes_on_where_its_tenant_is(tmp_path):
    """A second one in place of the first, and the same one after its tenant was removed."""
    states, _, _, _ = fit(tmp_path / "all")
    (tmp_path / "some").mkdir()
    first = follow(tmp_path / "some", states[0])
    for name in sorted(os.listdir(tmp_path / "all"))[:3]:
        shutil.copy(tmp_path / "all" / name, tmp_path / "some")
    first.poll()
    second = delta.Follower(first.tenants, tmp_path / "all")
    assert (
        (second.number, second.step, second.digest) == (first.number, first.step, first.digest) == (2, 6, first.digest)
    )
    assert second.poll() == 2
    second.tenants.remove("stream")
    assert second.poll() == 2
    assert of_stream(second) == bits(states[10])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"folder": ""}, "`folder` must be a path or an address, got ''"),
        ({"folder": None}, "`folder` must be a path or an address, got None"),
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"keep": 0}, "`keep` must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(arguments, text):
    with pytest.raises(ValueError, match=text):
        delta.Stream(**{"folder": "folder"} | arguments)


class Counting(nn.Module):
    """A network whose forward pass assigns its buffer anew."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 30), nn.Linear(30, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.last(self.first(x).tanh())


def steps_of(model, freeze, optimizer, count):
    for _ in range(count):
        x = torch.randn(8, 4)
        freeze.begin_batch(x)
        freeze.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    freeze.begin_batch(x)  # ends the last step, which is published


def counting(folder):
    """A loop over `Counting` with masks, whose last layer is not trained at first."""
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.last.requires_grad_(False)
    frozen = {"first.weight": torch.arange(120).view(30, 4) % 4 > 0}
    return model, Freezer(model, optimizer, masks=frozen, stream=delta.Stream(folder, every=2)), optimizer


def test_a_buffer_that_is_assigned_anew(tmp_path):
    model, freeze, optimizer = counting(tmp_path)
    steps_of(model, freeze, optimizer, 4)
    follower = delta.Follower(Counting(), tmp_path)
    follower.poll()
    assert of_stream(follower) == bits(model.state_dict())


def test_parameters_that_are_unfrozen_and_frozen_again(tmp_path):
    """As `BaseFinetuning` does it: the next update has their places, also in a run that goes on with the stream."""
    model, freeze, optimizer = counting(tmp_path)
    follower = delta.Follower(Counting(), tmp_path)
    for requires_grad in (False, True, False):
        model.last.requires_grad_(requires_grad)
        steps_of(model, freeze, optimizer, 4)
        follower.poll()
        assert of_stream(follower) == bits(model.state_dict())
    assert not torch.equal(model.last.weight, Counting().last.weight)
    freeze.close()
    again, freeze, optimizer = counting(tmp_path)
    again.load_state_dict(model.state_dict())
    steps_of(again, freeze, optimizer, 4)
    follower.poll()
    assert of_stream(follower) == bits(again.state_dict())
