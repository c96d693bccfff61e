"""`Decision`: which elements are frozen, and by what scores. `decide` makes it from what was observed.

Tensors and numbers in, tensors and numbers out: no module, optimizer or trainer is known here.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gcfreeze import _torch, orderings, selection
from lightning_gcfreeze._aside import put_aside
from lightning_gcfreeze._computed import Computed, Cut, cuts, part
from lightning_gcfreeze._masks import PackedMasks
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards
from lightning_gcfreeze.observing import Observing
from lightning_gcfreeze.planning.budget import Budget


@dataclass
class Decision:
    """The decision at t0, and what it was based on. Tensors go by parameter name and have its (local) shape."""

    frozen: Named
    """bool, True = held constant: packed, each is unpacked when it is asked for."""
    scores: Named
    """The order; the lowest scores are frozen. Large ones are in a file, see `_aside`."""
    variance: Named
    """The diagonal of C_t0: the very same mapping as `scores` where these are the variances. In a file, too."""
    matrix: Tensor | None
    """C_t0, (p, p), if it was kept."""
    observed: int
    """Steps in C_t0."""
    skipped: int
    """Steps that were left out of it."""
    uses_per_step: dict[str, int]
    """By name of a weight, at how many positions of a step's batch it is applied, where that was counted."""
    n_frozen: dict[str, int]
    """By name, how many elements are frozen, on all processes."""
    n_without_gradient: int
    """How many elements froze first because they never had a gradient: no noise, and nothing scored lower. A dead unit,
    an embedding row that did not occur and an unused parameter look like this; they have not converged."""
    shapes: dict[str, torch.Size]
    """Of the whole parameters."""
    shards: Shards
    """How the parameters lie on the processes."""

    @classmethod
    def given(cls, frozen: Named, shapes: Mapping[str, torch.Size], shards: Shards) -> "Decision":
        """Return the decision to freeze what somebody chose: there are no scores and no statistics.

        Args:
            frozen: ``{name: bool (*p.shape)}``, of sharded parameters the local parts.
            shapes: of the whole parameters.
            shards: how the parameters lie on the processes.
        """
        return cls(
            frozen=PackedMasks(frozen.items()), scores={}, variance={}, matrix=None, observed=0, skipped=0,
            uses_per_step={}, n_frozen=shards.n_marked(frozen), n_without_gradient=0, shapes=dict(shapes),
            shards=shards,
        )  # fmt: skip

    @property
    def count(self) -> int:
        """The number of frozen elements."""
        return sum(self.n_frozen.values())

    @property
    def n_eligible(self) -> int:
        """The number of eligible elements."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def fraction(self) -> float:
        """Frozen elements / eligible elements."""
        return self.count / max(1, self.n_eligible)

    @property
    def fractions(self) -> dict[str, float]:
        """Frozen elements of each parameter / its elements."""
        return {name: self.n_frozen[name] / max(shape.numel(), 1) for name, shape in self.shapes.items()}

    def with_k(self, k: int, granularity: Granularity) -> "Decision":
        """Return the decision for another k along the same order."""
        frozen = PackedMasks(selection.marks(self.scores, k, granularity, self.shards))
        return replace(self, frozen=frozen, n_frozen=self.shards.n_marked(frozen))

    def sentence(self, steps: int) -> str:
        """Return what was decided after so many optimizer steps, for the log."""
        when = f"after {steps:,} optimizer steps" if self.scores else "from the first step on"
        unseen = f" {self.skipped:,} of these steps could not be observed." if self.skipped else ""
        some = f"{self.count:,} of {self.n_eligible:,} eligible elements ({self.fraction:.1%})"
        return f"{some} are frozen {when}.{unseen}"

    def doubts(self, k: int, given_k: object, granularity: Granularity, read: Collection[str] = ()) -> list[str]:
        """Return sentences to warn with.

        Args:
            k: how many elements were to freeze.
            given_k: `k` as the user gave it.
            granularity: what freezes together.
            read: `orderings.FROM_OPTIMIZER` that alone tell who had a gradient: means that decay forget, and so does
                a movement that counts from halfway.
        """
        found = []
        if k and not self.count:
            found.append(
                f"Nothing was frozen: the first {granularity} in the order has more than `k={given_k}` allows, {k:,}"
                " elements. Raise `k`, or choose a finer `granularity`."
            )
        if self.n_without_gradient > 0.1 * k:
            seen = f" in the {self.observed} observed steps"
            causes, why = (
                "constant inputs, dead units, unseen embedding rows, unused parameters",
                "they had no gradient",
            )
            if "movement" in read:
                seen, why = ", or have not moved since halfway to this step", "they did not move"
                causes += ", a learning rate of 0, steps that round to none in their dtype"
            elif read:
                seen = ", or none that the state of the optimizer still tells of"
            found.append(
                f"{self.n_without_gradient:,} of the {self.count:,} frozen elements never had a gradient{seen}"
                f" ({causes}). They rank lowest because {why}, not because they converged. Raise `t0`, or keep them"
                " trainable with `exclude`."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, whole tensors on the CPU of rank 0 where parameters are sharded.

        Keys: ``frozen`` {name: bool (*p.shape)}; ``scores`` {name: real (*p.shape)}; ``variance`` {name: float
        (*p.shape)}, or None if it is ``scores``; ``matrix`` (p, p) or None; ``observed``, ``skipped``,
        ``n_without_gradient`` int; ``uses_per_step`` {name: int}.
        """
        return {
            "frozen": self.shards.whole(self.frozen),
            "scores": self.shards.whole(self.scores),
            "variance": None if self.variance is self.scores else self.shards.whole(self.variance),
            "matrix": self.matrix,
            "observed": self.observed,
            "skipped": self.skipped,
            "n_without_gradient": self.n_without_gradient,
            "uses_per_step": self.uses_per_step,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Decision":
        """Return the decision that `state_dict` was taken of, with whole tensors; see `to`."""
        given = {**state, "variance": state["scores"] if state["variance"] is None else state["variance"]}
        shapes = {name: mask.shape for name, mask in state["frozen"].items()}
        return cls(**given, n_frozen=UNSHARDED.n_marked(state["frozen"]), shapes=shapes, shards=UNSHARDED)

    def to(self, parameters: Named, shards: Shards) -> None:
        """Keep only the local parts of loaded tensors, on the devices of the parameters."""
        cut = dict if self.shards is shards else shards.parts  # they may be local parts already

        def there(named: Named) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named.items():
                yield name, cut({name: tensor})[name].to(parameters[name].device)

        scores, nbytes = self.scores, _nbytes(self.scores)
        self.shards, self.frozen = shards, PackedMasks(there(self.frozen))
        self.scores = put_aside(there(scores), nbytes)
        is_scores = self.variance is scores
        self.variance = self.scores if is_scores else put_aside(there(self.variance), _nbytes(self.variance))


def scores_now(
    observing: Observing,
    ordering: orderings.Ordering,
    weights: Named,
    seed: int,
    granularity: Granularity,
    moments: Mapping[str, Named] | None = None,
) -> Named:
    """Return the ordering's scores by the evidence so far, in the order of the parameters, which decides ties.

    Elements that freeze together have the same score: the mean of what the ordering gave them.

    Raises:
        ValueError: the ordering did not score every element, or with NaN.
    """
    with _open(observing.evidence(weights, seed, granularity, moments)) as evidence:
        return scored(ordering, evidence, weights)


def decide(
    observing: Observing,
    ordering: orderings.Ordering,
    weights: Named,
    seed: int,
    k: int,
    granularity: Granularity = "element",
    uses_per_step: Mapping[str, int] | None = None,
    keep: Named | None = None,
    moments: Mapping[str, Named] | None = None,
    held: Named | None = None,
    costs: Mapping[str, int] | None = None,
    budget: Budget | None = None,
) -> Decision:
    """Rank the elements and mark the k lowest, Eq. (2.7); the same on all processes, which is checked.

    Args:
        observing: the statistics, the same on all processes that have an element.
        ordering: gives the scores.
        weights: the parameters now; of sharded ones the local parts.
        seed: of the random order.
        k: how many elements to mark; of rows and tensors as many as fit.
        granularity: what freezes together.
        uses_per_step: see `Decision`.
        keep: ``{name: bool (*p.shape)}``, elements that are frozen in any case, before all others.
        moments: fields of `orderings.Evidence` that were not observed, ``{field: {name: (*p.shape)}}``.
        held: ``{name: bool (*p.shape)}``, elements that are frozen until now, of which `moments` know nothing.
        costs: how often a step uses the weights that "mixed" may cut to blocks; see `selection.in_blocks`.
        budget: for which at least k elements are marked, of rows and tensors as well; by "mixed" as many more as its
            `work` asks for.

    Raises:
        ValueError: the ordering did not score every element, or with NaN; or below 0, with "mixed".
        RuntimeError: processes would freeze different elements.
    """
    shards = observing.shards
    with _open(observing.evidence(weights, seed, granularity, moments)) as evidence:
        scores = given = scored(ordering, evidence, weights)
        if keep is not None:
            kept = ((name, score.double().masked_fill(keep[name], -math.inf)) for name, score in given.items())
            scores = put_aside(kept, 8 * sum(w.numel() for w in weights.values()))
        if granularity == "mixed":
            work = budget.work if budget else None
            scores = put_aside(selection.in_blocks(scores, k, costs or {}, work), _nbytes(scores))
            if work is not None:
                k = max(k, sum(int((score < 0).count_nonzero()) for score in scores.values()))
        frozen = PackedMasks(selection.marks(scores, k, granularity, shards, at_least=budget is not None))
        shards.check_agreement(frozen)
        variance = scores
        if ordering is not orderings.variance or granularity != "element" or keep is not None:
            variance = put_aside(
                evidence.variance.items(), _nbytes({name: weights[name] for name in evidence.variance})
            )
    return Decision(
        frozen=frozen,
        scores=scores,
        variance=variance,
        matrix=observing.matrix,
        observed=observing.observed,
        skipped=observing.skipped,
        uses_per_step=dict(uses_per_step or {}),
        n_frozen=shards.n_marked(frozen),
        n_without_gradient=_n_without_gradient(frozen, given, observing.activity(weights, moments, held), shards),
        shapes=observing.shapes,
        shards=shards,
    )


@contextmanager
def _open(evidence: orderings.Evidence) -> Iterator[orderings.Evidence]:
    """Let evidence be read until the end of the context."""
    try:
        yield evidence
    finally:
        for field in fields(evidence):
            if isinstance(named := getattr(evidence, field.name), Computed):
                named.close()


def scored(ordering: orderings.Ordering, evidence: orderings.Evidence, weights: Named) -> Named:
    """Return the scores of elements, or the mean scores of units, each put aside before the next is computed.

    All processes must call it. What fails on one raises on all.

    Args:
        ordering: gives the scores.
        evidence: what it may look at; the package's own orderings ask for pieces, so mappings must be `Computed`.
        weights: the parameters, for names and shapes.

    Raises:
        ValueError: the ordering did not score every element, or with NaN.
    """
    failure, granularity, shards = None, evidence.granularity, evidence.shards
    found: Mapping[str, Tensor] = {}
    units = []
    try:
        given = _given(ordering, evidence, weights)
        if selection.has_units(granularity):
            for name, score in given:
                units.append(selection.unit_sums(name, score, granularity, shards))
                del score  # before the next one is computed
        else:
            found = put_aside(given, _nbytes(weights))
    except Exception as error:
        failure = error
    if shards.world.any(failure is not None):  # else the other processes would wait
        raise failure or RuntimeError("`order` failed on another process; see its error.")
    return dict(selection.means(units)) if selection.has_units(granularity) else found


def _given(ordering: orderings.Ordering, evidence: orderings.Evidence, weights: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield what an ordering scores, checked, in the order of the parameters; the tensors are nobody else's."""
    if any(ordering is known for known in orderings.BY_ELEMENT):
        for name, w in weights.items():
            score = _in_pieces(ordering, evidence, name, w)
            selection.check_score(name, score, w.shape)
            yield name, score
            del score  # before the next one is computed
        return
    given = ordering(evidence)
    selection.check_scores(given, weights)
    scores = dict(given)
    del given
    for name, w in weights.items():
        score = scores.pop(name).detach()
        # A copy may share the weight's memory: then the next step, which writes to the weight, would move it elsewhere.
        yield name, score.clone() if _torch.has_same_memory(w, score) else score


def _in_pieces(ordering: orderings.Ordering, evidence: orderings.Evidence, name: str, w: Tensor) -> Tensor:
    """Return an ordering's score of one parameter, a piece of it after the other."""
    computed = {
        field.name: named for field in fields(evidence) if isinstance(named := getattr(evidence, field.name), Computed)
    }

    def score(cut: Cut) -> Tensor:
        pieces = {field: named.only(name, cut) for field, named in computed.items()}
        return ordering(replace(evidence, **pieces))[name].detach()  # type: ignore[arg-type]

    first, *others = cuts(w)
    found = score(first)
    if not others:
        return found
    whole = torch.empty_like(w, dtype=found.dtype)
    first(whole).copy_(found)
    for cut in others:
        cut(whole).copy_(score(cut))
    return whole


def _n_without_gradient(frozen: Named, scores: Named, activity: Named, shards: Shards) -> int:
    own = min((_min(scores[name]) for name, mask in frozen.items() if mask.numel()), default=math.inf)
    least = float(shards.element_world.all_reduce_min(torch.tensor(own, dtype=torch.float64)))
    count = 0
    for name, mask in frozen.items():
        if shards.is_counted_here(name):
            score = scores[name]
            for cut in cuts(mask):
                dead = cut(mask) & (cut(score) == least)
                count += int((dead & (part(activity, name, cut) == 0)).count_nonzero()) if dead.any() else 0
            del score
    return int(shards.element_world.all_reduce_sum(torch.tensor(count)))


def _min(score: Tensor) -> float:
    """Return the minimum, of some rows at a time: of a view of one number a row, `min` makes a whole tensor."""
    return min(float(cut(score).min()) for cut in cuts(score))


def _nbytes(named: Named) -> int:
    """Return the bytes of tensors of these shapes in float32, or wider."""
    return sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in named.values())
