"""Type aliases as their values: ``Literal["element", "row", "tensor", "mixed"]`` and not ``Granularity``."""

import dataclasses
from typing import Any

import griffe

_SHOWN = {"lightning_gcfreeze.orderings.Ordering", "lightning_gcfreeze.masks.resolving.Masks"}
"""Aliases that have a place in docs/api/ themselves, so that a name says enough."""


class ExpandAliases(griffe.Extension):
    """Replace the package's type aliases in all annotations by what they stand for."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through a package. Called by Griffe when it has loaded all modules."""
        if pkg.name == "lightning_gcfreeze":
            _walk(pkg, pkg)


def _walk(parent: griffe.Object, package: griffe.Module) -> None:
    for member in parent.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Function):
            member.returns = _expanded(member.returns, package)
            for parameter in member.parameters:
                parameter.annotation = _expanded(parameter.annotation, package)
        elif isinstance(member, griffe.Attribute):
            member.annotation = _expanded(member.annotation, package)
        elif isinstance(member, griffe.Class | griffe.Module):
            _walk(member, package)


def _expanded(expression: Any, package: griffe.Module) -> Any:
    if isinstance(expression, griffe.ExprName | griffe.ExprAttribute):
        value = _value(expression.canonical_path, package)
        return expression if value is None else _expanded(value, package)
    if isinstance(expression, list | tuple):
        return type(expression)(_expanded(part, package) for part in expression)
    if isinstance(expression, griffe.Expr):
        parts = {f.name: getattr(expression, f.name) for f in dataclasses.fields(expression) if f.init}
        return dataclasses.replace(expression, **{name: _expanded(part, package) for name, part in parts.items()})
    return expression


def _value(path: str, package: griffe.Module) -> griffe.Expr | None:
    """Return what a type alias of the package stands for, and None for any other name."""
    if not path.startswith(f"{package.name}."):
        return None
    found = package.modules_collection[path]
    if found.is_alias:
        try:
            found = found.final_target
        except griffe.AliasResolutionError:  # of another package
            return None
    is_alias = isinstance(found, griffe.Attribute) and found.parent.is_module and found.path not in _SHOWN
    return found.value if is_alias and not isinstance(found.value, griffe.ExprCall) else None
