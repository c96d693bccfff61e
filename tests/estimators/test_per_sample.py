"""Squared noise of every form of single samples' gradients against a loop; what rounding, chunks and gates do to it."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_gcfreeze.estimators import outer_products, per_sample
from lightning_gcfreeze.estimators.outer_products import OuterProducts
from lightning_gcfreeze.estimators.per_sample import Lookups, Stacked, Summed, one_by_one
from lightning_gcfreeze.estimators.scratch import scratch

M = 6


def drawn(*shape, mean=0.0, dtype=torch.float64):
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)


def stacked():
    values = drawn(M, 3, 2)
    return Stacked(values), values


def products(groups=1, positions=1, rows=3, columns=4, mean=0.0, dtype=torch.float64):
    delta, x = drawn(M, groups, positions, rows, mean=mean), drawn(M, groups, positions, columns, mean=mean)
    delta, x = delta.to(dtype), x.to(dtype)
    shape = torch.Size((groups * rows, columns))
    written_out = torch.einsum("mglr,mglc->mgrc", delta.double(), x.double()).reshape(M, *shape)
    return OuterProducts(delta, x, shape), written_out


def lookups(places=5):
    index, delta = torch.randint(0, 4, (M, places)), drawn(M, places, 3)
    written_out = torch.zeros(M, 7, 3, dtype=torch.float64)
    for j in range(M):
        for row, d in zip(index[j], delta[j], strict=True):
            written_out[j, row] += d
    return Lookups(index, delta, 7), written_out


FORMS = {
    "stacked": stacked,
    "products": products,
    "of several positions": lambda: products(positions=3),
    "of many positions": lambda: products(positions=9),
    "in groups": lambda: products(groups=2, positions=2),
    "lookups": lookups,
    "lookups of one place": lambda: lookups(1),
}


def squares(written_out, g_batch):
    return sum((g - g_batch) ** 2 for g in written_out)


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("name", FORMS)
def test_squared_noise_equals_a_loop_for_any_chunk_size(name, chunk, monkeypatch):
    """Scaled, on top of what there is, around any g_S."""
    torch.manual_seed(0)
    for module in (per_sample, outer_products):
        monkeypatch.setattr(module, "CHUNK_NUMEL", chunk)
    g, written_out = FORMS[name]()
    g_batch, before = drawn(*written_out.shape[1:]), drawn(*written_out.shape[1:]).abs()
    g.scale_(3.0)
    g.scale_(0.5)
    out = before.clone()
    g.add_squared_noise_(out, g_batch, 0.7)
    assert_close(out, before + 0.7 * squares(1.5 * written_out, g_batch), rtol=1e-11, atol=1e-11)
    assert_close(g.dense(2), 1.5 * written_out[:2], rtol=1e-11, atol=1e-11)
    assert g.count == len(g.dense()) == M


@pytest.mark.parametrize("name", FORMS)
def test_squared_noise_around_a_known_mean(name):
    torch.manual_seed(0)
    g, written_out = FORMS[name]()
    out = torch.zeros(written_out.shape[1:], dtype=torch.float64)
    g.add_squared_noise_(out, written_out.mean(0), 1.0, mean_is_g_batch=True)
    assert_close(out, M * written_out.var(0, correction=0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
def test_valid_flag_adds_everything_or_nothing(name):
    """Also what is not a number; the host is not asked."""
    torch.manual_seed(0)
    g, written_out = FORMS[name]()
    g_batch, out = drawn(*written_out.shape[1:]), torch.zeros(written_out.shape[1:], dtype=torch.float64)
    g.add_squared_noise_(out, torch.full_like(g_batch, torch.nan), 1.0, valid=torch.tensor(False))
    assert not out.any()
    g.add_squared_noise_(out, g_batch, 1.0, valid=torch.tensor(True))
    assert_close(out, squares(written_out, g_batch), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("positions", [1, 2, 4, 9])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_large_mean_gradient_does_not_cancel_the_noise(mean, positions):
    """In float32, δ and x of 1000 ± 1: the mean of squares minus the squared mean has no correct digit left."""
    torch.manual_seed(0)
    g, written_out = products(positions=positions, mean=mean, dtype=torch.float32)
    g_batch = written_out.mean(0)
    expected, out = squares(written_out, g_batch), torch.zeros(3, 4)
    g.add_squared_noise_(out, g_batch.float(), 1.0, mean_is_g_batch=True)
    single = written_out.float()
    naive = single.square().sum(0) - M * single.mean(0).square()
    error = ((out - expected) / expected).abs().max()
    assert error < 1e-3
    if mean == 1000.0:
        assert ((naive - expected) / expected).abs().max() > 10 * error


def test_constant_position_beside_a_noisy_one_keeps_its_digits():
    """The first of two carries nearly the whole gradient; it is 100 in each sample, as a token that begins all is."""
    torch.manual_seed(0)
    delta, x = drawn(32, 1, 2, 3) * 1e-3, drawn(32, 1, 2, 4) * 40
    delta[:, :, 0], x[:, :, 0] = 1.0, 100.0
    written_out = torch.einsum("mglr,mglc->mrc", delta, x)
    g_batch, out = written_out.mean(0), torch.zeros(3, 4)
    g = OuterProducts(delta.float(), x.float(), torch.Size((3, 4)))
    g.add_squared_noise_(out, g_batch.float(), 1.0, mean_is_g_batch=True)
    assert_close(out.double(), squares(written_out, g_batch), rtol=1e-2, atol=0.0)


def test_scratch_memory_is_per_thread_and_reused():
    like, found = torch.zeros(1), []
    thread = threading.Thread(target=lambda: found.append(scratch("noise", (50_000,), like)))
    thread.start()
    thread.join()
    mine = scratch("noise", (50_000,), like)
    assert mine.data_ptr() != found[0].data_ptr()
    assert mine.data_ptr() == scratch("noise", (40_000,), like).data_ptr()


def test_dead_units_and_inputs_keep_the_fast_path_and_have_no_noise(monkeypatch):
    """Columns of zeros among noisy ones: still one matrix product, and exact zeros."""
    torch.manual_seed(0)
    delta, x = drawn(M, 1, 1, 3, dtype=torch.float32), drawn(M, 1, 1, 4, dtype=torch.float32)
    delta[..., 1], x[..., 2] = 0.0, 0.0
    g, out = OuterProducts(delta, x, torch.Size((3, 4))), torch.zeros(3, 4)
    monkeypatch.setattr(torch, "matmul", lambda *_, **__: pytest.fail("written out"))
    g.add_squared_noise_(out, (delta[:, 0, 0, :, None] * x[:, 0]).mean(0), 1.0, mean_is_g_batch=True)
    zeros = torch.zeros(3, 4, dtype=torch.bool)
    zeros[1], zeros[:, 2] = True, True
    assert torch.equal(out == 0, zeros)


@given(places=st.integers(1, 6), rows=st.integers(1, 5), samples=st.integers(1, 4))
def test_lookups_of_any_shape_equal_a_loop(places, rows, samples):
    torch.manual_seed(0)
    index, delta = torch.randint(0, rows, (samples, places)), drawn(samples, places, 2)
    written_out = torch.zeros(samples, rows, 2, dtype=torch.float64)
    for j in range(samples):
        written_out[j].index_add_(0, index[j], delta[j])
    g_batch, out = drawn(rows, 2), torch.zeros(rows, 2, dtype=torch.float64)
    Lookups(index, delta, rows).add_squared_noise_(out, g_batch, 1.0)
    assert_close(out, squares(written_out, g_batch), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["stacked", "products", "lookups"])
def test_half_precision_gradients_are_squared_in_the_dtype_of_the_sum(name, dtype):
    """What enters is rounded; differences, squares and sums are not."""
    torch.manual_seed(0)
    g, _ = FORMS[name]()
    for attribute in ("_values", "_delta", "_x"):
        if hasattr(g, attribute):
            setattr(g, attribute, getattr(g, attribute).to(dtype))
    written_out = g.dense()
    assert written_out.dtype == torch.float32
    g_batch = written_out.mean(0).to(dtype)
    out = torch.zeros(written_out.shape[1:])
    g.add_squared_noise_(out, g_batch, 1.0)
    assert_close(out, squares(written_out, g_batch.float()), rtol=1e-5, atol=1e-5)


def test_one_by_one_keeps_gradients_or_sums_their_noise():
    """A name that one of them lacks is left out."""
    torch.manual_seed(0)
    values = drawn(M, 3, 2)
    g_batch = {"w": drawn(3, 2), "lacking": drawn(2)}

    def samples():
        for i, g in enumerate(values):
            yield {"w": g} if i == 3 else {"w": g, "lacking": g[0]}

    kept, added = (one_by_one(samples(), g_batch, keep_each) for keep_each in (True, False))
    assert kept.keys() == added.keys() == {"w"}
    assert_close(kept["w"].dense(), values)
    for found in (kept["w"], added["w"]):
        out = torch.zeros(3, 2, dtype=torch.float64)
        found.add_squared_noise_(out, g_batch["w"], 2.0)
        assert found.count == M
        assert_close(out, 2 * squares(values, g_batch["w"]))
        assert found.finiteness_probe() is not None
    assert isinstance(added["w"], Summed)
