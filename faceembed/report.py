"""Results → an aligned table for the terminal, and a JSON file that is either whole or absent."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faceembed import metrics

__all__ = [
    "SCHEMA",
    "format_interval",
    "format_operating_point",
    "format_percent",
    "format_rate",
    "jsonable",
    "resolved",
    "table",
    "verdict",
    "write_json",
]


SCHEMA = 2
"""Of `results.json`; docs/results.md says what its fields mean. It rises when a field changes its meaning or goes."""


def format_percent(rate: float, *, digits: int = 2) -> str:
    """A rate in [0, 1] as a percentage.

    >>> format_percent(0.81234)
    '81.23 %'
    """
    return f"{100 * rate:.{digits}f} %"


def format_interval(low: float, high: float, *, digits: int = 2) -> str:
    """Two rates as an interval in per cent.

    >>> format_interval(0.79, 0.83)
    '[79.00, 83.00]'
    """
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def format_rate(errors: int, n: int) -> str:
    """An observed error rate, or what zero errors allow one to say.

    The observed rate is held against `metrics.resolvable`: 30 errors print it, 10 to 29 flag it with "~", and fewer say
    how many comparisons would be needed. No error at all in n gives the upper bound 3/n.

    Args:
      errors: count, 0 to n.
      n: comparisons, at least 1.

    Returns:
      Text for a table.

    Raises:
      ValueError: the counts are impossible.

    >>> format_rate(30, 1000), format_rate(12, 1000), format_rate(0, 1000)
    ('3.00 %', '~1.20 %', '< 0.30 % (no errors in 1,000)')
    >>> format_rate(2, 1000)
    'not resolvable (needs 15,000)'
    """
    if not 0 <= errors <= n or n < 1:
        raise ValueError(f"{errors} errors in {n} comparisons: errors must lie between 0 and n, and n be at least 1.")
    if errors == 0:
        return f"< {format_percent(metrics.zero_error_bound(n))} (no errors in {n:,})"
    resolution = metrics.resolvable(errors / n, n)
    return resolved(format_percent(errors / n), resolution.status, resolution.needs)


def format_operating_point(point: metrics.OperatingPoint) -> str:
    """TAR at a target FAR, with the realised FAR beside it, as far as the comparisons support that FAR.

    >>> point = metrics.OperatingPoint(
    ...     target=0.01, threshold=0.5, tar=0.8, far=0.012, n_genuine=3000, n_impostor=3000, n_impostor_train=2000
    ... )
    >>> format_operating_point(point)
    '~80.00 % (FAR 1.20 %)'
    """
    resolution = point.resolution
    return resolved(
        f"{format_percent(point.tar)} (FAR {format_percent(point.far)})", resolution.status, resolution.needs
    )


def resolved(text: str, status: str, needs: int) -> str:
    """A figure as far as the comparisons support its rate: as it is, flagged with "~", or withheld.

    >>> resolved("80.00 %", "flagged", 3000), resolved("80.00 %", "unresolvable", 3000)
    ('~80.00 %', 'not resolvable (needs 3,000)')
    """
    if status == "unresolvable":
        return f"not resolvable (needs {needs:,})"
    return ("~" if status == "flagged" else "") + text


def verdict(low: float, high: float) -> str:
    """What an interval of a difference excludes, in points.

    >>> verdict(-0.0018, 0.0042), verdict(0.001, 0.004)
    ('no difference is shown; differences above 0.42 are excluded.', 'it is better, by 0.10 to 0.40.')
    >>> verdict(-0.004, -0.001)
    'it is worse, by 0.10 to 0.40.'
    """
    if low > 0:
        return f"it is better, by {100 * low:.2f} to {100 * high:.2f}."
    if high < 0:
        return f"it is worse, by {-100 * high:.2f} to {-100 * low:.2f}."
    return f"no difference is shown; differences above {100 * abs(max(-low, high)):.2f} are excluded."


def table(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None = None) -> str:
    """Rows as text in aligned columns.

    Args:
      rows: one mapping a row; a value that a row lacks, or None, prints as "-". Strings print as they are, floats with
        four significant digits, other values with `str`.
      columns: which, and in what order; by default every key in order of first appearance.

    Returns:
      A header, a rule, and a line a row, without trailing spaces. Columns that hold only numbers are right-aligned.

    Raises:
      ValueError: there are neither rows nor columns.

    >>> print(table([{"head": "threshold", "n": 5}, {"head": "logistic_abs", "n": 1000}]))
    head             n
    ------------  ----
    threshold        5
    logistic_abs  1000
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    if not names:
        raise ValueError("a table without rows needs its columns named.")
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    numeric = [
        all(isinstance(row.get(name), int | float | np.number | None) for row in rows) and bool(rows) for name in names
    ]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def jsonable(value: Any, *, where: str = "the value") -> Any:
    """The same data in types that JSON has.

    Args:
      value: nested dicts, lists, tuples, sets, dataclasses, paths, NumPy scalars and arrays, strings, numbers, None.
        A dict's keys may be strings, numbers or booleans. An object that has `to_dict()` gives that.
      where: named in the error.

    Returns:
      dict, list, str, int, float, bool or None. JSON has no NaN or infinity: they become the strings "nan", "inf" and
      "-inf", which Python's `float` reads back. Sets are sorted.

    Raises:
      TypeError: something else was met; its place in the data is named. Two keys that become one name, too.

    >>> jsonable({"far": np.float32(0.5), 3: (np.int64(1), float("inf"))})
    {'far': 0.5, '3': [1, 'inf']}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist(), where=where)
    if isinstance(value, Mapping):
        result: dict[str, Any] = {}
        for key, item in value.items():
            plain = key.item() if isinstance(key, np.generic) else key
            if not isinstance(plain, str | int | float):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}: use a string.")
            if str(plain) in result:
                raise TypeError(f"{where} has two keys that both become {str(plain)!r} in JSON: rename one.")
            result[str(plain)] = jsonable(item, where=f"{where}[{plain!r}]")
        return result
    if hasattr(value, "to_dict"):
        return jsonable(value.to_dict(), where=where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: jsonable(getattr(value, field.name), where=f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, Sequence):
        return [jsonable(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: "
        "convert it to a list, a dict, a number or a string first."
    )


def can_write(folder: str | os.PathLike[str]) -> bool:
    """Makes a folder; whether files can be written there. To be asked before long work, not after it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file atomically: a reader, or a crash at any moment, meets the old file or the whole new one.

    Args:
      path: the file; its folder is made if missing.
      value: as `jsonable` accepts it.

    Raises:
      TypeError: as `jsonable`; nothing has been written then.
      OSError: the folder cannot be written; the old file stands.
    """
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all, also when the machine stops in the middle; folders are made.

    Raises:
      OSError: the folder cannot be written; the old file stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened with mode "x" and not by mkstemp, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # the system's error about a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)  # there only after a failure
