"""Optimizers that people train with, and how each is to be held: a table, and the page of the docs made from it."""

from tests.optimizers.case import Case, find
from tests.optimizers.table import LEFT_OUT, LIBRARIES, TABLE

__all__ = ["LEFT_OUT", "LIBRARIES", "TABLE", "Case", "find"]
