"""The paths of the l1 penalty and of the elastic net: what enters last, or never, freezes first.

    min_w  c L(w) + λ₁ ‖w‖₁ + λ₂/2 ‖w‖₂²,   λ₁ from where w = 0 down

Sources: R. Tibshirani, "Regression Shrinkage and Selection via the Lasso" (1996), λ₂ = 0; H. Zou, T. Hastie,
"Regularization and Variable Selection via the Elastic Net" (2005). c = ½ for the mean squared error, 1 for the mean
cross-entropy, as is usual for each. The path of a linear model is that of its features and starts from no weights: it
is the same at every t0, and all that it knows of a run is its training data.

Of a network there is no path from zero: with all weights at zero none but the output's biases has a gradient. There the
weights at t0 go some steps down the penalised loss, and are ranked by what is left of them. Scores are (p,), lowest
first.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import lars_path
from torch import Tensor
from torch.func import grad_and_value

from examples.data import FloatArray
from examples.paper.related.snapshot import Snapshot

RIDGE = 1.0  # λ₂ on a linear model, in units of the mean over features of mean x²
GRID, GRID_END = 100, 1e-2  # of λ₁ on a logistic regression: so many values, from the largest to this part of it
TOLERANCE = 1e-4  # of each point of the grid: the largest entry of the gradient mapping, in units of its λ₁
MAX_STEPS = 5000  # of each point of the grid
NETWORK_STEPS = 100
NETWORK_PENALTY = 1.0  # the whole penalty of the weights at t0, in units of the loss there


def l1_path(at: Snapshot) -> Tensor:
    """The place of entry into the path of the l1 penalty; in a network, |w| after proximal steps.

    Linear regression: the largest λ₁ at which w_i is not zero, exactly, by LARS; 0 if there is none.
    Logistic regression: `logistic_entries`. Network: `shrunken`.
    """
    if not at.linear:
        return shrunken(at, ridge=False)
    x, y = at.x.numpy(), at.y.numpy()
    return torch.as_tensor(lasso_entries(x, y) if at.y.is_floating_point() else logistic_entries(x, y, ridge=0.0))


def elastic_net_path(at: Snapshot) -> Tensor:
    """The same with λ₂ fixed: at the mean over features of mean x², times `RIDGE`, on the linear models.

    Linear regression: the elastic net is the lasso with √(nλ₂) I below X and zeros below y (Zou and Hastie, Lemma 1),
    so LARS has its path exactly too, their LARS-EN.
    """
    if not at.linear:
        return shrunken(at, ridge=True)
    x, y = at.x.numpy(), at.y.numpy()
    ridge = RIDGE * float(np.square(x).mean())
    if not at.y.is_floating_point():
        return torch.as_tensor(logistic_entries(x, y, ridge))
    n, p = x.shape
    # The longer problem divides its squares by n + p rows, this one by n.
    entries = lasso_entries(np.vstack([x, np.sqrt(n * ridge) * np.eye(p)]), np.concatenate([y, np.zeros(p)]))
    return torch.as_tensor(entries * (n + p) / n)


def lasso_entries(x: FloatArray, y: FloatArray) -> FloatArray:
    """The largest λ₁ of ½ mean (y - xw)² + λ₁‖w‖₁ at which each weight is not zero, (p,); 0 if there is none."""
    penalties, _, weights = lars_path(x, y, method="lasso")  # (K,) descending; (p, K), exact at each change
    entered = weights != 0
    # The path is linear between changes: what is first seen at the change k has grown from zero since k - 1.
    first = entered.argmax(1) - 1
    return np.where(entered.any(1), penalties[first], 0.0)


def logistic_entries(x: FloatArray, y: FloatArray, ridge: float) -> FloatArray:
    """Score features by their place of entry into the penalised path of the mean cross-entropy, (p,).

    The path is that of a grid, `GRID` values of λ₁ in equal ratios from max |∇L(0)| on, each solved from the one before
    by accelerated proximal gradient steps (Beck and Teboulle, 2009) of the length 1/‖∇²L‖, with restarts:

        w ← soft(u - s (∇L(u) + λ₂ u), s λ₁),   soft(u, τ) = sign(u) max(|u| - τ, 0)

    until no entry of the gradient mapping, (u - w) / s, exceeds `TOLERANCE` λ₁. The score is the number of grid points
    from the entry on. Features that enter at the same point differ by |w_i| there, and those that never do by how near
    their part of the gradient comes to the last λ₁, both squeezed into less than one point.
    """
    signs = 2.0 * y - 1.0

    def gradient(w: FloatArray) -> FloatArray:
        slopes: FloatArray = -signs * expit(-signs * (x @ w))
        return x.T @ slopes / len(x) + ridge * w

    step = 1 / (float(np.linalg.norm(x, 2)) ** 2 / 4 / len(x) + ridge)
    w: FloatArray = np.zeros(x.shape[1])
    highest = np.abs(gradient(w)).max()
    scores = np.full(len(w), -1.0)
    for place, penalty in enumerate(np.geomspace(highest, GRID_END * highest, GRID)):
        w = _solved(w, gradient, float(penalty), step)
        new = (w != 0) & (scores < 0)
        scores[new] = GRID - place + np.abs(w[new]) / (1 + np.abs(w[new]))
    never = scores < 0
    scores[never] = np.minimum(np.abs(gradient(w))[never] / penalty, 1) * 0.5
    return scores


def _solved(w: FloatArray, gradient: Callable[[FloatArray], FloatArray], penalty: float, step: float) -> FloatArray:
    """The minimum for one λ₁ from a near point, the smooth part given by its gradient."""
    u, momentum = w, 1.0
    for _ in range(MAX_STEPS):
        g = gradient(u)
        following = _soft(u - step * g, step * penalty)
        if np.abs((u - following) / step).max() <= TOLERANCE * penalty:
            return following
        if (u - following) @ (following - w) > 0:  # uphill: the momentum starts again
            u, momentum = following, 1.0
        else:
            later = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            u = following + (momentum - 1) / later * (following - w)
            momentum = later
        w = following
    return w


def _soft(u: FloatArray, threshold: float) -> FloatArray:
    shrunk: FloatArray = np.sign(u) * np.maximum(np.abs(u) - threshold, 0)
    return shrunk


def shrunken(at: Snapshot, ridge: bool) -> Tensor:
    """|w| of a network after proximal gradient steps on the penalised loss of all training objects, from t0 on, (p,).

    λ₁‖w‖₁, or with `ridge` λ₁‖w‖₁ and λ₂/2 ‖w‖₂² in equal parts, weigh at t0 `NETWORK_PENALTY` times as much as the
    loss. The last soft threshold is left out of the score: (|u| - s λ₁) / (1 + s λ₂) is |w| where w is not zero, and
    weights at zero differ by how far below the threshold they end: by |∇L|, as u = -s ∇L once w = 0. Those whose
    gradient is exactly zero, of a dead unit or a dark pixel, are equal; then their place decides.
    """
    weight = NETWORK_PENALTY * float(at.loss(at.weights)) / (2 if ridge else 1)
    l1 = weight / float(at.weights.abs().sum())
    l2 = 2 * weight / float(at.weights.square().sum()) if ridge else 0.0
    return proximal_steps(at, l1, l2, NETWORK_STEPS)[1]


def proximal_steps(at: Snapshot, l1: float, l2: float, steps: int) -> tuple[Tensor, Tensor]:
    """Go down L(w) + λ₁‖w‖₁ + λ₂/2 ‖w‖₂² from the snapshot's weights.

        u = w - s ∇L(w),   w ← soft(u, s λ₁) / (1 + s λ₂)

    s begins at 1, doubles up to 1 before each step, and is halved while L(w) exceeds its bound by ∇L and ‖·‖² / 2s
    (Beck and Teboulle's backtracking): so no step raises the penalised loss.

    Returns:
        w, and (|u| - s λ₁) / (1 + s λ₂) of the last step, both (p,).
    """
    loss_and_gradient = grad_and_value(at.loss)
    w, step, score = at.weights, 1.0, at.weights.abs()
    gradient, loss = loss_and_gradient(w)
    for _ in range(steps):
        step = min(2 * step, 1.0)
        while True:
            u = w - step * gradient
            score = (u.abs() - step * l1) / (1 + step * l2)
            following = u.sign() * score.clamp_min(0)
            way = following - w
            new_gradient, new_loss = loss_and_gradient(following)
            bound = loss + gradient @ way + way @ way / (2 * step)
            if new_loss <= bound + 1e-12 * loss:  # to rounding, where nothing moves any more
                break
            step /= 2
        w, gradient, loss = following, new_gradient, new_loss
    return w.detach(), score.detach()
