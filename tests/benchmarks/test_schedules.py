"""Schedules of freezing, followed by members side by side, against a plain loop for each."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.quality import batched
from benchmarks.quality.rates import WAYS
from benchmarks.quality.schedules import FACTORS, SCHEDULES, Following, Stage, on_average
from benchmarks.quality.tasks import RATE_TASKS
from examples.models import MLPRegressor

STEPS, LR = 40, 0.01
TASK = RATE_TASKS["boston"]


@pytest.mark.parametrize("average", SCHEDULES)
def test_all_schedules_freeze_as_much_on_average(average):
    """Of half a percent of all elements and steps."""
    for name, stages in SCHEDULES[average].items():
        assert on_average(stages) == pytest.approx(float(average), abs=0.008), name
        assert all(0 <= stage.back < stage.at < 1 for stage in stages)


def alone(stages, factor):
    """One member, step by step, with torch's own Adam and gradients of live elements alone; flat weights at the end."""
    torch.manual_seed(0)
    model = MLPRegressor(5, (4,))
    batches = [(torch.randn(8, 5), torch.randn(8)) for _ in range(STEPS)]
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    live, half, way, back = torch.ones_like(w, dtype=torch.bool), w.clone(), 1.0, None
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    first = None
    for step, (x, y) in enumerate(batches, start=1):
        for p, part in zip(model.parameters(), w.split(sizes), strict=True):
            p.data = part.view(p.shape).clone()
        loss = F.mse_loss(model(x), y)
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        w = torch.where(live, w - LR * way * update, w)
        before = 0.0
        for stage in stages:
            if stage.back and step == round(stage.back * STEPS):
                back = w.clone(), m.clone(), v.clone()
            if step in (round((before + stage.at) / 2 * STEPS), round(stage.back * STEPS)):
                half = w.clone()
            if step == round(stage.at * STEPS):
                score = m * m / v.sqrt() if stage.by == "anew" else (w - half) ** 2 * v.sqrt()
                first = score if first is None else first
                score = first if stage.by == "first" else score
                if stage.by == "fresh":
                    score = score.masked_fill(~live, -1)
                live = torch.ones_like(live)
                live[score.argsort(stable=True)[: round(stage.fraction * len(w))]] = False
                way = factor
                w, m, v = back if back else (w, m, v)
            before = stage.at
    return w


@pytest.mark.parametrize(
    "stages",
    [
        [Stage(0.5, 0.8)],
        [Stage(0.25, 0.3), Stage(0.5, 0.9)],
        [Stage(0.25, 0.3), Stage(0.5, 0.9, "first")],
        [Stage(0.25, 0.8, "anew"), Stage(0.5, 0.6, "anew")],
        [Stage(0.5, 0.7, back=0.25)],
    ],
    ids=["once", "fresh", "first", "anew", "back"],
)
def test_members_follow_their_schedules_as_one_alone_would(stages):
    torch.manual_seed(0)
    model = MLPRegressor(5, (4,))
    batches = [(torch.randn(8, 5), torch.randn(8)) for _ in range(STEPS)]
    start = {name: p.detach() for name, p in model.named_parameters()}
    following = Following([[Stage(0.3, 0.5)], stages], replace(TASK, steps=STEPS), start, seed=0)
    members = batched.Members(model, start, following.live, torch.ones(len(following.schedules)), {})
    trained, _ = batched.train(members, WAYS["adam"].optimizers, batches, [LR] * STEPS, change=following)
    for i, factor in enumerate(FACTORS):
        found = torch.cat([w[len(FACTORS) + i].flatten() for w in trained.values()])
        torch.testing.assert_close(found, alone(stages, factor), rtol=2e-4, atol=2e-5)
    other = torch.cat([w[1].flatten() for w in trained.values()])
    assert not torch.allclose(other, alone(stages, 1.0), atol=1e-3)
