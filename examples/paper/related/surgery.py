"""Optimal brain damage and surgeon, and what the same expansion of the loss says about freezing.

    L(w + δ) - L(w) ≈ gᵀδ + ½ δᵀ H δ

Sources: Y. LeCun, J. Denker, S. Solla, "Optimal Brain Damage" (NIPS 1989); B. Hassibi, D. Stork, "Second Order
Derivatives for Network Pruning: Optimal Brain Surgeon" (NIPS 1992). Both are at a minimum, g = 0, and set w_q to zero.
To freeze a weight is to do without a step that is still to come: here the expansion is at a point before the minimum,
and d = -H⁻¹g is the step to the minimum of the expansion, which is what is left to go if the loss is quadratic.

H is the Gauss-Newton matrix, and where that is singular or nearly so, H + μI (`Snapshot.damped_gauss_newton`). On a
linear regression with more objects than weights and a condition number below 10,000 that is ∇²L itself, and d exact;
in a network d is the way to the minimum of a damped quadratic, a step of Levenberg and Marquardt's method.

Scores are (p,), lowest first, in units of the loss.
"""

from torch import Tensor

from examples.paper.related.snapshot import Snapshot


def obd(at: Snapshot) -> Tensor:
    """h_ii w_i² / 2: what setting w_i to zero adds to the loss, the others left where they are.

    LeCun et al., their saliency s_k = h_kk u_k² / 2; here with the exact diagonal, `Snapshot.hessian_diagonal`.
    """
    return at.hessian_diagonal * at.weights.square() / 2


def obs(at: Snapshot) -> Tensor:
    """w_i² / (2 [H⁻¹]_ii): the same, once the other weights have been adjusted for it.

    Hassibi and Stork, their L_q, Eq. (5). Their H, too, is a sum of outer products of the outputs' gradients; they
    build its inverse object by object from that of a small multiple of I, here it is inverted once, damped. The other
    weights are not adjusted here: it is used as an order.
    """
    return at.weights.square() / (2 * at.inverse_gauss_newton.diagonal())


def obd_freeze(at: Snapshot) -> Tensor:
    """h_ii d_i² / 2, d = -H⁻¹g: what w_i adds to the loss at the minimum if it alone has not moved there.

    `obd` with the way that is left in the place of the weight.
    """
    return at.hessian_diagonal * _step(at).square() / 2


def obs_freeze(at: Snapshot) -> Tensor:
    """d_i² / (2 [H⁻¹]_ii), d = -H⁻¹g: the same, once the other weights have gone where it is least with w_i held.

    `obs` with the way that is left in the place of the weight. On a linear regression that needs no damping this is
    exactly by how much the least loss that training can reach rises when w_i alone is frozen.
    """
    return _step(at).square() / (2 * at.inverse_gauss_newton.diagonal())


def obd_freeze_diagonal(at: Snapshot) -> Tensor:
    """g_i² / (2 h_ii): `obd_freeze` with H taken to be diagonal, d_i = -g_i / h_ii. For any number of parameters.

    It is what one exact step along w_i takes off the loss. Where h_ii is zero no output depends on w_i, so g_i is zero
    too, and so is the score.
    """
    h = at.hessian_diagonal
    return (at.gradient.square() / (2 * h)).where(h > 0, 0.0)


def _step(at: Snapshot) -> Tensor:
    return -at.inverse_gauss_newton @ at.gradient
