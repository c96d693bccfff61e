"""Blocks of rows and columns that lose little for the work they save, against loops and every possible block."""

from itertools import product

import pytest
import torch

from lightning_gcfreeze import selection
from lightning_gcfreeze.freezing import blocks
from lightning_gcfreeze.selection.mixed import KEPT, LARGEST


def uneven(*shape, seed=0):
    """Return scores of which some rows and columns have more than others, float32 (*shape)."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=draw) ** 3
    columns = torch.rand(shape[1], *[1] * (len(shape) - 2), generator=draw) ** 3
    return torch.rand(shape, generator=draw) ** 2 * rows * columns


def mixed(scores, k, costs):
    return selection.lowest_k(dict(selection.in_blocks(scores, k, costs)), k, "mixed")


def work(masks, costs):
    """Products of the smallest blocks around live elements, by loops over rows and columns."""
    total = 0
    for name, cost in costs.items():
        mask = masks[name].tolist()
        kernel = masks[name][0, 0].numel()
        rows = [i for i, row in enumerate(mask) if "False" in str(row)]
        columns = [j for j in range(len(mask[0])) if any("False" in str(row[j]) for row in mask)]
        total += cost * kernel * len(rows) * len(columns)
    return total


def kept(scores, masks):
    return sum(float(score[~masks[name]].double().sum()) for name, score in scores.items())


def model(seed=0):
    return {
        "a.weight": uneven(40, 60, seed=seed), "a.bias": uneven(40, 1, seed=seed + 1).flatten(),
        "b.weight": uneven(50, 40, seed=seed + 2), "conv.weight": uneven(12, 8, 3, 3, seed=seed + 3),
    }  # fmt: skip


COSTS = {"a.weight": 100, "b.weight": 100, "conv.weight": 900}


@pytest.mark.parametrize("k", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_k_freeze_for_much_less_work_and_little_less_of_the_scores(k, dtype):
    """Than single elements."""
    for seed in range(5):
        scores = {name: score.to(dtype) for name, score in model(seed).items()}
        count = round(k * sum(score.numel() for score in scores.values()))
        elements, masks = selection.lowest_k(scores, count), mixed(scores, count, COSTS)
        assert sum(int(mask.sum()) for mask in masks.values()) == count
        assert kept(scores, masks) >= (KEPT - 0.01) * kept(scores, elements)  # scores are counted in bins
        assert work(masks, COSTS) < 0.8 * work(elements, COSTS)


def test_a_block_of_high_scores_is_all_that_stays_live():
    scores = {"w": torch.rand(30, 20) / 100, "other": torch.rand(10) / 100}
    rows, columns = torch.tensor([3, 4, 17, 29]), torch.tensor([0, 8, 19])
    scores["w"][rows[:, None], columns] += 1.0
    masks = mixed(scores, 610 - 12, {"w": 10})
    assert (~masks["w"]).nonzero().tolist() == [[r, c] for r in rows.tolist() for c in columns.tolist()]
    assert masks["other"].all()


def test_outside_of_blocks_freezes_first_and_ties_and_ranks_are_those_of_the_order():
    """Inside and outside, the order is the one that was given; without a block nothing changes."""
    scores = model()
    count = round(0.9 * sum(score.numel() for score in scores.values()))
    order = dict(selection.in_blocks(scores, count, COSTS))
    outside = {name: score < 0 for name, score in order.items()}
    assert all(outside[name].any() and not outside[name].all() for name in COSTS)
    assert order["a.bias"] is scores["a.bias"]
    masks = selection.lowest_k(order, count)
    for name in COSTS:
        assert masks[name][outside[name]].all()
        assert torch.equal(order[name][~outside[name]], scores[name][~outside[name]])
        live = ~outside[name].flatten(2) if outside[name].dim() > 2 else ~outside[name][..., None]
        rows, columns = live.any(2).any(1), live.any(2).any(0)
        assert torch.equal(live, (rows[:, None] & columns)[..., None].expand_as(live))  # a block, with whole kernels


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_outside_of_blocks_small_scores_keep_their_order(scale):
    scores = {"w": uneven(40, 40) * scale, "large": torch.full((5,), 1e6 * scale)}
    order = dict(selection.in_blocks(scores, 1500, {"w": 100}))["w"].flatten()
    outside = order < 0
    ranks = scores["w"].flatten()[outside].argsort()
    assert outside.sum() > 100
    assert (order[outside][ranks].diff() >= 0).all()
    assert len(order[outside].unique()) > 0.9 * outside.sum()


def test_sums_of_half_precision_do_not_overflow():
    scores = {"w": (uneven(64, 64) * 6e5).clamp(max=65504).half()}
    wide = {"w": scores["w"].float()}
    assert torch.equal(mixed(scores, 3600, {"w": 10})["w"], mixed(wide, 3600, {"w": 10})["w"])


def test_what_is_used_more_often_is_cut_more():
    scores = {"dear": uneven(60, 60), "cheap": uneven(60, 60)}
    masks = mixed(scores, 5760, {"dear": 1000, "cheap": 1})
    assert work(masks, {"dear": 1}) < 0.7 * work(masks, {"cheap": 1})


def test_work_is_near_the_least_that_any_block_has():
    """Of all blocks of a small weight that keep as much."""
    ratios = []
    for seed in range(8):
        score = uneven(6, 6, seed=seed)
        k = 24
        free = selection.lowest_k({"w": score}, k)
        ours = mixed({"w": score}, k, {"w": 1})
        enough = min(KEPT * kept({"w": score}, free), kept({"w": score}, ours))
        least = 36
        for rows in product([False, True], repeat=6):
            some = score[torch.tensor(rows)]
            for columns in product([False, True], repeat=6):
                size = sum(rows) * sum(columns)
                if 12 <= size < least:
                    inside = some[:, torch.tensor(columns)].flatten()
                    if float(inside.topk(12).values.double().sum()) >= enough:
                        least = size
        ratios.append(work(ours, {"w": 1}) / least)
    assert min(ratios) >= 1.0
    assert sum(ratios) / len(ratios) < 1.25, ratios


def test_what_is_frozen_already_stays_frozen():
    """Those have -inf, as from stage to stage; what a user wants live has inf."""
    scores = model()
    scores["a.weight"][:, 30:] = -torch.inf
    scores["b.weight"][7, 7] = torch.inf
    count = round(0.9 * sum(score.numel() for score in scores.values()))
    masks = mixed(scores, count, COSTS)
    assert masks["a.weight"][:, 30:].all()
    assert not masks["a.weight"].all()
    assert not masks["b.weight"][7, 7]
    assert sum(int(mask.sum()) for mask in masks.values()) == count


@pytest.mark.parametrize(
    ("scores", "k", "costs"),
    [
        (model(), 1000, {}),
        (model(), 0, COSTS),
        ({"w": torch.zeros(8, 9)}, 30, {"w": 5}),
        ({"w": torch.full((8, 9), torch.inf)}, 30, {"w": 5}),
        ({"w": torch.rand(8, 9)}, 72, {"w": 5}),
    ],
)
def test_single_elements_freeze_where_no_block_pays(scores, k, costs):
    """Nothing is used, nothing or everything freezes, or nothing is to be lost."""
    masks, elements = mixed(scores, k, costs), selection.lowest_k(scores, k)
    assert all(torch.equal(mask, elements[name]) for name, mask in masks.items())


@pytest.mark.parametrize("k", [0, 30, 71, 72])
@pytest.mark.parametrize("make", [torch.rand, torch.zeros])
def test_a_share_of_the_work_is_kept_whatever_freezes(k, make):
    scores = {"w": make(8, 9)}
    order = dict(selection.in_blocks(scores, k, {"w": 5}, work=0.25))
    outside = int((order["w"] < 0).sum())
    masks = selection.lowest_k(order, max(k, outside))
    assert work(masks, {"w": 1}) <= 0.25 * 72


def test_all_that_has_a_score_is_live_where_most_have_none():
    """The threshold itself is 0 where most elements have never moved."""
    scores = {"w": torch.zeros(30, 30)}
    scores["w"][5:9, 3:6] = 1.0
    masks = mixed(scores, 900 - 50, {"w": 5})
    assert not masks["w"][5:9, 3:6].any()
    assert int((~masks["w"]).sum()) == 50


def test_a_block_is_too_large_here_where_it_is_too_large_to_be_computed():
    assert LARGEST == blocks.MAX_BLOCK_FRACTION


def test_negative_scores_are_refused():
    with pytest.raises(ValueError, match=r"'w'.*'element' or 'row'"):
        dict(selection.in_blocks({"w": torch.tensor([[1.0, -1.0]])}, 1, {"w": 1}))
