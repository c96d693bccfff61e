"""Belsley's diagnostics of collinearity on a covariance matrix of the parameters, as an order.

X with columns of unit length has the singular values μ_j and right singular vectors v_j. Least squares on it has
parameters of covariance σ²(XᵀX)⁻¹, so

    Var w_k ∝ Σ_j φ_kj,   φ_kj = v_kj² / μ_j²,   π_jk = φ_kj / Σ_j φ_kj,   η_j = μ_max / μ_j :

η_j is a condition index, and π_jk the proportion of the variance of w_k that comes with it. Parameters that share high
proportions at a high index are collinear. In terms of a covariance Σ = V Λ Vᵀ: 1/μ_j² ∝ λ_j, so the largest index is
that of the largest eigenvalue, and π_jk = v_kj² λ_j / Σ_kk.

Source: D. Belsley, E. Kuh, R. Welsch, "Regression Diagnostics" (1980), chapter 3. To remove the parameter of the
largest proportion at the largest index, then to look again at those that remain, is the use that A. Grabovoy,
O. Bakhteev, V. Strijov, "Estimation of the relevance of the neural network parameters" (2019) make of it. They had in
mind a posterior covariance, which `belsley_laplace` is; `belsley_noise` takes the matrix of the method itself.

Scores are (p,): the place in which a parameter is removed, 0 first. Each removal costs an eigendecomposition of what
is left: O(p⁴) in all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from examples.paper.related.snapshot import Snapshot

ROUNDING = 1e-9  # proportions that differ by less are equal


def belsley_noise(at: Snapshot) -> Tensor:
    """The order on C_t, the full covariance of the gradient noise, ``covariance="full"`` of the callback.

    C_t stands where Σ stands. Nothing is scaled, as there is no X: a noisy parameter counts more than a quiet one. The
    matrix of those that remain is a part of C_t, as a frozen parameter takes its noise with it. After t0 steps of one
    sample each the rank is at most t0, which makes indices infinite but does not disturb the largest eigenvalue.
    A parameter whose gradient is never noisy has no variance to have proportions of, and comes last.
    """
    return eliminated(at.noise_covariance, noise_proportions)


def belsley_laplace(at: Snapshot) -> Tensor:
    """The order on G⁻¹, the covariance of the parameters' posterior by Laplace's approximation.

    G, the Gauss-Newton matrix, stands where XᵀX stands, scaled to a diagonal of ones as X is to columns of unit length;
    the exact Hessian of a network, being indefinite, is the inverse of no covariance. It is damped where it must be
    (`Snapshot.damped_gauss_newton`). On a linear regression G = 2 XᵀX / n, and undamped these are Belsley's diagnostics
    of X. The matrix of those that remain is a part of G, as the one of X without a column is.
    """
    return eliminated(at.damped_gauss_newton, laplace_proportions)


def noise_proportions(covariance: Tensor) -> Tensor:
    """π_1k of a covariance, (p,): proportions at the largest condition index; 0 without a variance."""
    values, vectors = torch.linalg.eigh(covariance)
    variances = covariance.diagonal()
    share: Tensor = vectors[:, -1].square() * values[-1] / variances
    return share.where(variances > 0, 0.0)


def laplace_proportions(precision: Tensor) -> Tensor:
    """π_1k of a precision matrix XᵀX, (p,): proportions at the largest condition index, X scaled by columns."""
    scale = precision.diagonal().rsqrt()
    squares, vectors = torch.linalg.eigh(precision * scale[:, None] * scale)  # μ_j², ascending
    phi: Tensor = vectors.square() / squares
    return phi[:, 0] / phi.sum(1)


def eliminated(matrix: Tensor, proportions: Callable[[Tensor], Tensor]) -> Tensor:
    """Remove one after the other the parameter of the largest proportion; return in which place each went, (p,).

    Args:
        matrix: (p, p), symmetric. After a removal it goes on as the part of those that remain.
        proportions: from a matrix, (r, r), to proportions, (r,). Of equal ones the first goes first: the last two
            parameters on scaled columns, for one, have the same by symmetry.
    """
    left = torch.arange(len(matrix))
    places = torch.empty(len(matrix), dtype=torch.float64)
    for place in range(len(matrix)):
        shares = proportions(matrix[left][:, left])
        at = int((shares >= shares.max() - ROUNDING).nonzero()[0])
        places[left[at]] = place
        left = torch.cat([left[:at], left[at + 1 :]])
    return places
