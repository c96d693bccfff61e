"""Orderings against NumPy, and which objects are accepted as orderings."""

import numpy as np
import pytest
import torch

from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze.orderings import Evidence

SHAPES = {"scalar": (), "vector": (4,), "matrix": (2, 3)}


@pytest.fixture
def arrays():
    """Every field of the evidence as NumPy arrays; the weights, means and starts of either sign."""
    draw = np.random.default_rng(3)
    fields = (
        "variance",
        "weights",
        "mean",
        "second_moment",
        "start",
        "recent_mean",
        "momentum",
        "update",
        "divisor",
        "movement",
    )
    found = {field: {name: draw.normal(size=shape) for name, shape in SHAPES.items()} for field in fields}
    for field in ("variance", "second_moment"):
        found[field] = {name: np.square(array) for name, array in found[field].items()}
    return found


def evidence_of(arrays, seed=0):
    return Evidence(seed=seed, **{f: {n: torch.tensor(a) for n, a in named.items()} for f, named in arrays.items()})


ORACLES = {
    "variance": lambda a, n: a["variance"][n],
    "reverse": lambda a, n: -a["variance"][n],
    "magnitude": lambda a, n: np.abs(a["weights"][n]),
    "second_moment": lambda a, n: a["second_moment"][n],
    "snr": lambda a, n: np.abs(a["mean"][n]) / np.sqrt(a["variance"][n]),
    "displacement": lambda a, n: np.abs(a["weights"][n] - a["start"][n]),
    "momentum": lambda a, n: a["momentum"][n] * a["update"][n],
    "movement": lambda a, n: a["movement"][n] ** 2 * a["divisor"][n],
    "progress": lambda a, n: a["recent_mean"][n] ** 2 / np.sqrt(a["second_moment"][n]),
}


@pytest.mark.parametrize("name", [*ORACLES, "random"])
def test_named_ordering_gives_the_scores_of_numpy_and_does_not_modify_evidence(name, arrays):
    """One score per element; the oracle is a formula in NumPy."""
    evidence = evidence_of(arrays)
    scores = orderings.ORDERINGS[name](evidence)
    selection.check_scores(scores, evidence.weights)
    for parameter in SHAPES:
        if name in ORACLES:
            oracle = torch.as_tensor(ORACLES[name](arrays, parameter))
            torch.testing.assert_close(scores[parameter], oracle, rtol=1e-14, atol=0)
        for field, named in arrays.items():
            assert np.array_equal(getattr(evidence, field)[parameter].numpy(), named[parameter]), field


def test_every_named_ordering_has_an_oracle_above():
    """A new ordering needs a line there; "random" has tests of its own."""
    assert orderings.ORDERINGS.keys() == ORACLES.keys() | {"random"}


