"""What loggers get of `GradCovFreezeCallback(t0=6, k=0.5)`."""

OURS = {
    "gcfreeze/t0": 6,
    "gcfreeze/k": 0.5,
    "gcfreeze/order": "variance",
    "gcfreeze/granularity": "element",
    "gcfreeze/hold": "auto",
    "gcfreeze/every": 1,
    "gcfreeze/samples": "auto",
}
