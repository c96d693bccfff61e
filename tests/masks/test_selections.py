"""Selections against explicit loops over every element, and what they say where a wish fits nothing."""

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_gcfreeze.distributed import UNSHARDED
from lightning_gcfreeze.masks import at_random, everything, layer, lowest, pattern, resolve, rows, save_order


class Encoder(nn.Module):
    """Tensors of zero to three axes, a layer within a layer, and names of which one begins as another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.embed_norm = nn.LayerNorm(3)
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False)))
        self.scale = nn.Parameter(torch.ones(()))
        self.cube = nn.Parameter(torch.ones(2, 3, 2))


SHAPES = {name: tuple(p.shape) for name, p in Encoder().named_parameters()}
Elements = set[tuple[str, tuple[int, ...]]]


def elements(where: Any) -> Elements:
    """All elements of which `where(name, index)` says so, one by one."""
    return {
        (name, index)
        for name, shape in SHAPES.items()
        for index in itertools.product(*map(range, shape))
        if where(name, index)
    }


def chosen(selection: Any, module: nn.Module | None = None) -> Elements:
    """The elements that a selection marks in a module."""
    module = module or Encoder()
    found = resolve(selection, module, dict(module.named_parameters()), UNSHARDED)
    assert {name: (tuple(m.shape), m.dtype) for name, m in found.items()} == {
        name: (tuple(p.shape), torch.bool) for name, p in module.named_parameters()
    }
    return {(name, tuple(index)) for name, mask in found.items() for index in np.argwhere(mask.numpy()).tolist()}


EVERYTHING = elements(lambda name, index: True)
EMBED = "embed.weight"


@pytest.mark.parametrize(
    "indices",
    [
        [1, 4], (1, 4), {1, 4}, [4, 1, 4, 4], [-5, 4], [-5, -2], range(1, 5, 3), iter([1, 4]),
        np.array([1, 4]), np.array([1, 4], dtype=np.int32), np.array([False, True, False, False, True, False]),
        torch.tensor([1, 4]), torch.tensor([4, 1], dtype=torch.int16), [torch.tensor(1), torch.tensor(4)],
        [False, True, False, False, True, False], torch.tensor([False, True, False, False, True, False]),
        [np.int64(1), np.int64(4)], [np.bool_(i in (1, 4)) for i in range(6)],
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_those_of_the_indices_in_any_form(indices):
    """Lists, sets, iterators, ranges, arrays and tensors, of ints or of bools; negative ones count from the end."""
    assert chosen(rows(EMBED, indices)) == elements(lambda name, index: name == EMBED and index[0] in (1, 4))


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape])
def test_rows_are_slices_along_the_first_axis_of_any_parameter(name):
    """Of vectors, matrices and more."""
    assert chosen(rows(name, [1])) == elements(lambda n, index: n == name and index[0] == 1)


def test_rows_change_no_more_once_they_are_chosen():
    """The caller's tensor may be used again."""
    indices = torch.tensor([1, 4])
    selection = rows(EMBED, indices)
    indices.zero_()
    assert chosen(selection) == elements(lambda name, index: name == EMBED and index[0] in (1, 4))


def test_patterns_and_layers_are_of_whole_parameters():
    """A layer's name is no prefix of another's: "embed" is not "embed_norm"."""
    assert chosen(everything()) == EVERYTHING
    assert chosen(pattern("*.bias", "cube")) == elements(lambda name, index: name.endswith(".bias") or name == "cube")
    assert chosen(pattern("[be]*.weight")) == elements(lambda n, index: n[0] in "be" and n.endswith(".weight"))
    assert chosen(layer("embed")) == elements(lambda name, index: name == EMBED)
    assert chosen(layer("block.1", "embed_norm")) == elements(
        lambda name, index: name.startswith(("block.1.", "embed_norm."))
    )
    assert chosen(layer("block")) == elements(lambda name, index: name.startswith("block."))


