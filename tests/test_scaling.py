"""The counts behind docs/scaling.md."""

import dataclasses
import re
from pathlib import Path

import pytest

from experiments import scaling

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def iresnet18():
    return scaling.counted("iresnet18")


def test_an_encoder_is_counted(iresnet18):
    assert iresnet18.parameters == 24_025_088
    # bn1 to bn3 of 8 blocks, 4 shortcuts, stem, the last map's and the embedding's.
    assert iresnet18.norms == 3 * 8 + 4 + 3
    # 2.62 G multiply-adds in the papers; XLA counts no products with the padding.
    assert 4.5e9 < iresnet18.flops < 5.3e9


def test_what_an_update_spends_follows_from_the_counts(iresnet18):
    machine = dataclasses.replace(scaling.Machine(), between=1e9, mining_flops=1e9, comparisons=1e30)
    row = scaling.spent(iresnet18, machine, gpus=16, photos_per_gpu=10, photos=4)
    assert row["B"] == 160
    assert row["mining GFLOP"] * 1e9 == 3 * 2 * 10 * 160 * 512
    assert row["mining ms"] == pytest.approx(1e3 * row["mining GFLOP"])
    # Forward, and twice as much backward.
    assert row["encoder ms"] == pytest.approx(1e3 * 3 * 10 * iresnet18.flops / machine.encoder_flops)
    # Each of 3 positives is held against every candidate three times.
    slow = dataclasses.replace(machine, mining_flops=1e30, comparisons=1e6)
    compared = scaling.spent(iresnet18, slow, gpus=16, photos_per_gpu=10, photos=4)
    assert compared["mining ms"] == pytest.approx(1e3 * 3 * 3 * 10 * 160 / 1e6)
    # Each of 16 devices sends 15 of 16 parts: of 160·512 embeddings and 160 ids, and of as many numbers back.
    assert row["gather MB"] * 1e6 == pytest.approx(150 * 4 * 513)
    assert row["scatter MB"] * 1e6 == pytest.approx(150 * 4 * 512)
    assert row["embeddings ms"] == pytest.approx(row["gather MB"] + row["scatter MB"])
    assert row["gradient MB"] * 1e6 == pytest.approx(2 * 15 / 16 * 4 * iresnet18.parameters)
    alone = scaling.spent(iresnet18, machine, gpus=1, photos_per_gpu=10, photos=4)
    assert alone["gradient ms"] == alone["embeddings ms"] == alone["norms ms"] == 0
    assert (
        scaling.spent(iresnet18, machine, gpus=8, photos_per_gpu=10, photos=4)["gradient ms"] < row["gradient ms"] / 99
    )


def test_the_page_has_the_assumptions_of_the_program():
    text = (ROOT / "docs" / "scaling.md").read_text()
    machine = scaling.Machine()
    assert re.search(rf"{machine.encoder_flops / 1e12:.0f} TFLOP/s of bfloat16", text)
    assert re.search(rf"{machine.mining_flops / 1e12:.0f} TFLOP/s of float32", text)
    assert re.search(rf"{machine.within / 1e9:.0f} GB/s within a host of {machine.per_host} and", text)
    assert re.search(rf"{machine.between / 1e9:.0f} GB/s a GPU between hosts", text)
