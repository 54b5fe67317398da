"""Data → SVG text: lines, histograms, grids of both. No Matplotlib, no JavaScript, the same bytes for the same data.

A plot looks right in light and in dark, as a file of its own and inside an HTML page: every colour is a CSS variable
that `STYLE` sets for both. Elements have classes and no ids, so any number of plots may stand in one page.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["STYLE", "Estimate", "Line", "Mark", "escape", "forest", "grid", "histogram", "lines"]

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, BOTTOM = 48, 14, 42
"""Pixels of the drawing, and what axis labels take of it; a page may show it at any size."""

POINTS = 480
"""A longer curve is thinned to at most this many points (and its gaps), keeping each stretch's least and greatest."""

_LETTER = 6.1
"""Width of a mean letter at 11 px, generous: SVG cannot measure text."""

# Six hues told apart with any colour vision, after Okabe & Ito (2008), darkened on white and lightened on black until
# each has at least 3:1 contrast. From the seventh line on they return dashed.
_LIGHT = ("#0a66b7", "#c4500b", "#008563", "#a5478f", "#8d6b00", "#566072")
_DARK = ("#62b0f0", "#f5935a", "#3cc9a0", "#dd98cb", "#e5bd45", "#a7b1c2")


def _style() -> str:
    def variables(ground: str, text: str, muted: str, rule: str, hues: Sequence[str]) -> str:
        named = {"ground": ground, "text": text, "muted": muted, "rule": rule}
        named |= {f"hue{i}": hue for i, hue in enumerate(hues)}
        return ".fe-plot{" + ";".join(f"--fe-{name}:{value}" for name, value in named.items()) + "}"

    hues = "".join(
        f".fe-c{i}{{--fe-hue:var(--fe-hue{i % len(_LIGHT)})}}"
        + (f".fe-line.fe-c{i}{{stroke-dasharray:5 3}}" if i >= len(_LIGHT) else "")
        for i in range(2 * len(_LIGHT))
    )
    return (
        "<style>"
        + variables("#fff", "#1b1f24", "#5b6470", "#e3e6ea", _LIGHT)
        + "@media screen and (prefers-color-scheme:dark){"
        + variables("#15181d", "#e8eaed", "#9aa4b0", "#2c323a", _DARK)
        + "}"
        + hues
        + ".fe-plot text{font:11px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--fe-muted)}"
        ".fe-plot .fe-title{font-size:13px;font-weight:600;fill:var(--fe-text)}"
        ".fe-plot .fe-key{fill:var(--fe-text)}"
        ".fe-ground{fill:var(--fe-ground)}"
        ".fe-rule{fill:none;stroke:var(--fe-rule)}"
        ".fe-axis{fill:none;stroke:var(--fe-muted)}"
        ".fe-line{fill:none;stroke:var(--fe-hue);stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}"
        ".fe-dot{stroke-width:5}"
        ".fe-thin{stroke-width:1;stroke-linecap:butt}"
        ".fe-thick{stroke-width:3;stroke-linecap:butt;opacity:.55}"
        ".fe-swatch{stroke-width:3}"
        ".fe-band{fill:var(--fe-hue);fill-opacity:.15;stroke:var(--fe-hue);stroke-opacity:.45;stroke-width:.7}"
        ".fe-mark{fill:none;stroke:var(--fe-text);stroke-dasharray:3 3}"
        ".fe-shade{fill:var(--fe-muted);opacity:.13}"
        "</style>"
    )


STYLE = _style()
"""The style that every plot carries. A page that holds many may keep one and drop it from the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A curve, with a band around it where `low` and `high` are given.

    Attributes:
      name: for the legend; "" has no entry.
      x: [n] ascending.
      y: [n]; the curve is interrupted where it is not finite, and on a log axis where it is not positive.
      low, high: [n] edges of the band, or None for both.
      band: (x, low, high), [m] each, of a band that has places of its own; or None.
      steps: hold each value until the next x, as a ROC does.
      hue: place of the line whose colour it shares; None for one of its own.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    band: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None
    steps: bool = False
    hue: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A dashed line across the plot at a value of one axis, with a few words beside it."""

    at: float
    label: str
    axis: str = "x"


