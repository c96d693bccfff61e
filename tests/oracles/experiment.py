"""An experiment of the paper on its linear model, by hand in NumPy, float64. Knows neither the package nor torch.

Adam, the recursion (2.6), the ranks (2.7) and the masked increment (2.8) in one loop each, as the paper writes them.
"""

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def linear_regression(
    w: Array,
    data: tuple[Array, Array],
    batches: Sequence[Sequence[int]],
    t0: int,
    k: int,
    lr: float,
    gain: Callable[[int], float] = lambda t: 1 / t,
    sample: Callable[[Array], Array] = lambda gradients: gradients[0],
    score: Callable[[Array], Array] = lambda c: c,
    held: bool = True,
) -> tuple[Array, Array]:
    """Train wᵀx by the mean squared error, freezing after t0 steps the k elements whose diagonal of C is lowest.

    The last four arguments are the method; others than their defaults are mistakes that somebody might make.

    Args:
        w: initial weights, (p,).
        data: x (objects, p) and y (objects,).
        batches: the objects of every step.
        gain: t -> κ_t.
        sample: the batch's single gradients, (S, p) -> g_1.
        score: the diagonal of C -> what is ranked, lowest first.
        held: whether the increment is masked; else the gradient alone.

    Returns:
        The weights after the last step, and which elements were frozen.
    """
    x, y = (np.asarray(array, dtype=np.float64) for array in data)
    w = np.array(w, dtype=np.float64)
    c, m, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    frozen = np.zeros(w.shape, dtype=bool)
    for t, batch in enumerate(batches, start=1):
        residual = x[batch] @ w - y[batch]
        gradients = 2 * residual[:, None] * x[batch]
        g = gradients.mean(axis=0)
        if t <= t0:
            c = (1 - gain(t)) * c + gain(t) * (sample(gradients) - g) ** 2
        if t > t0:
            g = np.where(frozen, 0.0, g)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        increment = -lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w + (np.where(frozen, 0.0, increment) if held else increment)
        if t == t0:
            frozen[np.argsort(score(c), kind="stable")[:k]] = True
    return w, frozen