def test_ranks_by_reverse_are_those_by_variance_backwards(arrays):
    """Without equal variances, the ranks by one order are p + 1 minus those by the other."""
    evidence = evidence_of(arrays)
    forwards = selection.ranks(orderings.variance(evidence))
    backwards = selection.ranks(orderings.reverse(evidence))
    elements = sum(v.numel() for v in evidence.variance.values())
    for name in SHAPES:
        assert torch.equal(backwards[name], elements + 1 - forwards[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_snr_of_elements_that_never_moved_is_0_and_of_a_mean_without_noise_infinite(dtype):
    """0/0, a gradient that is always 0, comes first; a mean without noise comes last."""
    mean = torch.tensor([0.0, 3.0, 0.0, -2.0, -0.0], dtype=dtype)
    variance = torch.tensor([0.0, 0.0, 4.0, 4.0, 0.0], dtype=dtype)
    scores = orderings.snr(Evidence({"w": variance}, {"w": mean}, seed=0, mean={"w": mean}))
    assert scores["w"].tolist() == [0.0, float("inf"), 0.0, 1.0, 0.0]
    assert selection.ranks(scores)["w"].tolist() == [1, 5, 2, 4, 3]


def test_progress_of_elements_that_never_moved_is_0():
    """0/0 gives 0, not NaN; the scores of the others are above that."""
    zero, some = torch.zeros(3), torch.tensor([0.0, 2.0, 4.0])
    evidence = {"dead": zero, "w": some}
    found = orderings.progress(Evidence({}, evidence, seed=0, recent_mean=evidence, second_moment=evidence))
    assert found["dead"].tolist() == [0.0, 0.0, 0.0]
    assert found["w"][0] == 0.0 < found["w"][1]


class TestRandom:
    """The random order, which must be the same on all processes."""

    @staticmethod
    def scores(seed, shapes=((2, 3), (4,)), dtype=torch.float32):
        weights = {f"w{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
        return orderings.random(Evidence({}, weights, seed))

    def test_depends_on_the_seed_only(self):
        """Not on the weights, their dtype or the global stream; another seed gives another order."""
        first = self.scores(seed=5)
        torch.manual_seed(999)
        again = self.scores(seed=5, dtype=torch.bfloat16)
        other = self.scores(seed=6)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)

    def test_draws_one_number_per_unit(self):
        """A mean of many draws would put large tensors in the middle of the order, and biases at its ends."""
        weights = {"m": torch.zeros(3, 4), "v": torch.zeros(5), "s": torch.zeros(())}
        rows = orderings.random(Evidence({}, weights, 1, granularity="row"))
        tensors = orderings.random(Evidence({}, weights, 1, granularity="tensor"))
        assert {name: score.shape for name, score in rows.items()} == {n: w.shape for n, w in weights.items()}
        assert (rows["m"] == rows["m"][:, :1]).all()
        assert len({float(value) for score in rows.values() for value in score.flatten()}) == 3 + 5 + 1
        assert len({float(value) for score in tensors.values() for value in score.flatten()}) == 3

    def test_does_not_change_the_global_stream(self):
        """Drawing an order does not advance the generator of torch; drawing a number does."""
        before = torch.get_rng_state()
        orderings.random(Evidence({}, {"w": torch.zeros(10)}, seed=0))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        assert not torch.equal(torch.get_rng_state(), before)

    def test_draws_the_same_numbers_however_elements_are_split_into_tensors(self):
        """The same 12 numbers for 12 elements in one tensor and in three."""
        apart = self.scores(seed=5, shapes=[(2, 3), (), (5,)])
        together = self.scores(seed=5, shapes=[(12,)])
        assert torch.equal(torch.cat([s.flatten() for s in apart.values()]), together["w0"])

    def test_is_uniform(self):
        """Over 400 seeds each of 5 elements comes first about as often (80 ± 8, here within 5 standard errors)."""
        firsts = [int(self.scores(seed, shapes=[(5,)])["w0"].argmin()) for seed in range(400)]
        assert all(abs(firsts.count(i) - 80) < 40 for i in range(5))


class Custom:
    """An ordering that is an object, and declares the fields that it reads."""

    needs = ("start", "mean")

    def __call__(self, evidence):
        return evidence.weights


@pytest.mark.parametrize(
    ("ordering", "fields"),
    [
        (orderings.variance, set()),
        (orderings.second_moment, {"second_moment"}),
        (orderings.snr, {"mean"}),
        (orderings.displacement, {"start"}),
        (orderings.momentum, {"momentum", "update"}),
        (Custom(), {"start", "mean"}),
        (lambda evidence: evidence.weights, set()),
    ],
    ids=["variance", "second_moment", "snr", "displacement", "momentum", "object", "lambda"],
)
def test_ordering_declares_the_optional_fields_that_it_reads(ordering, fields):
    """Only these are collected; an ordering without `needs` reads none of them."""
    assert set(orderings.needed_by(ordering)) == fields
    assert orderings.resolve(ordering) is ordering


@pytest.mark.parametrize("name", orderings.ORDERINGS)
def test_named_ordering_scores_the_same_without_fields_that_it_does_not_declare(name, arrays):
    """These are None in a run."""
    ordering = orderings.resolve(name)
    fewer = {f: arrays[f] for f in arrays if f not in orderings.OPTIONAL_FIELDS or f in orderings.needed_by(ordering)}
    with_all, with_few = ordering(evidence_of(arrays)), ordering(evidence_of(fewer))
    assert all(torch.equal(with_all[parameter], with_few[parameter]) for parameter in SHAPES)


def test_optional_fields_are_those_of_evidence_that_may_be_none():
    """`needs` may name exactly these."""
    optional = {name for name, field in Evidence.__dataclass_fields__.items() if field.default is None}
    assert optional == orderings.OPTIONAL_FIELDS


def test_unknown_name_is_refused_with_the_known_names():
    """The error lists every ordering."""
    known = ", ".join(map(repr, orderings.ORDERINGS))
    with pytest.raises(ValueError, match=rf"`order` must be one of {known}, or a callable, got 'varience'"):
        orderings.resolve("varience")


@pytest.mark.parametrize("name", ["variance_by_tensor", "variance_by_second_moment", "variance_by_magnitude"])
def test_name_of_a_removed_ordering_is_refused_with_its_replacement(name):
    """As a checkpoint or a configuration file of an earlier version may have it."""
    with pytest.raises(ValueError, match=rf"`order='{name}'` is no longer part.*docs/orders\.md.*takes any callable"):
        orderings.resolve(name)


@pytest.mark.parametrize("order", [None, 3, ["variance"]], ids=repr)
def test_order_that_is_neither_name_nor_callable_is_refused(order):
    """The error says what a callable has to do."""
    with pytest.raises(TypeError, match=r"'variance'.*or a callable that takes `Evidence` and returns scores.*got"):
        orderings.resolve(order)


def test_unknown_field_in_needs_is_refused():
    """Nobody would collect it, so it would be missing at t0."""

    @orderings.needs("mean", "median")
    def ordering(evidence):
        return evidence.mean

    known = r"\['divisor', 'mean', 'momentum', 'movement', 'recent_mean', 'second_moment', 'start', 'update'\]"
    with pytest.raises(ValueError, match=rf"`order.needs` may name {known}, got \['median"):
        orderings.resolve(ordering)
