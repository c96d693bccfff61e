"""Published criteria for which parameters to train: scores of elements; the highest train, the lowest freeze.

A rival is one function of a `Calibration`, with a line in `RIVALS`. Any number of its lowest scores may freeze. A
method that gives each layer or neuron a quota has the quota in its scores: `_apportioned` and `_by_row` do so for every
number at once. Most sources score weight matrices alone and train or freeze all the rest; here every parameter has a
score. "Code" was read in the authors' repository.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_gcfreeze._types import Named

EPSILON = 1e-8  # GEM's and GaLLoP's, beside |w|
MAX_RANK = 128  # LIFT's


@dataclass(frozen=True)
class Calibration:
    """What the published criteria look at, at t0."""

    weights: Named
    """Copies of the parameters that require a gradient, ``{name: (*p.shape)}``."""
    gradient: Named
    """Of the mean loss over all calibration samples, ``{name: (*p.shape)}``."""
    input_norms: Named
    """``{name: (*p.shape[1:])}``: L2 norm of each input feature over samples and positions, for weights of Linear and
    of ungrouped convolutions (one norm a channel, repeated over the kernel); no entry for others."""


Rival: TypeAlias = Callable[[Calibration], Named]
"""What is seen at t0 -> ``{name: (*p.shape)}``, float32 or float64, free of NaN."""


def calibrate(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, batch_size: int = 250
) -> Calibration:
    """Look at all samples once; ``p.grad``, buffers and training flags stay as they were.

    In evaluation mode, so that neither dropout nor BatchNorm makes the result depend on chance or on the batches.

    Args:
        loss: (model(x), y) -> the mean over samples.
        x: (S, ...), on the model's device.
        y: (S, ...).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with _watched(model, parameters) as squares, torch.enable_grad():
        for batch_x, batch_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
            grads = torch.autograd.grad(loss(model(batch_x), batch_y), list(parameters.values()), allow_unused=True)
            for total, g in zip(gradient.values(), grads, strict=True):
                if g is not None:
                    total += g.detach() * (len(batch_x) / len(x))
    norms = {}
    for name, p in parameters.items():
        if name in squares:
            norm = squares[name].sqrt().to(p.dtype)
            norms[name] = norm.view(-1, *[1] * (p.dim() - 2)).expand(p.shape[1:]).clone()
    return Calibration({name: p.detach().clone() for name, p in parameters.items()}, gradient, norms)


def gradient(c: Calibration) -> Named:
    """|g|.

    SIFT: Song et al., arXiv 2312.11875, code song-wx/SIFT: the largest of each tensor, at the same rate. SPEFT: Liu et
    al., ACL 2025, arXiv 2412.13488, code 0-ml/speft: its "gradient", on GLUE compared over all layers, as here.
    """
    return _each(torch.abs, c.gradient)


def snip(c: Calibration) -> Named:
    """|w g|.

    Lee et al., ICLR 2019, arXiv 1810.02340, code namhoonlee/snip-public: over its sum, compared over all layers,
    weights and biases, in order to prune. In order to train: "saliency" in SPEFT's code.
    """
    return _each(lambda w, g: (w * g).abs(), c.weights, c.gradient)


def gem(c: Calibration) -> Named:
    """|g| / (|w| + ε), compared within a tensor, of which a number in proportion to ‖r‖₂ H trains.

    r is that ratio and H = -Σ p log(p + ε) the entropy of p = r / Σr. Kang et al., AAAI 2026, arXiv 2508.16191; from
    the authors' code (EntropyBasedMasking, ratio_mode "naive"), where only query and value projections train. What
    exceeds a tensor's size is lost there; here the others share it. A tensor of one element, H = 0, freezes first.
    """
    ratios = _each(lambda w, g: _relative(w.double(), g.double()), c.weights, c.gradient)
    shares = {}
    for name, r in ratios.items():
        p = r / r.sum().clamp_min(torch.finfo(r.dtype).tiny)
        entropy = -(p * (p + EPSILON).log()).sum()
        shares[name] = float(torch.linalg.vector_norm(r) * entropy.clamp_min(0.0))
    return _apportioned(ratios, shares)


