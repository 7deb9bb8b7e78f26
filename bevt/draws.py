"""Random numbers as pure functions of (seed, sequence, counter): SplitMix64 outputs, vectorised.

Nothing here has a state, so it does not matter who draws, how often or in which order.
"""

from __future__ import annotations

import numpy as np


def keys(seeds: np.ndarray) -> np.ndarray:
    """A key for each seed (integers of any shape), uint64."""
    return _mix(seeds.astype(np.uint64))


def sequence(keys: np.ndarray, number: int | np.ndarray) -> np.ndarray:
    """The key of each key's independent sequence `number`; shapes broadcast."""
    return _mix(keys + np.asarray(number + 1, np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def bits(keys: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """(n, k) uint64: numbers `counter` (k,) of each key's (n,) sequence."""
    return _mix(keys[:, None] + (counter + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def uniform(keys: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """(n, k) float64 in [0, 1), 53 random bits; as `bits`."""
    return (bits(keys, counter) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014; constants of Stafford's mix 13) on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
