"""The paper's experiments, with the controls that it lacks: ``python -m examples.paper``."""