def gallop(c: Calibration) -> Named:
    """|g| / (|w| + ε), ε = 1e-8, compared over all parameters.

    Choudhary et al., arXiv 2510.19778: high |g| and low |w| by the abstract; the formula by a public summary of it.
    """
    return _each(_relative, c.weights, c.gradient)


def gps(c: Calibration) -> Named:
    """|g|, compared within a neuron: the largest of its input connections train.

    Zhang et al., CVPR 2024, arXiv 2312.10136, code FightingFighting/GPS: K connections of every neuron; biases and the
    head train, norms freeze. Here the same share of every neuron's, so that any number can freeze. A neuron has the
    weights with one first index and its bias; without bias, an element of a vector is a neuron.
    """
    return _by_row(_each(torch.abs, c.gradient))


def grft(c: Calibration) -> Named:
    """Mean g² of the element's row or column.

    arXiv 2507.00016, of which only the abstract was found: the rows or columns with the highest Σg² train. Assumed: the
    rows of a matrix train or its columns, whichever have the best one; over matrices, lines compare by the mean, Σg²
    for each element that they cost. Convolutions are (out, rest); an element of a vector is a line.
    """

    def lines(g: Tensor) -> Tensor:
        if g.dim() < 2:
            return g.square()
        squares = g.flatten(1).square()
        rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
        return (rows if rows.max() >= columns.max() else columns).expand_as(squares).reshape(g.shape)

    return _each(lines, c.gradient)


