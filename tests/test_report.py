import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from faceembed import metrics, report


def test_a_table_aligns_text_left_and_numbers_right():
    rows = [{"head": "threshold", "n": 5}, {"head": "abs", "n": np.int64(1200), "far": 0.123456}, {"head": None}]
    assert report.table(rows) == (
        "head          n     far\n"
        "---------  ----  ------\n"
        "threshold     5       -\n"
        "abs        1200  0.1235\n"
        "-             -       -"
    )
    assert report.table(rows, columns=["n"]).splitlines() == ["   n", "----", "   5", "1200", "   -"]
    assert report.table([], columns=["a", "bc"]) == "a  bc\n-  --"
    with pytest.raises(ValueError, match="columns named"):
        report.table([])


@pytest.mark.parametrize(
    ("errors", "n", "expected"),
    [
        (300, 1000, "30.00 %"),
        (30, 1000, "3.00 %"),
        (29, 1000, "~2.90 %"),
        (10, 1000, "~1.00 %"),
        (9, 1000, "not resolvable (needs 3,334)"),
        (1, 3, "not resolvable (needs 90)"),
        (0, 3000, "< 0.10 % (no errors in 3,000)"),
    ],
)
def test_a_rate_is_printed_only_where_its_errors_support_it(errors, n, expected):
    assert report.format_rate(errors, n) == expected


def test_impossible_counts_are_refused():
    for errors, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"{errors} errors in {n}"):
            report.format_rate(errors, n)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(300, "80.00 % (FAR 12.00 %)"), (299, "~80.00 % (FAR 12.00 %)"), (99, "not resolvable (needs 300)")],
)
def test_an_operating_point_shows_the_realised_far_or_what_is_missing(n, expected):
    point = metrics.OperatingPoint(
        target=0.1, threshold=0.5, tar=0.8, far=0.12, n_genuine=9, n_impostor=n, n_impostor_train=1000
    )
    assert report.format_operating_point(point) == expected


@dataclasses.dataclass
class Nested:
    path: Path
    rates: np.ndarray


def test_json_holds_numpy_dataclasses_paths_and_infinities(tmp_path):
    file = tmp_path / "new" / "results.json"
    value = {
        "f": np.float32(0.25),
        "i": np.int64(3),
        "b": np.bool_(True),
        0.001: Nested(Path("a/b"), np.array([[1.5, np.inf], [np.nan, -np.inf]])),
        np.int64(7): {"z", "a"},
        "none": None,
        "name": np.str_("Zoë"),
    }
    report.write_json(file, value)
    text = file.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "f": 0.25,
        "i": 3,
        "b": True,
        "0.001": {"path": "a/b", "rates": [[1.5, "inf"], ["nan", "-inf"]]},
        "7": ["a", "z"],
        "none": None,
        "name": "Zoë",
    }
    assert text.endswith("}\n")
    assert os.listdir(file.parent) == ["results.json"]


def test_floats_survive_to_the_last_bit(tmp_path):
    numbers = np.random.default_rng(0).normal(size=50)
    report.write_json(tmp_path / "x.json", numbers)
    assert json.loads((tmp_path / "x.json").read_text()) == numbers.tolist()


def test_an_unwritable_value_is_named_and_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    report.write_json(file, {"old": 1})
    with pytest.raises(TypeError, match=r"the value\['heads'\]\[1\] is a object"):
        report.write_json(file, {"heads": [1, object()]})
    with pytest.raises(TypeError, match="two keys that both become '1'"):
        report.write_json(file, {1: 0, "1": 0})
    assert json.loads(file.read_text()) == {"old": 1}


def test_a_crash_before_the_swap_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    report.write_json(file, {"old": 1})
    seen = []

    def crash(source, target):
        seen.append((json.loads(Path(source).read_text()), Path(source).parent))
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space left"):
        report.write_json(file, {"new": 2})
    assert seen == [({"new": 2}, tmp_path)]  # complete, and on the same file system, before it took the name
    assert json.loads(file.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]
