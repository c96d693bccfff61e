"""What the four networks are tuned for: data that ships with Python or is made here, and how a run is judged.

Each task has, beside its own quality, what is left of the source: of encoders how far similarities of inputs that have
nothing to do with the task are still ordered as before; of CREPE and CHGNet how well they still do what they were
trained for, on inputs unlike those of the task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.pretrained import networks, sounds
from benchmarks.quality.tasks import PACKAGES, TASKS, TOKENS, accuracy
from examples.tenants.encoder import minilm

Inputs = Tensor | Sequence[Any]
Split = tuple[Inputs, Tensor]
"""(x, y): S inputs, and what is wanted, (S, …)."""


@dataclass(frozen=True)
class Data:
    """What a task trains, tunes and reports on."""

    train: Split
    val: Split  # chooses learning rates
    test: Split
    source: Inputs  # of which nothing is trained
    source_y: Tensor | None = None  # what is right there, if that is known


@dataclass(frozen=True)
class Task:
    """A network, its data, and how it is trained."""

    title: str
    quality_name: str
    kept_name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    quality: Callable[[Tensor, Tensor], float | Tensor]  # (outputs, y)
    kept: Callable[[Tensor, Tensor, Tensor | None], float]  # (features, those of the untuned network, source_y)
    batch_size: int
    steps: int
    lr: float  # where the search for the unfrozen run's learning rate begins
    new_head: bool = False  # always trains, and does not count
    higher_is_better: bool = True


def similarity(features: Tensor, before: Tensor, _: Tensor | None) -> float:
    """The rank correlation of the cosines between all pairs of inputs with what they were."""
    above = torch.ones(len(before), len(before), dtype=torch.bool).triu(1)
    return float(spearmanr((features @ features.T)[above], (before @ before.T)[above]).statistic)


# Sentences ---------------------------------------------------------------------------------------------------------


@cache
def docstrings() -> Data:
    """Docstrings of Python's library, of ten packages; beside them its help texts on other things."""
    from transformers import AutoTokenizer

    found = {name: data.tensors for name, data in TASKS["minilm"].data(0).items()}
    texts = [text[: 8 * TOKENS] for _, text in sorted(topics.items())][:300]
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokens = tokenizer(texts, max_length=TOKENS, truncation=True, padding="max_length")["input_ids"]
    return Data(*(found[name] for name in ("train", "val", "test")), torch.tensor(tokens))  # type: ignore[arg-type]


# Pitches -----------------------------------------------------------------------------------------------------------


@cache
def pitches() -> Data:
    """Rough tones; beside them ordinary ones."""
    draw = np.random.default_rng(0)

    def made(n: int, rough: bool) -> tuple[Tensor, Tensor]:
        sound, cents = sounds.tones(n, draw, rough)
        return torch.tensor(sound, dtype=torch.float32), torch.tensor(cents, dtype=torch.float32)

    train, val, test = (made(n, rough=True) for n in (4000, 1000, 1000))
    return Data(train, val, test, *made(500, rough=False))


def pitch_loss(outputs: Tensor, cents: Tensor) -> Tensor:
    """The cross-entropy of each pitch, wanted within about 25 cents of the right one, as CREPE was trained."""
    wanted = torch.exp(-((torch.tensor(sounds.CENTS, dtype=torch.float32) - cents[:, None]) ** 2) / (2 * 25.0**2))
    return F.binary_cross_entropy_with_logits(outputs, wanted)


def pitch_accuracy(outputs: Tensor, cents: Tensor) -> float:
    """The share of pitches found to 50 cents."""
    found = torch.tensor(sounds.CENTS)[outputs.argmax(1)]
    return float(((found - cents).abs() < 50).float().mean())


# Voices ------------------------------------------------------------------------------------------------------------

SPEAKERS, EACH, SECONDS = 24, 60, 0.8


@cache
def voices() -> Data:
    """Synthetic voices that differ little, in noise; beside them others, without."""
    draw = np.random.default_rng(0)
    own = [sounds.Speaker.drawn(draw) for _ in range(SPEAKERS)]
    others = [sounds.Speaker.drawn(draw) for _ in range(60)]
    x = torch.stack([_mel(sounds.speech(speaker, SECONDS, draw), 0.5, draw) for speaker in own for _ in range(EACH)])
    y = torch.arange(SPEAKERS).repeat_interleave(EACH)
    which = torch.arange(EACH).repeat(SPEAKERS)
    splits = [(x[rows], y[rows]) for rows in (which < 30, (which >= 30) & (which < 45), which >= 45)]
    source = torch.stack([_mel(sounds.speech(speaker, SECONDS, draw), 0.0, draw) for speaker in others for _ in (0, 1)])
    return Data(*splits, source)


@cache
def _filters() -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(201, 40, 0.0, 8000.0, sounds.RATE, norm="slaney", mel_scale="slaney")  # type: ignore[no-any-return]


