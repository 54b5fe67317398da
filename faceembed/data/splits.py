"""People hashed into train, select, calibrate and report: once, the same on every machine."""

import hashlib
from collections.abc import Sequence

import numpy as np

SHARES = {"train": 0.85, "select": 0.05, "calibrate": 0.05, "report": 0.05}
"""Share of people in each part: train fits the network, select chooses the best checkpoint, calibrate sets thresholds
and heads, report gives the final table."""


def split_of(people: Sequence[str] | np.ndarray) -> np.ndarray:
    """The part each person belongs to.

    A person's part depends on the name alone: adding people or photos moves nobody else.

    Args:
      people: [m] str, names of people.

    Returns:
      [m] str, each "train", "select", "calibrate" or "report" with probability `SHARES`.
    """
    names, edges = list(SHARES), np.cumsum(list(SHARES.values()))
    edges[-1] = 1.0  # the sum of the shares may fall a rounding short of 1
    named = people.tolist() if isinstance(people, np.ndarray) else people
    digests = b"".join(hashlib.sha256(str(person).encode()).digest()[:8] for person in named)
    place = (np.frombuffer(digests, ">u8") >> np.uint64(11)).astype(np.float64) / 2.0**53
    return np.array(names)[np.searchsorted(edges, place, side="right")]


def halves_of(people: Sequence[str] | np.ndarray) -> np.ndarray:
    """[m] bool: one half of any people, by a hash of the name that has nothing to do with `split_of`."""
    return np.array([hashlib.sha256(f"half {person}".encode()).digest()[0] < 128 for person in people], bool)