def lines(
    series: Sequence[Line],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    x_log: bool = False,
    y_log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_ticks: Mapping[float, str] | None = None,
    y_ticks: Mapping[float, str] | None = None,
    marks: Iterable[Mark] = (),
    shade: tuple[float, float, str] | None = None,
) -> str:
    """Curves over a common axis.

    Args:
      series: curves; one without a single finite point is named in the legend and draws nothing.
      title: above the plot, and what a screen reader says.
      x_label, y_label: quantity and unit.
      x_log, y_log: decades; values that are not positive are gaps.
      x_range, y_range: ends of an axis; by default what the data spans, with `y` a little beyond it. Data outside is
        cut off.
      x_ticks, y_ticks: where → what to write there, for axes on a scale of their own such as normal deviates; by
      default
        round numbers.
      marks: thresholds, events. A mark outside the axis is left out.
      shade: (from, to, words): a part of the x axis that is drawn as doubtful.

    Returns:
      An SVG document.

    Raises:
      ValueError: a curve's arrays differ in length, or x is not ascending.

    >>> svg = lines([Line(name="loss", x=[1, 2, 3], y=[0.3, float("nan"), 0.1])], title="Loss", x_label="step")
    >>> svg.count('class="fe-line')
    1
    """
    curves = [_checked(line) for line in series]
    marks = list(marks)
    spans_x = [c.x for c in curves]
    spans_y = [part for c in curves for part in (c.y, c.low, c.high) if part is not None]
    x_axis = dataclasses.replace(_Axis.over(spans_x, log=x_log, given=x_range, pad=0.0), named=x_ticks)
    y_axis = dataclasses.replace(_Axis.over(spans_y, log=y_log, given=y_range, pad=0.04), named=y_ticks)
    hues = [i if line.hue is None else line.hue for i, line in enumerate(series)]
    keys = [(hue, c.name) for hue, c in zip(hues, curves, strict=True) if c.name] if len(curves) > 1 else []
    frame = _Frame(title, x_label, y_label, keys, x_axis, y_axis)
    body = []
    if shade is not None:
        left, right = (float(frame.x(np.clip(edge, x_axis.low, x_axis.high))) for edge in shade[:2])
        if right > left:
            body.append(_path("fe-shade", f"M{_p(left)} {_p(frame.top)}H{_p(right)}V{_p(frame.bottom)}H{_p(left)}z"))
            body.append(frame.words(left + 5, frame.bottom - 8, shade[2], "start"))
    for hue, line, curve in zip(hues, series, curves, strict=True):
        colour = _colour(hue)
        if line.band is not None:
            edges = _checked(Line(name=line.name, x=line.band[0], y=line.band[1], low=line.band[1], high=line.band[2]))
            assert edges.low is not None and edges.high is not None  # noqa: PT018  (for the type checker)
            body.append(_path(f"fe-band {colour}", frame.band(edges.x, edges.low, edges.high)))
        if curve.low is not None and curve.high is not None:
            body.append(_path(f"fe-band {colour}", frame.band(curve.x, curve.low, curve.high)))
        body += frame.curve(colour, curve.x, curve.y, steps=curve.steps)
    return frame.svg([*body, *frame.marks(marks)])