def _mel(sound: np.ndarray, noise: float, draw: np.random.Generator) -> Tensor:
    """The spectrogram that the encoder hears, (frames, 40): windows of 25 ms, 10 ms apart, at -30 dB of full scale."""
    from transformers.audio_utils import spectrogram, window_function

    sound = sound + noise * draw.standard_normal(len(sound))
    sound = sound / np.sqrt(np.mean(sound**2)) * 10 ** (-30 / 20)
    mel = spectrogram(sound, window_function(400, "hann"), 400, 160, 400, power=2.0, mel_filters=_filters())
    return torch.tensor(mel.T, dtype=torch.float32)


# Crystals ----------------------------------------------------------------------------------------------------------

CATIONS, ANIONS, METALS = ("Li", "Na", "K", "Mg", "Ca", "Zn", "Mn", "Fe"), ("O", "F", "S"), ("Ti", "V", "Al", "Zr")
OTHER_CATIONS, OTHER_ANIONS = ("Rb", "Sr", "Cd", "Ni"), ("Cl", "Se", "N")


@cache
def crystals() -> Data:
    """Energies by another functional, those of the package's own fine-tuned network; beside them other elements.

    The difference of the two that a number for each element explains, on the training crystals, is left to those.
    """
    draw = np.random.default_rng(0)
    before, after = networks.Crystals(), networks.Crystals("r2scan")
    graphs = [before.net.graph_converter(s) for s in _structures(CATIONS, ANIONS, METALS, 800, draw)]
    graphs = [graphs[i] for i in draw.permutation(len(graphs))]
    other = [before.net.graph_converter(s) for s in _structures(OTHER_CATIONS, OTHER_ANIONS, METALS, 100, draw)]
    with torch.no_grad():
        y = torch.cat([after(graphs[i : i + 64]) - before(graphs[i : i + 64]) for i in range(0, len(graphs), 64)])
        base = torch.cat([before(graphs[i : i + 64]) for i in range(0, len(graphs), 64)])
    share = torch.stack([torch.bincount(g.atomic_number, minlength=95) / len(g.atomic_number) for g in graphs])
    n = len(graphs) // 2
    offset = torch.linalg.lstsq(share[:n], y[:n], driver="gelsd").solution
    wanted = base + y - share @ offset
    edges = [(0, n), (n, n + n // 2), (n + n // 2, len(graphs))]
    return Data(*((graphs[a:b], wanted[a:b]) for a, b in edges), other)


def _structures(
    cations: Sequence[str], anions: Sequence[str], metals: Sequence[str], n: int, draw: np.random.Generator
) -> list[Any]:
    """Salts and perovskites of these elements, stretched and shaken."""
    from pymatgen.core import Lattice, Structure

    kinds: list[Callable[[str, str, str, float], Structure]] = [
        lambda a, x, m, s: Structure.from_spacegroup("Fm-3m", Lattice.cubic(2 * s), [a, x], [[0, 0, 0], [0.5] * 3]),
        lambda a, x, m, s: Structure.from_spacegroup("Pm-3m", Lattice.cubic(1.2 * s), [a, x], [[0, 0, 0], [0.5] * 3]),
        lambda a, x, m, s: Structure.from_spacegroup("F-43m", Lattice.cubic(2.2 * s), [a, x], [[0, 0, 0], [0.25] * 3]),
        lambda a, x, m, s: Structure.from_spacegroup(
            "Pm-3m", Lattice.cubic(1.75 * s), [a, m, x], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]]
        ),
    ]
    found = []
    for _ in range(n):
        kind, (a, x, m) = kinds[draw.integers(len(kinds))], (draw.choice(names) for names in (cations, anions, metals))
        structure = kind(a, x, m, draw.uniform(2.0, 2.6)).get_primitive_structure()
        structure.perturb(draw.uniform(0, 0.15), seed=int(draw.integers(2**31)))
        found.append(structure)
    return found


def millielectronvolts(outputs: Tensor, y: Tensor) -> float:
    """The mean absolute error, meV per atom."""
    return 1000 * float((outputs - y).abs().mean())


TASKS_BY_NAME: dict[str, Task] = {
    "minilm": Task(
        "all-MiniLM-L6-v2, docstrings by package", "accuracy", "order of similarities",
        lambda: networks.Sentences(len(PACKAGES)), docstrings, F.cross_entropy, accuracy, similarity,
        batch_size=16, steps=60, lr=1e-4, new_head=True,
    ),
    "crepe": Task(
        "CREPE tiny, pitches of rough tones", "pitches found", "ordinary pitches found",
        networks.Crepe, pitches, pitch_loss, pitch_accuracy,
        lambda outputs, _, cents: pitch_accuracy(outputs, cents),  # type: ignore[arg-type]
        batch_size=32, steps=100, lr=1e-3,
    ),
    "voices": Task(
        "Resemblyzer, synthetic voices in noise", "accuracy", "order of similarities",
        lambda: networks.Voices(SPEAKERS), voices, F.cross_entropy, accuracy, similarity,
        batch_size=24, steps=120, lr=1e-3, new_head=True,
    ),
    "chgnet": Task(
        "CHGNet, energies by another functional", "error, meV", "away from the base elsewhere, meV",
        networks.Crystals, crystals, F.mse_loss, millielectronvolts,
        lambda outputs, before, _: millielectronvolts(outputs, before),
        batch_size=16, steps=80, lr=1e-3, higher_is_better=False,
    ),
}  # fmt: skip
