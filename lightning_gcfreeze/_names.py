"""Names: of parameters in messages, short lists of them and what a pattern may have meant; of an object's classes."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def shortened(names: Iterable[str], most: int = 5) -> str:
    """Return the first `most` names, and how many more there are."""
    listing = list(names)
    return ", ".join(listing[:most]) + (f" and {len(listing) - most} more" if len(listing) > most else "")


def class_names(value: object) -> set[str]:
    """Return the names of an object's class and of its parents, which tell what it is without its package."""
    return {cls.__name__ for cls in type(value).__mro__}


def closest(pattern: str, names: Collection[str]) -> str:
    """Return a pattern that matches nothing, with a few of the names that it may have meant."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{pattern!r} (a prefix is written '{pattern}.*')"
    likely = get_close_matches(pattern, names, n=3, cutoff=0.5) or get_close_matches(
        pattern, {f"*.{name.rpartition('.')[2]}" for name in names}, n=3, cutoff=0.5
    )
    likely = likely or list(names)[:3]
    return f"{pattern!r} (closest: {', '.join(map(repr, likely))})"