def test_operators_are_those_of_sets():
    """Any combination of three selections."""
    a, b, c = rows(EMBED, [0, 1, 2]), pattern("*.weight"), rows(EMBED, [2, 5]) | layer("block.0")
    of_a = elements(lambda name, index: name == EMBED and index[0] in (0, 1, 2))
    of_b = elements(lambda name, index: name.endswith(".weight"))
    of_c = elements(lambda name, index: (name == EMBED and index[0] in (2, 5)) or name.startswith("block.0."))
    for x, y in itertools.permutations([(a, of_a), (b, of_b), (c, of_c)], 2):
        assert chosen(x[0] | y[0]) == x[1] | y[1]
        assert chosen(x[0] & y[0]) == x[1] & y[1]
        if x[1] - y[1]:
            assert chosen(x[0] - y[0]) == x[1] - y[1]
    assert chosen(~a) == EVERYTHING - of_a
    assert chosen(~(a | c) - b | (a & c)) == (EVERYTHING - (of_a | of_c)) - of_b | (of_a & of_c)
    assert chosen(everything() - rows(EMBED, [])) == EVERYTHING


@pytest.mark.parametrize("other", [{EMBED: True}, "embed.weight", None, True], ids=str)
def test_operators_take_selections_only(other):
    """At once, not when training starts."""
    for operator in ("__or__", "__and__", "__sub__"):
        assert getattr(everything(), operator)(other) is NotImplemented
    with pytest.raises(TypeError, match="unsupported operand"):
        everything() | other


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (rows("embed.wieght", [1]), r"no eligible parameter is named 'embed.wieght' \(closest: 'embed.weight'"),
        (rows("network.embed.weight", [1]), r"closest: 'embed.weight'"),
        (rows("scale", [0]), r"'scale' is a single number and has no rows; use `pattern\('scale'\)`"),
        (rows(EMBED, [0, 6, -7]), r"'embed.weight' has the rows 0 to 5, and no 6, -7"),
        (rows(EMBED, [True] * 5), r"'embed.weight' has 6 rows, and there are 5 bools"),
        (pattern("*.wieght"), r"no eligible parameter matches '\*.wieght' \(closest:"),
        (layer("blok"), r"no layer with eligible parameters is named 'blok' \(closest: 'block"),
        (everything() - layer("decoder"), r"no layer with eligible parameters is named 'decoder'"),
    ],
    ids=str,
)
def test_wish_that_fits_nothing_is_refused_with_what_is_closest(selection, message):
    """And with the whole selection."""
    with pytest.raises(ValueError, match=message) as caught:
        chosen(selection)
    assert f"`masks={selection!r}`: " in str(caught.value)


@pytest.mark.parametrize("nothing", [rows(EMBED, []), everything() - everything(), pattern("*.bias") & layer("embed")])
def test_selection_of_nothing_is_refused(nothing):
    """It would train as if there were no callback."""
    with pytest.raises(ValueError, match="`masks` mark nothing: no element would be frozen"):
        chosen(nothing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rows(EMBED, 3), "`indices` must be a list of ints, or a bool for each row, got 3"),
        (lambda: rows(EMBED, "13"), "`indices` must be a list of ints"),
        (lambda: rows(EMBED, None), "`indices` must be a list of ints"),
        (lambda: rows(EMBED, [1.0, 2.0]), r"got torch.float64 of \(2,\)"),
        (lambda: rows(EMBED, [[1, 2]]), r"got torch.int64 of \(1, 2\)"),
        (lambda: rows(EMBED, torch.tensor(2)), r"got torch.int64 of \(\)"),
        (lambda: rows(EMBED, torch.ones(6, dtype=torch.uint8)), "Of uint8, nobody knows which of both is meant"),
        (lambda: rows([EMBED], [1]), "`rows` takes names"),
        (lambda: pattern(), r"`pattern` takes names, one by one, got \(\)"),
        (lambda: pattern(["*.bias"]), r"A list is passed as `\*names`"),
        (lambda: layer(["block"]), "`layer` takes names, one by one"),
        (lambda: lowest("order.pt", "half"), "`k`"),
        (lambda: lowest("order.pt", True), "`k`"),
    ],
)
def test_argument_of_the_wrong_kind_is_refused_when_the_selection_is_made(make, message):
    """Not hours later, when a job starts."""
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("k", "granularity", "message"),
    [
        (-1, "element", "`k`"),
        (1.5, "element", "`k`"),
        (0.5, "rows", "`granularity` must be one of .* Did you mean 'row'"),
    ],
)
def test_argument_of_lowest_outside_its_range_is_refused(k, granularity, message):
    """Likewise."""
    with pytest.raises(ValueError, match=message):
        lowest("order.pt", k, granularity)


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
@pytest.mark.parametrize("k", [30, 0.5, 1.0])
def test_random_elements_are_as_many_as_asked_for_and_whole_units(granularity, k):
    count = k if isinstance(k, int) else round(k * len(EVERYTHING))
    found = chosen(at_random(k, granularity))
    assert len(found) == count if granularity == "element" else len(found) <= count
    assert chosen(at_random(k, granularity)) == found
    if granularity == "row":
        assert {(name, *index[:1]) for name, index in found}.isdisjoint(
            {(name, *index[:1]) for name, index in EVERYTHING - found}
        )


