"""Fifty of the fuzzer's examples, always the same; `python -m tests.fuzz` tries others."""

import dataclasses
import inspect

import hypothesis
import pytest

from lightning_gcfreeze import GradCovFreezeCallback
from tests import fuzz


@pytest.mark.slow
def test_fifty_random_combinations_of_options_keep_what_is_promised():
    """Frozen bits, live values, and the bits of a resumed run; a failure says the smallest example of its kind."""
    done, failures = fuzz.run(50, seed=None)
    assert not failures, "\n\n".join(f"{f.count} x {kind}\n{f.example!r}\n{f.text}" for kind, f in failures.items())
    assert sum(done.values()) >= 50
    assert done["resumed, as the plain reference"] > 25


FOUND = {
    "state that is not by element is cleared": fuzz.Example(
        {"t0": 4, "k": 0.5, "order": "magnitude"}, optimizer="Muon", precision="64-true"
    ),
    "whole rows of a second moment": fuzz.Example(
        {"t0": 4, "k": 0.5, "order": "magnitude", "granularity": "row"}, optimizer="Adafactor", precision="64-true"
    ),
    "no gradient is left to clip": fuzz.Example(
        {"t0": 4, "k": 1.0, "hold": "restore"}, clip=0.5, clip_algorithm="value"
    ),
    # The eligible gradients are finite and are observed, another one overflows, and the step comes again.
    "a step that is observed and left out comes again after a restart": fuzz.Example(
        {"exclude": "*bias", "t0": 5, "k": 12, "every": 2, "gain": 0.75, "gradients": "replay", "granularity": "row",
         "skip_frozen_gradients": False}, "convnet", "RAdam", True, True, "16-mixed", 2, 0.5, stop=14,
    ),
    "a step that a loss scaler leaves out moves buffers after the last update": fuzz.Example(
        {"include": "network.*", "t0": 6, "k": 0.1, "every": 3, "order": "movement", "samples": 3,
         "lr_after_freeze": 0.1}, "convnet", "RAdam", scheduler=True, precision="16-mixed", stop=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("example", FOUND.values(), ids=FOUND.keys())
@pytest.mark.filterwarnings("ignore")
def test_examples_that_the_fuzzer_has_found_keep_what_is_promised(example):
    """Whatever seed comes next."""
    fuzz.check(example)


def test_fuzzer_draws_every_argument_and_only_valid_ones():
    """An argument that is added to the callback has to be added to the fuzzer, too; all have a stream, none masks."""
    drawn: set[str] = set()

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(fuzz.examples())
    def draw(example: fuzz.Example) -> None:
        GradCovFreezeCallback(**example.arguments)
        drawn.update(example.arguments)

    draw()
    deprecated = {"promote", "max_t0", "max_loss_increase", "monitor"}
    not_drawn = {*deprecated, "optimizer", "masks", "stream"}
    assert drawn == set(inspect.signature(GradCovFreezeCallback).parameters) - not_drawn


@pytest.mark.parametrize("fault", ["frozen", "live", "resume"])
def test_fuzzer_notices_a_planted_fault(monkeypatch, fault):
    """A frozen element that moves, a live one that does not, and a checkpoint without the optimizer's momentum."""
    example = fuzz.Example(
        {"t0": 4, "k": 0.5, "hold": "restore", "order": "random", "seed": 1}, optimizer="SGD momentum"
    )
    assert fuzz.check(example) == "resumed, as the plain reference"
    from lightning_gcfreeze.freezing import Restore

    if fault == "frozen":
        monkeypatch.setattr(Restore, "restore_", lambda self: None)
    elif fault == "live":
        monkeypatch.setattr(Restore, "mask_gradients_", lambda self: [p.grad.zero_() for p, *_ in self._held])
    else:
        monkeypatch.setattr(Restore, "clear_state_", lambda self, optimizer: optimizer.state.clear())
        example = dataclasses.replace(example, stop=3)
    with pytest.raises(AssertionError):
        fuzz.check(example)
