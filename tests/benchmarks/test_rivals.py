"""Published criteria against explicit loops."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.quality.rivals import RIVALS, calibrate
from lightning_gcfreeze.selection import check_scores, lowest_k


@pytest.fixture
def network():
    torch.manual_seed(0)
    found = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    for p in found.parameters():
        nn.init.normal_(p)  # no weight is 0, as biases are at first
    return found


@pytest.fixture
def calibration(network):
    x, y = torch.randn(300, 2, 4, 4), torch.randint(3, (300,))
    return calibrate(network, F.cross_entropy, x, y, batch_size=128)


def test_calibration_sees_all_samples_and_leaves_no_trace(network):
    x, y = torch.randn(300, 2, 4, 4), torch.randint(3, (300,))
    before = copy.deepcopy(network)
    found = calibrate(network, F.cross_entropy, x, y, batch_size=128)
    assert network.training
    for p, q in zip(before.state_dict().values(), network.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert all(p.grad is None for p in network.parameters())
    before.eval()
    F.cross_entropy(before(x), y).backward()
    inputs = before[:6](x).detach()
    for name, p in before.named_parameters():
        torch.testing.assert_close(found.gradient[name], p.grad, rtol=1e-4, atol=1e-6)
    for i in range(16):
        norm = math.sqrt(sum(float(v) ** 2 for v in inputs[:, i]))
        assert math.isclose(found.input_norms["6.weight"][i], norm, rel_tol=1e-5)
    for channel in range(2):
        norm = math.sqrt(sum(float(v) ** 2 for v in x[:, channel].flatten()))
        assert math.isclose(found.input_norms["0.weight"][channel, 1, 2], norm, rel_tol=1e-5)


@pytest.mark.parametrize("name", RIVALS)
def test_scores_are_complete_and_do_not_depend_on_chance(name, calibration):
    scores = RIVALS[name](calibration)
    check_scores(scores, calibration.weights)
    again = RIVALS[name](calibration)
    for key, w in calibration.weights.items():
        assert scores[key].shape == w.shape
        assert torch.equal(scores[key], again[key])
        for index in itertools.islice(itertools.product(*map(range, w.shape)), 50):
            w_i, g_i = float(w[index]), float(calibration.gradient[key][index])
            known = {"gradient": abs(g_i), "snip": abs(w_i * g_i), "gallop": abs(g_i) / (abs(w_i) + 1e-8)}
            if name in known:
                assert math.isclose(scores[key][index], known[name], rel_tol=1e-4, abs_tol=1e-12)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_gps_trains_the_largest_gradients_of_each_neuron_in_equal_number(fraction, calibration):
    total = sum(w.numel() for w in calibration.weights.values())
    frozen = lowest_k(RIVALS["gps"](calibration), round(fraction * total))
    for name in ("0", "6", "8"):
        counts = []
        for i, row in enumerate(frozen[f"{name}.weight"]):
            mask = torch.cat([row.flatten(), frozen[f"{name}.bias"][i : i + 1]])
            gradients = calibration.gradient
            g = torch.cat([gradients[f"{name}.weight"][i].flatten(), gradients[f"{name}.bias"][i : i + 1]]).abs()
            counts.append(int(mask.sum()))
            assert not mask.any() or mask.all() or g[mask].max() <= g[~mask].min()
        assert max(counts) - min(counts) <= 1
        assert abs(counts[0] - fraction * len(mask)) <= 1.5


def test_gem_gives_tensors_numbers_in_proportion_to_norm_and_entropy(calibration):
    ratios = {}
    for name, w in calibration.weights.items():
        pairs = zip(calibration.gradient[name].flatten().tolist(), w.flatten().tolist(), strict=True)
        ratios[name] = [abs(g) / (abs(v) + 1e-8) for g, v in pairs]
    shares = {}
    for n, r in ratios.items():
        p = [v / sum(r) for v in r]
        shares[n] = max(0.0, -sum(v * math.log(v + 1e-8) for v in p)) * math.sqrt(sum(v * v for v in r))
    total, n_live = sum(map(len, ratios.values())), 12
    frozen = lowest_k(RIVALS["gem"](calibration), total - n_live)
    for n, share in shares.items():
        expected = n_live * share / sum(shares.values())
        live = int((~frozen[n]).sum())
        assert live == len(ratios[n]) or abs(live - expected) <= 1.5
        chosen = [r for r, f in zip(ratios[n], frozen[n].flatten(), strict=True) if not f]
        assert sorted(chosen) == pytest.approx(sorted(ratios[n])[len(ratios[n]) - live :])


def test_lift_ranks_a_matrix_by_its_part_of_low_rank(calibration):
    scores = RIVALS["lift"](calibration)
    w = calibration.weights["6.weight"].double()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    low = (u[:, :1] * s[0]) @ v[:1]  # 5 // 4 = 1
    assert torch.equal(scores["6.weight"].flatten().argsort(), low.abs().flatten().argsort())
    assert max(scores[n].max() for n in scores if calibration.weights[n].dim() < 2) < scores["6.weight"].min()


def test_wanda_grft_and_auto_rgn_are_by_input_line_and_tensor(calibration):
    w, g = calibration.weights["8.weight"], calibration.gradient["8.weight"]
    torch.testing.assert_close(RIVALS["wanda"](calibration)["8.weight"], w.abs() * calibration.input_norms["8.weight"])
    rows, columns = g.square().mean(1), g.square().mean(0)
    lines = rows[:, None].expand_as(g) if rows.max() >= columns.max() else columns.expand_as(g)
    torch.testing.assert_close(RIVALS["grft"](calibration)["8.weight"], lines)
    ratio = math.sqrt(float(g.double().square().sum())) / math.sqrt(float(w.double().square().sum()))
    torch.testing.assert_close(RIVALS["auto_rgn"](calibration)["8.weight"], torch.full(w.shape, ratio).double())
