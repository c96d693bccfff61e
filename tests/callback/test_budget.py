"""`k=Budget(...)`: as few elements freeze as memory or work asks for."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gcfreeze import Budget, Freezer, GradCovFreezeCallback, counting
from lightning_gcfreeze.freezing import blocks
from tests import cases, insides

T0, SAMPLES, WIDTH = 3, 16, 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let blocks of small layers pay."""
    insides.skip_blocks_of_any_size(monkeypatch)


def network():
    return cases.deep_mlp(WIDTH)


N = sum(p.numel() for p in network().parameters())
PLAIN = 3 * 4 * N  # gradient and two moments of Adam


def fit(k, optimizer=torch.optim.Adam, callbacks=(), **arguments):
    callback = GradCovFreezeCallback(**({"t0": T0, "k": k, "order": "movement", "granularity": "mixed"} | arguments))
    module = cases.Regression(network(), lambda p: optimizer(p, lr=0.01))
    data = torch.utils.data.DataLoader(cases.data(SAMPLES * 3), batch_size=SAMPLES)
    cases.trainer(callbacks=[callback, *callbacks], max_epochs=2).fit(module, data)
    return callback


def taken(callback):
    """Bytes of state, gradients and places; Adam's counts of steps have 4 each."""
    return callback.savings.after.state + callback.savings.after.gradients + callback.savings.index_bytes


@pytest.mark.parametrize("granularity", ["element", "mixed", "row"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_budget_of_memory_is_kept_and_used(granularity, share):
    callback = fit(Budget(memory=share * PLAIN), granularity=granularity)
    assert taken(callback) <= share * PLAIN
    # Indices are counted twice, for blocks: 20 bytes an element, of which 16 may be taken.
    assert taken(callback) > (16 / 20 - 0.1) * share * PLAIN


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_nothing_freezes_where_there_is_room_for_all(granularity):
    """Without a freeze there are no indices; Adam's counts take 4 bytes each."""
    callback = fit(Budget(memory=PLAIN + 6 * 4), granularity=granularity)
    assert callback.frozen_fraction == 0.0
    assert callback.phase == "frozen"
    assert fit(Budget(memory=PLAIN - 100), granularity=granularity).frozen_fraction > 0.0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_tensors_freeze_until_the_budget_is_kept(share):
    callback = fit(Budget(memory=share * PLAIN), granularity="tensor")
    assert taken(callback) <= share * PLAIN


def test_loops_that_may_look_at_gradients_keep_all_of_them_within_the_budget():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    freezer = Freezer(model, optimizer, T0, Budget(memory=0.6 * PLAIN), order="movement")
    for x, y in [*torch.utils.data.DataLoader(cases.data(SAMPLES * 3), batch_size=SAMPLES)] * 2:
        freezer.begin_batch((x, y))
        freezer.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert 0.0 < freezer.frozen_fraction < 1.0
    assert taken(freezer) <= 0.6 * PLAIN
    freezer.close()


def test_other_parameters_and_states_count():
    """Only the middle layer may freeze; what the others take leaves less for it."""
    middle = WIDTH * WIDTH
    fixed = 12 * (N - middle)
    callback = fit(Budget(memory=fixed + 0.5 * 12 * middle), include="network.2.weight", granularity="element")
    assert taken(callback) <= fixed + 0.5 * 12 * middle
    assert 0.5 < callback.frozen_fraction < 0.75
    with pytest.raises(ValueError, match=r"Budget\(memory=100.0.*not eligible.*include"):
        fit(Budget(memory=100.0), include="network.2.weight")


@pytest.mark.parametrize("work", [0.1, 0.3, 0.7])
def test_a_budget_of_work_is_kept_and_used(work):
    """Everything in the blocks is live, and so is what costs no work."""
    callback = fit(Budget(work=work))
    products = computed = 0
    for name, mask in callback.frozen.items():
        if name.endswith("weight"):
            live = ~mask
            rows, columns = live.any(1), live.any(0)
            assert torch.equal(live, rows[:, None] & columns)
            computed += int(live.sum())
            products += mask.numel()
        else:
            assert not mask.any()
    assert computed <= work * products
    assert computed > 0.5 * work * products
    saved = callback.savings.weight_gradient_flops_skipped
    assert saved == pytest.approx(1 - computed / products)


def test_of_both_the_narrower_one_decides():
    work = fit(Budget(work=0.3))
    memory = fit(Budget(memory=0.1 * PLAIN))
    assert work.frozen_fraction < memory.frozen_fraction
    both = fit(Budget(memory=0.1 * PLAIN, work=0.3))
    assert taken(both) <= 0.1 * PLAIN
    assert both.savings.weight_gradient_flops_skipped >= 0.7
    slack = fit(Budget(memory=0.9 * PLAIN, work=0.3))
    assert slack.savings.weight_gradient_flops_skipped >= 0.7
    assert slack.frozen_fraction < both.frozen_fraction


class Reads(pl.Callback):
    """Looks at gradients, as code that logs them does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert [p.grad for p in pl_module.parameters()]


@pytest.mark.parametrize("budget", [Budget(memory=0.4 * PLAIN), Budget(work=0.3)])
def test_a_budget_that_is_missed_because_of_other_code_is_warned_of(budget):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(budget, callbacks=[Reads()])
    assert any("is missed" in str(w.message) and "may look at gradients" in str(w.message) for w in seen)


def test_a_budget_of_work_without_large_weights_is_warned_of(monkeypatch):
    monkeypatch.setattr(blocks, "MIN_SAVED_MACS", 2**22)
    with pytest.warns(UserWarning, match="no weight whose gradient can be computed in part"):
        fit(Budget(work=0.3))


@pytest.mark.parametrize("work", [0.8, 0.9])
def test_a_block_that_is_nearly_the_whole_weight_saves_nothing_and_does_not_count(work, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_FRACTION", 0.75)
    callback = fit(Budget(work=work))
    assert 1 - callback.savings.weight_gradient_flops_skipped <= work


def test_what_must_be_live_freezes_where_there_is_no_other_way():
    """An infinite score leaves at no price."""

    def positive(evidence):
        return {name: torch.where(w > 0, torch.inf, w.abs()) for name, w in evidence.weights.items()}

    callback = fit(Budget(work=0.1), order=positive)
    assert 1 - callback.savings.weight_gradient_flops_skipped <= 0.1


def test_the_order_settles_for_what_will_freeze():
    """With a budget of work it is not known before; nothing at all would always be settled."""
    assert counting.least_fraction(Budget(work=0.3), 0, 10) == pytest.approx(0.7)
    assert counting.least_fraction(Budget(memory=1.0, work=0.9), 5, 10) == 0.5
    assert counting.least_fraction(0.4, 4, 10) == 0.4


def test_a_budget_counts_as_an_argument_of_the_run():
    """A run with another budget does not resume it."""
    callback = GradCovFreezeCallback(T0, Budget(work=0.3), granularity="mixed")
    other = GradCovFreezeCallback(T0, Budget(work=0.4), granularity="mixed")
    assert callback._options.decisive() != other._options.decisive()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Budget(), ValueError, "memory.*work"),
        (lambda: Budget(memory=-1), ValueError, "memory"),
        (lambda: Budget(memory="1 GiB"), TypeError, "memory"),
        (lambda: Budget(work=1.0), ValueError, "work"),
        (lambda: GradCovFreezeCallback(3, Budget(work=0.5)), ValueError, "granularity='mixed'"),
        (lambda: GradCovFreezeCallback(3, Budget(memory=5), hold="restore"), ValueError, "hold='restore'"),
    ],
)
def test_wrong_budgets_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
