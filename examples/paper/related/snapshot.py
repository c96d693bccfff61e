"""What a related order may look at: the model as it stands, the training data, and the curvature of their loss.

Everything is float64, and flat: p parameters in the order of ``named_parameters()``, each row by row.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from examples.models import LinearRegression, LogisticRegression, SupervisedModule

RELATIVE_DAMPING = 1e-4
CHUNK = 128  # objects whose Jacobians are held at once


@dataclass(frozen=True)
class Snapshot:
    """A model at one step of its training. Orders read it and modify nothing."""

    model: SupervisedModule
    """In float64, with the weights of this step. It has no buffers, dropout or anything else with a state."""
    x: Tensor
    """(n, features), the training objects."""
    y: Tensor
    """(n,), float64 for a regression, int64 classes else."""
    seed: int
    """Of orders that draw random numbers."""
    observe: Callable[[], Tensor]
    """Return C_t, (p, p), the full covariance of the gradient noise up to this step, Eq. (2.6) of the paper."""

    @property
    def linear(self) -> bool:
        """Whether the model is wᵀx, or its sigmoid: then parameters are features."""
        return isinstance(self.model, LinearRegression | LogisticRegression)

    @cached_property
    def weights(self) -> Tensor:
        """w, (p,)."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    @cached_property
    def noise_covariance(self) -> Tensor:
        """C_t, (p, p), float64: observed once, when an order asks for it."""
        return self.observe().double()

    def output(self, w: Tensor, x: Tensor) -> Tensor:
        """The model's output with the weights `w`, (p,)."""
        named = dict(self.model.named_parameters())
        parts = w.split([p.numel() for p in named.values()])
        weights = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(self.model, weights, (x,))  # type: ignore[no-any-return]

    def loss(self, w: Tensor) -> Tensor:
        """L(w): the mean loss over all training objects."""
        loss: Tensor = self.model.loss(self.output(w, self.x), self.y)
        return loss

    @cached_property
    def gradient(self) -> Tensor:
        """∇L at the weights, (p,)."""
        g: Tensor = grad(self.loss)(self.weights)
        return g.detach()

    @cached_property
    def gauss_newton(self) -> Tensor:
        """G, (p, p), the Gauss-Newton matrix of the loss at the weights.

            G = 1/n Σ_s J_sᵀ R_s J_s,   J_s = ∂output_s/∂w,   R_s = ∂²loss_s/∂output_s²

        The Hessian is G + 1/n Σ_s ∂loss_s/∂output_s · ∂²output_s/∂w², and G itself in the linear models. In a network
        the second term makes it indefinite away from a minimum, and what is added to make it positive definite leaves
        the direction of the most negative curvature with the least eigenvalue: the inverse is little else than that
        direction, and on Synthetic 1 `obs_freeze` then freezes half at 1.55 times the cost of chance. G is positive
        semidefinite: a sum of outer products, as the matrix of Hassibi and Stork is (see `surgery.obs`).

        The sum goes over `CHUNK` objects at a time, so that their Jacobians never lie in memory all at once.
        """
        total = self.weights.new_zeros(len(self.weights), len(self.weights))
        for rows in self._curvature_rows():
            total += rows.T @ rows
        return total / len(self.x)

    @cached_property
    def damped_gauss_newton(self) -> Tensor:
        """G + μI, (p, p), with the smallest μ >= 0 that leaves no eigenvalue below 1e-4 of the largest.

        With more weights than objects, or a unit that no object activates, G is singular. One of a condition number
        below 10,000, as those of the linear models with enough more objects than features, stays as it is.
        """
        low, high = _ends(self.gauss_newton)
        mu = max(0.0, RELATIVE_DAMPING * high - low)
        return self.gauss_newton + mu * torch.eye(len(self.weights), dtype=self.weights.dtype)

    @cached_property
    def inverse_gauss_newton(self) -> Tensor:
        """(G + μI)⁻¹, (p, p)."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.damped_gauss_newton))

    @cached_property
    def hessian_diagonal(self) -> Tensor:
        """h_ii, (p,): the diagonal of G, and of the Hessian of models that are piecewise affine in each single weight.

        All of table 1 are: ReLU bends in no single weight but at its kink. So h_ii >= 0, in a network too. For any
        number of parameters: G itself is not built.
        """
        total = torch.zeros_like(self.weights)
        for rows in self._curvature_rows():
            total += rows.square().sum(0)
        return total / len(self.x)

    def _curvature_rows(self) -> Iterator[Tensor]:
        """A_sᵀ J_s with A_s A_sᵀ = R_s, one below the other, (S K, p), of `CHUNK` objects after the other."""
        for x in self.x.split(CHUNK):
            root = self._curvature_root(self.output(self.weights, x).detach())  # (S, K, K)

            def outputs(w: Tensor, x_s: Tensor, root_s: Tensor) -> Tensor:
                return root_s.T @ self.output(w, x_s[None]).reshape(-1)

            yield vmap(jacrev(outputs), (None, 0, 0))(self.weights, x, root).flatten(0, 1).detach()

    def _curvature_root(self, output: Tensor) -> Tensor:
        """A with A Aᵀ = R_s for each object, (S, K, K), of the three losses of examples/models.py.

        Squared error: R = 2. Two classes with one logit: R = q(1 - q). K classes: R = diag(q) - q qᵀ, whose root is
        diag(√q) - q √qᵀ, as Σq = 1.
        """
        if self.y.is_floating_point():
            return torch.full((len(output), 1, 1), 2.0**0.5, dtype=output.dtype)
        if output.dim() == 1:
            q = torch.sigmoid(output)
            return (q * (1 - q)).sqrt()[:, None, None]
        q = F.softmax(output, dim=1)
        return torch.diag_embed(q.sqrt()) - q[:, :, None] * q.sqrt()[:, None, :]


def take(
    model: SupervisedModule, weights: Tensor, data: tuple[Tensor, Tensor], seed: int, observe: Callable[[], Tensor]
) -> Snapshot:
    """Return the snapshot of a model with other weights, (p,); the model given is left alone.

    Args:
        data: x and y of the training objects.
        seed: see `Snapshot`.
        observe: see `Snapshot`.
    """
    copy = deepcopy(model).double()
    torch.nn.utils.vector_to_parameters(weights.double(), copy.parameters())
    x, y = data
    return Snapshot(copy, x.double(), y.double() if y.is_floating_point() else y, seed, observe)


def _ends(symmetric: Tensor) -> tuple[float, float]:
    """The least and the greatest eigenvalue."""
    values = torch.linalg.eigvalsh(symmetric)
    return float(values[0]), float(values[-1])
