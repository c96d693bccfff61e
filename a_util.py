def measure(m):
    return float(sum(p.grad.abs().sum() for p in m.parameters() if p.grad is not None))