def test_random_elements_are_spread_evenly_and_differ_from_seed_to_seed():
    """Over 200 seeds each element is chosen in about half of them, and in no pattern with its neighbour."""
    draws = [chosen(at_random(0.5, seed=seed)) for seed in range(200)]
    times = [sum(place in draw for draw in draws) for place in EVERYTHING]
    assert min(times) > 65
    assert max(times) < 135
    assert len({frozenset(draw) for draw in draws}) == 200


def test_argument_of_at_random_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="`k`"):
        at_random(1.5)
    with pytest.raises(ValueError, match="`granularity` must be one of 'element', 'row', 'tensor', got 'mixed'"):
        at_random(0.5, "mixed")
    with pytest.raises(TypeError, match="`seed`"):
        at_random(0.5, seed="a")


class Tied(nn.Module):
    """A language model's head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 3), nn.LayerNorm(3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weight_is_found_by_either_name():
    """In every helper, and in a mapping; masks have the first name."""
    wanted = {(EMBED, (i, j)) for i in (1, 4) for j in range(3)}
    of_weight = {(EMBED, (i, j)) for i in range(6) for j in range(3)}
    mask = torch.zeros(6, 3, dtype=torch.bool).index_fill_(0, torch.tensor([1, 4]), True)
    assert chosen(rows("head.weight", [1, 4]), Tied()) == wanted
    assert chosen({"head.weight": mask}, Tied()) == wanted
    assert chosen({"head.weight": mask, "embed.weight": mask.clone()}, Tied()) == wanted
    for selection in (layer("head"), pattern("head.*"), pattern("head.weight", "embed.weight")):
        assert chosen(selection, Tied()) == of_weight
    scores = {"head.weight": torch.arange(18.0).view(6, 3), "norm.weight": torch.full((3,), 99.0)}
    assert chosen(lowest({**scores, "norm.bias": torch.full((3,), 99.0)}, 18), Tied()) == of_weight


def test_two_different_masks_of_one_tied_weight_are_refused():
    """Nobody knows which is meant."""
    with pytest.raises(ValueError, match=r"'head.weight' and another name of the same parameter, with different masks"):
        chosen({"embed.weight": True, "head.weight": False}, Tied())


def scores(kind: str) -> dict[str, Tensor]:
    """With ties, negative zeros and infinities, in several dtypes."""
    random = np.random.default_rng(4)
    if kind == "all equal":
        return {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    found = {name: torch.from_numpy(np.asarray(random.integers(-3, 3, shape), float)) for name, shape in SHAPES.items()}
    if kind == "float32 with infinities":
        found = {name: s.float() / 0 if name == "cube" else s.float() * -0.0 for name, s in found.items()}
        found["cube"].nan_to_num_(nan=1.0, posinf=torch.inf, neginf=-torch.inf)
    return found


@pytest.mark.parametrize("kind", ["with ties", "all equal", "float32 with infinities"])
@pytest.mark.parametrize("k", [1, 7, 20, 61, 0.1, 0.5, 1.0])
def test_lowest_elements_are_those_of_a_stable_argsort(tmp_path, kind, k):
    """From a file and from scores; ties go by the order of parameters, then of elements."""
    places = [(name, index) for name, shape in SHAPES.items() for index in itertools.product(*map(range, shape))]
    flat = np.concatenate([score.double().numpy().ravel() for score in scores(kind).values()])
    count = k if isinstance(k, int) else round(k * len(flat))
    expected = {places[i] for i in np.argsort(flat, kind="stable")[:count]}
    save_order(scores(kind), tmp_path / "order.pt")
    assert chosen(lowest(scores(kind), k)) == expected
    assert chosen(lowest(tmp_path / "order.pt", k)) == expected
    assert chosen(lowest(str(tmp_path / "order.pt"), k)) == expected


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("k", [10, 30, 0.5, 1.0])
def test_lowest_rows_and_tensors_are_by_their_means_as_many_as_fit(granularity, k):
    """In order up to the first that does not fit; a vector's rows are its elements."""
    random = np.random.default_rng(7)
    drawn = {name: np.asarray(random.normal(size=shape)) for name, shape in SHAPES.items()}
    units: list[tuple[float, set[Any]]] = []
    for name, values in drawn.items():
        pieces = values if granularity == "row" and values.ndim else values[None]
        for i, piece in enumerate(pieces):
            lead = (i,) if granularity == "row" and values.ndim else ()
            inside = {(name, (*lead, *index)) for index in itertools.product(*map(range, np.shape(piece)))}
            units.append((float(np.mean(piece)), inside))
    expected, left = set[Any](), k if isinstance(k, int) else round(k * len(EVERYTHING))
    for _, unit in sorted(units, key=lambda unit: unit[0]):
        if len(unit) > left:
            break
        expected, left = expected | unit, left - len(unit)
    assert expected
    order = {name: torch.from_numpy(values) for name, values in drawn.items()}
    assert chosen(lowest(order, k, granularity)) == expected