def lift(c: Calibration) -> Named:
    """|W_r|, W_r the best approximation of rank r, compared within a matrix, of which rows + columns are the share.

    Liu et al., arXiv 2506.00772, code zihanghliu/LIFT: of a matrix, (rows + columns) × rank entries train. Its
    README recommends r = 128, its scripts 32 to 128 at widths of 2048 to 4096. Assumed: r = min(128, a quarter of
    the shorter side), at least 1; convolutions are (out, rest). There biases, norms, embeddings and the output layer
    freeze; here vectors come below all matrices, by |w|, and every matrix counts. The mask is not renewed.
    """
    low_rank, shares = {}, {}
    for name, w in c.weights.items():
        if w.dim() >= 2:
            matrix = w.flatten(1).double()
            r = min(MAX_RANK, max(1, min(matrix.shape) // 4))
            # Singular vectors as eigenvectors on the shorter side: far quicker than an SVD of an embedding.
            tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
            v = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -r:]  # eigenvalues ascend
            low = tall @ v @ v.T
            low_rank[name] = (low if tall is matrix else low.T).abs().reshape(w.shape)
            shares[name] = float(sum(matrix.shape))
    matrices = _apportioned(low_rank, shares)  # all positive
    return {name: matrices[name] if name in matrices else -1 / (1 + w.double().abs()) for name, w in c.weights.items()}


def wanda(c: Calibration) -> Named:
    """|w| ‖x‖₂, x the element's input over the samples.

    Sun et al., ICLR 2024, arXiv 2306.11695, code locuslab/wanda: compared within an output's row, in order to prune. In
    order to train: FPS, arXiv 2510.27359 (its abstract). Assumed: compared over all parameters, and those without an
    input norm take the mean of all norms, or 1 if there are none.
    """
    norms = [norm.flatten() for norm in c.input_norms.values()]
    mean = torch.cat(norms).mean() if norms else torch.ones(())
    return {name: w.abs() * c.input_norms.get(name, mean.to(w)) for name, w in c.weights.items()}


def auto_rgn(c: Calibration) -> Named:
    """‖g‖ / ‖w‖ of the element's tensor.

    Lee et al., ICLR 2023, arXiv 2210.11466, code anniesch/surgical-finetuning: a factor of the learning rate of each
    tensor that is no norm's, by the mean of batches' ratios. Here it is that of the mean gradient, and tensors freeze
    by it, the last one in part.
    """

    def ratio(w: Tensor, g: Tensor) -> Tensor:
        norm_w = w.double().square().sum().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return (g.double().square().sum().sqrt() / norm_w).expand(w.shape).clone()

    return _each(ratio, c.weights, c.gradient)


RIVALS: dict[str, Rival] = {
    rival.__name__: rival for rival in (gradient, snip, gem, gallop, gps, grft, lift, wanda, auto_rgn)
}


def _each(function: Callable[..., Tensor], *named: Named) -> dict[str, Tensor]:
    return {name: function(*(of[name] for of in named)) for name in named[0]}


def _relative(w: Tensor, g: Tensor) -> Tensor:
    return torch.div(g.abs(), w.abs() + EPSILON)


def _places(key: Tensor, *, descending: bool = False) -> Tensor:
    """The place of each element in the order along the last axis, less ½: ½, 1½, …; float64."""
    return key.argsort(dim=-1, stable=True, descending=descending).argsort(dim=-1).double() + 0.5


def _apportioned(keys: Named, shares: dict[str, float]) -> dict[str, Tensor]:
    """Score so that the n highest hold of each tensor a number in proportion to its share, its highest keys.

    The i-th highest scores share / (i - ½): Sainte-Laguë's apportionment, for every n at once. Once a tensor is used
    up, the others share the rest.
    """
    return {
        name: (shares[name] / _places(key.flatten(), descending=True)).view(key.shape) for name, key in keys.items()
    }


def _by_row(keys: Named) -> dict[str, Tensor]:
    """Score so that the lowest hold the same share of every row, its lowest keys; rows take turns by key.

    The j-th lowest of L elements in a row stands at (j - ½) / L; elements are ranked by that, then by key. A row is the
    elements of a parameter with the same first index, and for a weight its bias too.
    """
    levels: dict[str, Tensor] = {}
    for name, key in keys.items():
        module, dot, own = name.rpartition(".")
        bias = module + dot + own.replace("weight", "bias")
        has_bias = bias != name and bias in keys and key.dim() > 0 and keys[bias].shape == key.shape[:1]
        if name not in levels:
            names = [name, bias] if has_bias else [name]
            parts = [keys[of].reshape(len(key) if key.dim() else 1, -1) for of in names]
            row = torch.cat(parts, 1)
            level = _places(row) / row.shape[1]
            levels.update(zip(names, level.split([part.shape[1] for part in parts], 1), strict=True))
    by_key = torch.cat([key.flatten() for key in keys.values()]).argsort(stable=True)
    order = by_key[torch.cat([levels[name].flatten() for name in keys])[by_key].argsort(stable=True)]
    rank = order.argsort().double().split([key.numel() for key in keys.values()])
    return {name: ranks.view(key.shape) for (name, key), ranks in zip(keys.items(), rank, strict=True)}


@contextmanager
def _watched(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Set evaluation mode and sum the squared inputs of Linear and convolutions; restore buffers and flags.

    Yields:
        ``{name of the weight: (n_in,)}``, float64, of all that has passed so far.
    """
    squares: dict[str, Tensor] = {}
    names = {p: name for name, p in parameters.items()}

    def add(module: Any, args: tuple[Tensor, ...]) -> None:
        name, n_after = names[module.weight], module.weight.dim() - 2  # a convolution's positions follow its channels
        features = args[0].detach().double().movedim(-1 - n_after, 0).flatten(1)
        square = features.square().sum(1)
        squares[name] = squares[name] + square if name in squares else square

    training = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    watched = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hooks = [m.register_forward_pre_hook(add) for m in watched if m.weight in names and getattr(m, "groups", 1) == 1]
    try:
        model.eval()
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
