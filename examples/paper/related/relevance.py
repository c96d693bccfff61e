"""Relevance of parameters: a factorised Gaussian posterior, and how far it puts a parameter from zero.

    q(w) = N(μ, diag σ²),   p(w) = N(0, diag α),   w = μ + σ ε,  ε ~ N(0, I)
    min over μ, σ, α:  E_q[-log p(y | x, w)] + KL(q ‖ p)
    at the best α_i = μ_i² + σ_i²:  KL = ½ Σ_i log(1 + μ_i² / σ_i²)

Sources: A. Graves, "Practical Variational Inference for Neural Networks" (2011), for the posterior and for removing
weights by |μ_i| / σ_i; D. Kingma, M. Welling, "Auto-Encoding Variational Bayes" (2014), for the reparametrised
gradient; M. Titsias, M. Lázaro-Gredilla, "Doubly Stochastic Variational Bayes for non-Conjugate Inference" (2014), for
automatic relevance determination, a prior variance to each weight, where Graves has one for all.

The likelihood is that of the loss: of a class its probability; of a regression N(y | h, s²), s² at its best too, which
makes its part n/2 log E[(y - h)²]. What the order costs is a training of its own, from the weights at t0 on, over
`STEPS` batches of `BATCH_SIZE` objects.
"""

import torch
from torch import Tensor
from torch.func import grad_and_value

from examples.paper.related.snapshot import Snapshot

STEPS, BATCH_SIZE = 1000, 100
RATE = 1e-2  # Adam's learning rate of μ and log σ, going down to 0 as a half cosine
FIRST_SIGMA = 0.1  # in units of the root mean square weight at t0


def relevance(at: Snapshot) -> Tensor:
    """μ² / σ², (p,), lowest first: what the posterior does not tell from zero."""
    mean, deviation = posterior(at)
    return (mean / deviation).square()


def posterior(at: Snapshot, steps: int = STEPS, batch_size: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
    """Train μ and σ, (p,) each, with Adam; μ begins at the weights.

    A step draws `batch_size` objects, or takes all if there are no more, and for all of them one ε, used with both
    signs: the gradient at μ, which says nothing about σ, cancels out of that of σ, where it would be most of the noise.
    """
    n, regression = len(at.x), at.y.is_floating_point()
    generator = torch.Generator().manual_seed(at.seed)
    mean = at.weights.clone().requires_grad_()
    first = FIRST_SIGMA * at.weights.square().mean().sqrt()
    log_deviation = torch.full_like(at.weights, float(first.log())).requires_grad_()
    optimizer = torch.optim.Adam([mean, log_deviation], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_of = grad_and_value(lambda w, x, y: at.model.loss(at.output(w, x), y))
    noise_variance = 1.0  # s², a running mean of the squared error
    for step in range(steps):
        some = torch.randperm(n, generator=generator)[:batch_size] if batch_size < n else slice(None)
        epsilon = torch.randn(len(mean), generator=generator, dtype=mean.dtype)
        with torch.no_grad():
            deviation = log_deviation.exp()
            draws = [loss_of(mean + sign * deviation * epsilon, at.x[some], at.y[some]) for sign in (1, -1)]
            (g_plus, loss_plus), (g_minus, loss_minus) = draws
            unit = 1.0
            if regression:
                gain = max(0.01, 1 / (step + 1))
                noise_variance += gain * (float(loss_plus + loss_minus) / 2 - noise_variance)
                unit = 2 * noise_variance  # n/2 log E[loss] has the gradient n/2 E[∇loss] / E[loss]
            alpha = mean.square() + deviation.square()
            # Divided by n throughout: Adam's steps are the same, and numbers those of a mean loss.
            mean.grad = (g_plus + g_minus) / (2 * unit) + mean / (alpha * n)
            slope = (g_plus - g_minus) / (2 * unit) * epsilon * deviation
            log_deviation.grad = slope - mean.square() / (alpha * n)
        optimizer.step()
        schedule.step()
    return mean.detach(), log_deviation.detach().exp()