def histogram(samples: Mapping[str, ArrayLike], *, title: str, x_label: str = "", marks: Iterable[Mark] = ()) -> str:
    """Distributions laid over each other, each as a share of its own sample, in common bins.

    Args:
      samples: name → [n] values; values that are not finite are left out. The bins' width is Freedman and Diaconis's
        for the widest need of any sample, 10 to 60 of them over what all samples span.
      title, x_label, marks: as `lines`.

    Returns:
      An SVG document.

    Raises:
      ValueError: no sample has a finite value.

    >>> svg = histogram({"genuine": [2.0, 3.0], "impostor": [0.0, 1.0]}, title="Scores")
    >>> svg.count('class="fe-band')
    2
    """
    values = {name: np.asarray(sample, np.float64).ravel() for name, sample in samples.items()}
    values = {name: sample[np.isfinite(sample)] for name, sample in values.items()}
    present = [sample for sample in values.values() if len(sample)]
    if not present:
        raise ValueError(f"none of {', '.join(values) or 'no samples'} has a finite value: there is nothing to draw.")
    edges = _bins(present)
    shares = {name: 100 * np.histogram(sample, edges)[0] / max(1, len(sample)) for name, sample in values.items()}
    marks = list(marks)
    x_axis = _Axis.over([edges, np.array([mark.at for mark in marks])], log=False, given=None, pad=0.0)
    top = max(float(share.max()) for share in shares.values())
    y_axis = _Axis(low=0.0, high=1.15 * top, log=False)
    frame = _Frame(title, x_label, "% of pairs", list(enumerate(values)), x_axis, y_axis)
    body = []
    for i, share in enumerate(shares.values()):
        # From the ground up, along the tops, and down again.
        x, y = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
        body.append(_path(f"fe-band fe-c{i}", frame.band(x, np.zeros_like(y), y)))
        body += frame.curve(f"fe-c{i}", x, y)
    return frame.svg([*body, *frame.marks(marks)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A row of a forest plot: a dot, a thick interval, and around it a thin one that holds for all rows at once."""

    name: str
    value: float
    low: float
    high: float
    wide_low: float
    wide_high: float


def forest(rows: Sequence[Estimate], *, title: str, x_label: str = "", zero: float = 0.0) -> str:
    """Estimates with their intervals, a row each, beside a line at `zero`.

    Args:
      rows: from top to bottom; all numbers finite.
      title, x_label: as `lines`.
      zero: what "no difference" is; always within the axis.

    Returns:
      An SVG document.

    Raises:
      ValueError: there are no rows, or a number is not finite.

    >>> row = Estimate(name="logistic_abs", value=0.1, low=-0.1, high=0.3, wide_low=-0.2, wide_high=0.4)
    >>> forest([row], title="Difference").count("fe-line fe-dot")
    1
    """
    spans = np.array([(r.value, r.low, r.high, r.wide_low, r.wide_high, zero) for r in rows], np.float64)
    if not len(rows) or not np.isfinite(spans).all():
        raise ValueError(f"{len(rows)} rows, of finite numbers or not: a forest needs finite estimates, one at least.")
    axis = _Axis.over([spans.ravel()], log=False, given=None, pad=0.06)
    # Names stand left of the drawing, which takes what they leave.
    left = min(WIDTH / 2, 20 + _LETTER * max(len(row.name) for row in rows))
    right, top, step = float(WIDTH - RIGHT), 36.0, 24
    bottom = top + step * len(rows)
    height = int(bottom) + BOTTOM

    def x(value: float) -> str:
        return _p(left + (right - left) * float(axis.place(value)))

    body = [f'<text x="12" y="20" class="fe-title">{escape(title)}</text>']
    ticks = axis.ticks(5)
    body.append(_path("fe-rule", "".join(f"M{x(tick)} {_p(top)}V{_p(bottom)}" for tick in ticks)))
    body.append(_path("fe-mark", f"M{x(zero)} {_p(top)}V{_p(bottom)}"))
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        body.append(
            f'<text x="{_p(left - 8)}" y="{_p(y + 4)}" class="fe-key" text-anchor="end">{escape(row.name)}</text>'
        )
        body.append(_path("fe-line fe-thin fe-c0", f"M{x(row.wide_low)} {_p(y)}H{x(row.wide_high)}"))
        body.append(_path("fe-line fe-thick fe-c0", f"M{x(row.low)} {_p(y)}H{x(row.high)}"))
        body.append(_path("fe-line fe-dot fe-c0", f"M{x(row.value)} {_p(y)}h0"))
    for tick in ticks:
        body.append(f'<text x="{x(tick)}" y="{_p(bottom + 17)}" text-anchor="middle">{_label(tick)}</text>')
    body.append(_path("fe-axis", f"M{_p(left)} {_p(bottom)}H{_p(right)}"))
    if x_label:
        body.append(f'<text x="{_p(right)}" y="{height - 8}" text-anchor="end">{escape(x_label)}</text>')
    return _document(WIDTH, height, escape(title), "".join(body))


def grid(plots: Sequence[str], columns: int = 2) -> str:
    """Plots side by side in one SVG, row by row.

    Args:
      plots: what `lines`, `histogram` and `grid` return.
      columns: plots in a row.

    Returns:
      An SVG document.

    Raises:
      ValueError: there are no plots, or fewer than one column.
    """
    if not plots or columns < 1:
        raise ValueError(f"{len(plots)} plots in {columns} columns: give at least one of each.")
    sizes = [tuple(int(n) for n in re.findall(r'viewBox="0 0 (\d+) (\d+)"', plot)[0]) for plot in plots]
    rows = [range(start, min(start + columns, len(plots))) for start in range(0, len(plots), columns)]
    across = max(sum(sizes[i][0] for i in row) for row in rows)
    body, y = [], 0
    for row in rows:
        x = 0
        for i in row:
            placed = plots[i].replace("<svg ", f'<svg x="{x}" y="{y}" width="{sizes[i][0]}" height="{sizes[i][1]}" ', 1)
            body.append(placed.replace(STYLE, ""))
            x += sizes[i][0]
        y += max(sizes[i][1] for i in row)
    names = "; ".join(re.findall(r'aria-label="([^"]*)"', "".join(plots)))
    return _document(across, y, names, "".join(body))


def escape(text: Any) -> str:
    """Any text, for HTML and SVG. What they cannot hold (control codes, halves of characters) becomes U+FFFD.

    >>> escape("a < b & c")
    'a &lt; b &amp; c'
    """
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text)))


# ---- axes --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Axis:
    """From `low` to `high`, straight or in decades, with ticks of its own where `named` gives some."""

    low: float
    high: float
    log: bool
    named: Mapping[float, str] | None = None

    @classmethod
    def over(cls, parts: Sequence[Floats], *, log: bool, given: tuple[float, float] | None, pad: float) -> _Axis:
        if given is not None:
            return cls(*given, log)
        values = np.concatenate([np.zeros(0), *(part[np.isfinite(part)] for part in parts)])
        values = values[values > 0] if log else values
        if not len(values):
            return cls(0.1, 1.0, log) if log else cls(0.0, 1.0, log)
        low, high = float(values.min()), float(values.max())
        if log:
            if high < 1.5 * low:  # less than a tick apart
                low, high = low / 1.5, high * 1.5
            room = (high / low) ** pad
            return cls(low / room, high * room, log)
        # Differences in the last bits are no feature of a curve.
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = 0.05 * abs(high) or 0.5
            return cls(low - room, high + room, log)
        room = pad * (high - low)
        return cls(0.0 if 0 <= low < room else low - room, high + room, log)

    def place(self, values: ArrayLike) -> Floats:
        """Values → 0 (low end) to 1 (high end); NaN where they have no place."""
        v = np.asarray(values, np.float64)
        v = np.where(np.isfinite(v), v, np.nan)
        if not self.log:
            return (v - self.low) / (self.high - self.low)
        v = np.log(np.where(v > 0, v, np.nan))
        return (v - math.log(self.low)) / math.log(self.high / self.low)

    def ticks(self, about: int) -> list[float]:
        """Round numbers within the axis, `about` of them."""
        if self.named is not None:
            return [tick for tick in self.named if self.low <= tick <= self.high]
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
                # Of many decades every second or third is enough.
                every = math.ceil(len(decades) / (about + 2)) if steps == (1,) else 1
                found = [step * 10.0**power for power in decades[::every] for step in steps]
                found = [tick for tick in found if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]
                if len(found) >= 3:
                    return found
            if len(found) >= 2:
                return found
        rough = (self.high - self.low) / about
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(scale * nice for nice in (1, 2, 2.5, 5, 10) if scale * nice >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def label(self, tick: float) -> str:
        return _label(tick) if self.named is None else self.named[tick]


def _label(value: float) -> str:
    """A tick: 0.05, 250, 12k, 3M, 1e-5."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / min(unit, 1e3 if name == 'k' else unit):.6g}{name}"
    text = f"{value:.6g}" if size >= 1e-3 else f"{value:.3g}".replace("e-0", "e-")
    return text.replace("-", "−", 1) if value < 0 else text


# ---- drawing -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Curve:
    name: str
    x: Floats
    y: Floats
    low: Floats | None
    high: Floats | None
    steps: bool


def _checked(line: Line) -> _Curve:
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    low, high = (None if edge is None else np.asarray(edge, np.float64) for edge in (line.low, line.high))
    sizes = {part.shape for part in (x, y, low, high) if part is not None}
    if len(sizes) != 1 or x.ndim != 1 or (low is None) != (high is None):
        raise ValueError(f"{line.name or 'a line'} has arrays of shapes {sorted(sizes)}: give one y (low, high) an x.")
    if (np.diff(x) < 0).any():
        raise ValueError(f"{line.name or 'a line'} goes back in x: sort it first.")
    return _Curve(line.name, x, y, low, high, line.steps)


class _Frame:
    """Title, legend, axes and gridlines, and the way from data to pixels."""

    def __init__(
        self, title: str, x_label: str, y_label: str, keys: Sequence[tuple[int, str]], x_axis: _Axis, y_axis: _Axis
    ) -> None:
        self._title, self._x_label, self._y_label = title, x_label, y_label
        self._x_axis, self._y_axis = x_axis, y_axis
        self._legend, rows = _legend(keys)
        self.top = 27 + 16 * rows + (18 if y_label else 4)
        self.bottom = float(HEIGHT - BOTTOM)
        self.left, self.right = float(LEFT), float(WIDTH - RIGHT)

    def x(self, values: ArrayLike) -> Floats:
        return self.left + (self.right - self.left) * self._x_axis.place(values)

    def y(self, values: ArrayLike) -> Floats:
        return self.bottom - (self.bottom - self.top) * self._y_axis.place(values)

    def _clipped(self, y: Floats) -> Floats:
        return np.clip(y, self.top, self.bottom)

    def curve(self, colour: str, x: Floats, y: Floats, *, steps: bool = False) -> list[str]:
        """A line with a gap wherever y has no place, and a dot for a point that stands alone."""
        inside = (self._x_axis.place(x) >= -1e-9) & (self._x_axis.place(x) <= 1 + 1e-9)
        across, up = self.x(x[inside]), self._clipped(self.y(y[inside]))
        keep = _thinned(up)
        drawn = np.flatnonzero(np.isfinite(across[keep]) & np.isfinite(up[keep]))
        line, dots = [], []
        for stretch in np.split(drawn, np.flatnonzero(np.diff(drawn) > 1) + 1):
            points = [(_p(across[i]), _p(up[i])) for i in keep[stretch]]
            if len(points) == 1:
                dots.append("M{} {}h0".format(*points[0]))
            elif points:
                more = (f"H{px}V{py}" if steps else f"L{px} {py}" for px, py in points[1:])
                line.append("M{} {}".format(*points[0]) + "".join(more))
        found = ((f"fe-line {colour}", line), (f"fe-line fe-dot {colour}", dots))
        return [_path(kind, "".join(parts)) for kind, parts in found if parts]

    def band(self, x: Floats, low: Floats, high: Floats) -> str:
        """Path data of the areas between two curves, one for each stretch without a gap."""
        across, bottom, top = self.x(x), self._clipped(self.y(low)), self._clipped(self.y(high))
        keep = np.union1d(_thinned(bottom, POINTS // 2), _thinned(top, POINTS // 2))
        across, bottom, top = across[keep], bottom[keep], top[keep]
        whole = np.isfinite(across) & np.isfinite(bottom) & np.isfinite(top)
        parts = []
        for stretch in np.split(np.arange(len(keep)), np.flatnonzero(np.diff(whole)) + 1):
            if len(stretch) < 2 or not whole[stretch[0]]:
                continue
            there = [f"{_p(across[i])} {_p(top[i])}" for i in stretch]
            back = [f"{_p(across[i])} {_p(bottom[i])}" for i in stretch[::-1]]
            parts.append("M" + "L".join(there + back) + "z")
        return "".join(parts)

    def words(self, x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
        attributes = f' class="{kind}"' if kind else ""
        attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
        return f'<text x="{_p(x)}" y="{_p(y)}"{attributes}>{escape(text)}</text>'

    def marks(self, marks: Sequence[Mark]) -> list[str]:
        parts = []
        for row, mark in enumerate(marks):
            axis = self._x_axis if mark.axis == "x" else self._y_axis
            place = float(axis.place(mark.at))
            if not 0 <= place <= 1:
                continue
            if mark.axis == "x":
                x = float(self.x(mark.at))
                parts.append(_path("fe-mark", f"M{_p(x)} {_p(self.top)}V{_p(self.bottom)}"))
                # Beside its line on whichever side has room; several marks take a line of words each.
                side, anchor = (5, "start") if place < 0.6 else (-5, "end")
                parts.append(self.words(x + side, self.top + 11 + 13 * (row % 4), mark.label, anchor, "fe-key"))
            else:
                y = float(self.y(mark.at))
                parts.append(_path("fe-mark", f"M{_p(self.left)} {_p(y)}H{_p(self.right)}"))
                above = y - 5 if place < 0.9 else y + 13
                parts.append(self.words(self.right - 2, above, mark.label, "end", "fe-key"))
        return parts

    def svg(self, body: Sequence[str]) -> str:
        parts = [self.words(12, 20, self._title, "start", "fe-title"), self._legend]
        if self._y_label:
            parts.append(self.words(12, self.top - 10, self._y_label, "start"))
        ticks = self._y_axis.ticks(4)
        rules = "".join(f"M{_p(self.left)} {_p(y)}H{_p(self.right)}" for y in self.y(ticks))
        parts.append(_path("fe-rule", rules))
        for tick, y in zip(ticks, self.y(ticks), strict=True):
            parts.append(self.words(self.left - 6, y + 4, self._y_axis.label(tick), "end"))
        ticks = self._x_axis.ticks(6)
        notches = "".join(f"M{_p(x)} {_p(self.bottom)}v4" for x in self.x(ticks))
        ground = _path("fe-axis", f"M{_p(self.left)} {_p(self.bottom)}H{_p(self.right)}{notches}")
        for tick, x in zip(ticks, self.x(ticks), strict=True):
            # The outermost numbers stay inside the drawing.
            label = self._x_axis.label(tick)
            half = _LETTER * len(label) / 2
            parts.append(self.words(min(x, WIDTH - half - 2), self.bottom + 17, label, "middle"))
        if self._x_label:
            parts.append(self.words(self.right, HEIGHT - 8, self._x_label, "end"))
        return _document(WIDTH, HEIGHT, escape(self._title), "".join([*parts, *body, ground]))


def _document(width: int, height: int, escaped_name: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="fe-plot" role="img" '
        f'aria-label="{escaped_name}"><title>{escaped_name}</title>{STYLE}'
        f'<rect class="fe-ground" width="{width}" height="{height}"/>{body}</svg>'
    )


def _legend(keys: Sequence[tuple[int, str]]) -> tuple[str, int]:
    """Swatches with names, wrapped; and the number of their rows."""
    parts, x, row = [], 12.0, 0
    for i, name in keys:
        wide = 18 + _LETTER * len(name) + 14
        if x > 12 and x + wide > WIDTH - 4:
            x, row = 12.0, row + 1
        y = 37 + 16 * row
        colour = _colour(i)
        parts.append(f'<path class="fe-line fe-swatch {colour}" d="M{_p(x + 1)} {y - 4}h11"/>')
        parts.append(f'<text class="fe-key" x="{_p(x + 18)}" y="{y}">{escape(name)}</text>')
        x += wide
    return "".join(parts), row + 1 if keys else 0


def _colour(hue: int) -> str:
    return f"fe-c{hue % (2 * len(_LIGHT))}"


def _path(kind: str, data: str) -> str:
    return f'<path class="{kind}" d="{data}"/>'


def _p(pixels: float) -> str:
    """A coordinate, to a tenth of a pixel: 12, 12.5."""
    text = f"{pixels:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _thinned(y: Floats, points: int = POINTS) -> NDArray[np.int64]:
    """Indices to keep: of each of `points`/2 stretches the least and the greatest, its first gap, and both ends."""
    if len(y) <= points:
        return np.arange(len(y))
    keep = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), max(1, (points - 2) // 2)):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            keep |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
        if len(finite) < len(stretch):
            keep.add(int(stretch[~np.isfinite(y[stretch])][0]))
    return np.array(sorted(keep))


def _bins(samples: Sequence[Floats]) -> Floats:
    low, high = min(s.min() for s in samples), max(s.max() for s in samples)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        room = 0.5 * abs(high) or 0.5
        return np.linspace(low - room, high + room, 12)
    widths = [2 * (np.percentile(s, 75) - np.percentile(s, 25)) / len(s) ** (1 / 3) for s in samples]
    # The widest bin that any sample asks for keeps the ragged ones calm.
    width = max(widths) or (high - low) / 10
    return np.linspace(low, high, int(np.clip(math.ceil((high - low) / width), 10, 60)) + 1)
