"""What observing and freezing cost on a GPU; see `benchmarks.gpu.command`."""

from benchmarks.gpu.command import main

__all__ = ["main"]