def test_order_that_does_not_fit_is_refused(tmp_path):
    """Of another model, of another shape, with NaN, or too short; a missing file says so itself."""
    good = scores("with ties")
    missing = {name: score for name, score in good.items() if name != "cube"}
    for order, message in (
        (missing, "the order has no scores of cube: it is of another model"),
        ({**good, "cube": good["cube"].mT}, r"'cube' has the shape \(2, 3, 2\)"),
        ({**good, "cube": good["cube"] * torch.nan}, "NaN for 12 elements of 'cube'"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(lowest(order, 0.5))
    with pytest.raises(ValueError, match="`k=1000` is more than the 61 eligible elements"):
        chosen(lowest(good, 1000))
    with pytest.raises(FileNotFoundError):
        chosen(lowest(tmp_path / "order.pt", 0.5))


SELECTIONS = {
    "everything()": everything(),
    "rows('embed.weight', <2 rows>)": rows(EMBED, [1, 4]),
    "pattern('*.bias', 'cube')": pattern("*.bias", "cube"),
    "layer('block.0')": layer("block.0"),
    "(everything() & ~rows('embed.weight', <2 rows>))": everything() - rows(EMBED, [1, 4]),
    "(~layer('block') | pattern('cube'))": ~layer("block") | pattern("cube"),
    "lowest('order.pt', 0.5, 'row')": lowest("order.pt", 0.5, "row"),
    "lowest(<of 8 parameters>, 3, 'element')": lowest(scores("all equal"), 3),
}


@pytest.mark.parametrize("shown", SELECTIONS)
def test_selection_shows_how_it_was_made(shown):
    """As an expression, without the values of tensors."""
    assert repr(SELECTIONS[shown]) == shown


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("shown", [shown for shown in SELECTIONS if "order.pt" not in shown])
def test_selection_can_be_copied_and_pickled(clone, shown):
    """A callback with one is sent to other processes."""
    selection = SELECTIONS[shown]
    assert chosen(clone(selection)) == chosen(selection)
    assert repr(clone(selection)) == shown


def test_selection_can_be_compared_and_be_a_key():
    """Comparing its tensors would give no bool."""
    one = rows(EMBED, [1, 4])
    assert one == one
    assert one != rows(EMBED, [1, 4])
    assert len({one, everything(), one}) == 2
