"""Small snapshots of each kind of model that the experiments have."""

import numpy as np
import torch

from examples.models import LinearRegression, LogisticRegression, MLPClassifier, MLPRegressor
from examples.paper import related

MODELS = {
    "linear": lambda: LinearRegression(6),
    "logistic": lambda: LogisticRegression(6),
    "regressor": lambda: MLPRegressor(6, (5,)),
    "classifier": lambda: MLPClassifier(6, 3, (5,)),
}


def snapshot(kind, objects=40, seed=0, weights=None, scale=1.0, observe=None):
    """A model at random weights, correlated features of unequal size, and targets that depend on them."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(6, 6)) * [0.3, 0.6, 1.0, 1.0, 1.5, 3.0]
    x = random.normal(size=(objects, 6)) @ (np.diag([0.5, 1, 1, 1, 2, 2]) + 0.3 * mixed)
    signal = x @ np.array([0.0, 3.0, -1.0, 0.1, 0.5, 0.02])
    y = {
        "linear": signal + random.normal(size=objects),
        "regressor": np.abs(signal) + random.normal(size=objects),
        "logistic": (random.random(objects) < 1 / (1 + np.exp(-signal))).astype(int),
        "classifier": np.digitize(signal + random.normal(size=objects), [-1, 1]),
    }[kind]
    torch.manual_seed(seed)
    model = MODELS[kind]()
    w = torch.nn.utils.parameters_to_vector(model.parameters()).detach() * scale if weights is None else weights
    return related.take(model, w, (torch.as_tensor(x), torch.as_tensor(y)), seed, observe)


def gauss_newton(at):
    """1/n Σ_s J_sᵀ R_s J_s in NumPy, by a loop over objects and outputs, R_s being autograd's Hessian of one loss."""
    total = 0.0
    for x, y in zip(at.x, at.y, strict=True):
        w = at.weights.clone().requires_grad_()
        outputs = at.output(w, x[None])
        rows = [torch.autograd.grad(output, w, retain_graph=True)[0] for output in outputs.flatten()]
        curvature = torch.autograd.functional.hessian(lambda o, y=y: at.model.loss(o, y[None]), outputs.detach())
        jacobian = torch.stack(rows)
        total = total + jacobian.T @ curvature.reshape(len(rows), len(rows)) @ jacobian
    return (total / len(at.x)).numpy()
