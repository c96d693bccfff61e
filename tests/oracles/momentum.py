"""What optimizers remember of their gradients, from the gradients themselves, one number after another.

Each function takes one element's gradients, None for a step in which the parameter had none, and returns the mean
gradient and the step at unit learning rate that the optimizer would take of it, (0, 0) if there was no gradient.
"""

import math
from collections.abc import Sequence

Gradients = Sequence[float | None]


def adam(gradients: Gradients, beta1: float, beta2: float, eps: float, amsgrad: bool = False) -> tuple[float, float]:
    """By the definition of means with geometric weights, normalised by the sum of the weights; no recursion."""
    seen = [g for g in gradients if g is not None]
    if not seen:
        return 0.0, 0.0

    def mean(values: list[float], beta: float) -> float:
        weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def second(n: int) -> float:
        return mean([g * g for g in seen[:n]], beta2)

    v = second(len(seen))
    if amsgrad:  # the largest uncorrected mean, with the correction of the last step
        v = max(second(n) * (1 - beta2**n) for n in range(1, len(seen) + 1)) / (1 - beta2 ** len(seen))
    m = mean(seen, beta1)
    return m, m / (math.sqrt(v) + eps)


def adamax(gradients: Gradients, beta1: float, beta2: float, eps: float) -> tuple[float, float]:
    """Adam with the largest decayed gradient in place of the root of the second moment."""
    m, _ = adam(gradients, beta1, beta2, eps)
    seen = [g for g in gradients if g is not None]
    if not seen:
        return 0.0, 0.0
    return m, m / max((abs(g) + eps) * beta2 ** (len(seen) - 1 - i) for i, g in enumerate(seen))


def sgd(gradients: Gradients, momentum: float, dampening: float = 0.0) -> tuple[float, float]:
    """The first gradient is not dampened; the mean divides by what the weights sum up to in the long run."""
    seen = [g for g in gradients if g is not None]
    if not seen:
        return 0.0, 0.0
    weights = [(1 - dampening if i else 1.0) * momentum ** (len(seen) - 1 - i) for i in range(len(seen))]
    step = sum(w * g for w, g in zip(weights, seen, strict=True))
    return step * (1 - momentum) / (1 - dampening), step


def rmsprop(gradients: Gradients, alpha: float, momentum: float, eps: float, centered: bool) -> tuple[float, float]:
    """The buffer is of divided gradients; the mean is multiplied by the last divisor again."""
    square = mean = buffer = divisor = 0.0
    for g in gradients:
        if g is None:
            continue
        square, mean = alpha * square + (1 - alpha) * g * g, alpha * mean + (1 - alpha) * g
        divisor = math.sqrt(square - mean * mean if centered else square) + eps
        buffer = momentum * buffer + g / divisor
    return buffer * (1 - momentum) * divisor, buffer
