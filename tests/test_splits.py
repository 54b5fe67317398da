"""People hashed into four parts."""

import subprocess
import sys

import numpy as np

from faceembed.data import splits


def test_shares_are_those_promised():
    part = splits.split_of([f"person {i}" for i in range(20_000)])
    assert splits.SHARES == {"train": 0.85, "select": 0.05, "calibrate": 0.05, "report": 0.05}
    for name, share in splits.SHARES.items():
        # 4.5 standard deviations of a binomial share.
        assert abs((part == name).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / 20_000), name


def test_a_person_never_moves():
    # Written down once: a change would leak report people into training for every checkpoint there is.
    stored = {
        "5": "calibrate", "15": "select", "20": "report", "31": "calibrate", "32": "select",
        "2880": "train", "Aaron_Eckhart": "train", "Ágnes Müller": "train",
    }  # fmt: skip
    assert splits.split_of(list(stored)).tolist() == list(stored.values())
    assert splits.split_of(np.array(list(stored)[::-1])).tolist() == list(stored.values())[::-1]


def test_nobody():
    assert splits.split_of([]).tolist() == []


def test_needs_no_jax():
    code = "import sys, faceembed.data.splits, faceembed.data.pairs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
