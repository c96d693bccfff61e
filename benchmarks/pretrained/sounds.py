"""Sounds for the networks that listen: tones and voices, made of sines and filtered pulses at 16 kHz."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

Samples = NDArray[np.float64]
RATE = 16_000
FRAME = 1024
CENTS = 1997.3794084376191 + 20 * np.arange(360)
"""Of CREPE's 360 pitches, above 10 Hz."""


def tones(n: int, draw: np.random.Generator, rough: bool) -> tuple[Samples, Samples]:
    """Frames of tones, each of mean 0 and deviation 1, and their pitches.

    Args:
        n: how many.
        draw: the random stream.
        rough: 80 to 800 Hz, partials stretched as those of stiff bars are, the first two missing, and noise twice as
            loud as the tone. Else 40 to 1,600 Hz, all partials where they belong, and hardly any noise.

    Returns:
        (n, FRAME), and cents above 10 Hz, (n,).
    """
    f0 = 80 * 10 ** draw.random(n) if rough else 40 * 40 ** draw.random(n)
    partials = np.arange(1, 16)
    stretch = draw.uniform(2e-4, 2e-3, n) if rough else np.zeros(n)
    frequency = f0[:, None] * partials * np.sqrt(1 + stretch[:, None] * partials**2)
    loud = partials ** -draw.uniform(0.3, 1.3, n)[:, None] * (frequency < RATE / 2)
    if rough:
        loud[:, :2] = 0
    phase = draw.uniform(0, 2 * np.pi, frequency.shape)
    t = np.arange(FRAME) / RATE
    sound = np.einsum("np,npt->nt", loud, np.sin(2 * np.pi * frequency[..., None] * t + phase[..., None]))
    sound /= sound.std(1, keepdims=True)
    sound += (2.0 if rough else 0.03) * draw.standard_normal(sound.shape)
    sound -= sound.mean(1, keepdims=True)
    return sound / sound.std(1, keepdims=True), 1200 * np.log2(f0 / 10)


@dataclass(frozen=True)
class Speaker:
    """What stays the same in all that one voice says."""

    f0: float  # Hz
    tract: float  # the length of the vocal tract, 1 for the vowels below
    breath: float  # noise beside the pulses
    tilt: float  # how fast harmonics fall

    @classmethod
    def drawn(cls, draw: np.random.Generator) -> "Speaker":
        return cls(draw.uniform(95, 230), draw.uniform(0.85, 1.2), draw.uniform(0.05, 0.5), draw.uniform(0.85, 0.97))


VOWELS = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]])
"""Formants in Hz. Source: G. Peterson, H. Barney, "Control Methods Used in a Study of the Vowels" (1952), men."""


def speech(speaker: Speaker, seconds: float, draw: np.random.Generator) -> Samples:
    """Vowels of a fifth of a second each: pulses and breath through three resonances."""
    parts = []
    for _ in range(round(seconds * 5)):
        n = RATE // 5
        f0 = speaker.f0 * np.exp(0.06 * draw.standard_normal() + np.linspace(0, 0.05 * draw.standard_normal(), n))
        pulses = np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0)
        sound = lfilter([1], [1, -speaker.tilt], pulses + speaker.breath * 0.2 * draw.standard_normal(n))
        formants = VOWELS[draw.integers(len(VOWELS))] * np.exp(0.03 * draw.standard_normal(3)) / speaker.tract
        for formant in formants:
            radius = np.exp(-np.pi * 90 / RATE)
            sound = lfilter([1], [1, -2 * radius * np.cos(2 * np.pi * formant / RATE), radius**2], sound)
        parts.append(sound / sound.std())
    return np.concatenate(parts)
