"""Plots as text: where the points are, what is left out, and that nothing breaks out of it."""

import doctest
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed import plots
from faceembed.plots import Line, Mark

SVG = "{http://www.w3.org/2000/svg}"


def paths(svg, kind):
    """The `d` of every path whose classes include `kind`, legends left out."""
    found = [path for path in ET.fromstring(svg).iter(f"{SVG}path") if kind in path.get("class").split()]
    return [path.get("d") for path in found if "fe-swatch" not in path.get("class")]


def points(d):
    """Every point that a path visits, as [n, 2]; a list for each of its pieces."""
    pieces = []
    for command, numbers in re.findall(r"([MLHVhvz])([-\d. ]*)", d):
        values = [float(number) for number in numbers.split()]
        match command:
            case "M":
                pieces.append([tuple(values)])
            case "L":
                pieces[-1].append(tuple(values))
            case "H":
                pieces[-1].append((values[0], pieces[-1][-1][1]))
            case "V":
                pieces[-1].append((pieces[-1][-1][0], values[0]))
    return pieces


def texts(svg):
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def scale(svg):
    """(pixel → value) for x and y, read off the tick labels as a reader would."""
    value = lambda text: float(text.replace("−", "-").replace("k", "e3").replace("M", "e6"))  # noqa: E731
    x, y = [], []
    for text in ET.fromstring(svg).iter(f"{SVG}text"):
        try:
            number = value(text.text)
        except ValueError:
            continue
        if text.get("text-anchor") == "middle":
            x.append((float(text.get("x")), number))
        elif text.get("text-anchor") == "end":
            y.append((float(text.get("y")) - 4, number))
    return np.array(x), np.array(y)


def read(ticks, pixels, log):
    """Pixels → values along ticks, linear or in decades."""
    values = np.log(ticks[:, 1]) if log else ticks[:, 1]
    slope, offset = np.polyfit(ticks[:, 0], values, 1)
    found = slope * np.asarray(pixels) + offset
    return np.exp(found) if log else found


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_lies_where_the_axes_say(log):
    x = np.array([1.0, 10, 40, 80, 100])
    y = np.array([0.02, 3.0, 0.5, 60, 7])
    # The outermost tick label of x may be moved inwards; the axis ends beyond it here.
    svg = plots.lines([Line(name="a", x=x, y=y)], title="t", x_log=log, y_log=log, x_range=(0.9, 130))
    x_ticks, y_ticks = scale(svg)
    assert min(len(x_ticks), len(y_ticks)) >= 3
    ((*found,),) = points(paths(svg, "fe-line")[0])
    px, py = np.array(found).T
    np.testing.assert_allclose(read(x_ticks, px, log), x, rtol=0.01, atol=0 if log else 0.3)
    np.testing.assert_allclose(read(y_ticks, py, log), y, rtol=0.03, atol=0 if log else 0.3)


def test_gaps_stay_gaps_and_lonely_points_are_dots():
    y = [1, 2, np.nan, 3, np.nan, np.inf, 4, 5]
    svg = plots.lines([Line(name="a", x=range(8), y=y)], title="t")
    line, dot = paths(svg, "fe-line")
    assert [len(piece) for piece in points(line)] == [2, 2]
    assert dot.count("M") == 1
    # On a log axis, what is not positive is a gap too.
    svg = plots.lines([Line(name="a", x=range(5), y=[1, 2, 0, 3, 4])], title="t", y_log=True)
    assert [len(piece) for piece in points(paths(svg, "fe-line")[0])] == [2, 2]


def test_steps_hold_their_value_until_the_next_x():
    svg = plots.lines(
        [Line(name="a", x=[0, 1, 2], y=[0, 5, 7], steps=True)], title="t", x_range=(0, 2), y_range=(0, 10)
    )
    ((*found,),) = points(paths(svg, "fe-line")[0])
    (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, y4) = found
    assert x0 < x1 == x2 < x3 == x4
    assert y0 == y1 > y2 == y3 > y4


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(2, 5000))
def test_thinning_keeps_extremes_ends_and_gaps(seed, n):
    rng = np.random.default_rng(seed)
    y = np.cumsum(rng.normal(size=n))
    y[rng.integers(0, n)] += 100 * rng.choice([-1, 1])  # a spike that must not be lost
    svg = plots.lines([Line(name="a", x=np.arange(n), y=y)], title="t")
    ((*found,),) = points(paths(svg, "fe-line")[0])
    assert len(found) <= 480
    thinned = np.array(found)[:, 1]
    # 227 px of height or less: the curve's span fills the axis but for 4 % at either end.
    _, y_ticks = scale(svg)
    if len(y_ticks) > 1:
        shown, step = read(y_ticks, thinned, False), np.ptp(y) / 200
        np.testing.assert_allclose([shown.min(), shown.max()], [y.min(), y.max()], atol=2 * step)
        np.testing.assert_allclose(shown[[0, -1]], y[[0, -1]], atol=2 * step)
    if n > 1000:
        y[n // 2] = np.nan
        svg = plots.lines([Line(name="a", x=np.arange(n), y=y)], title="t")
        assert len(points(paths(svg, "fe-line")[0])) == 2


def test_a_band_is_drawn_around_its_line_and_broken_with_it():
    x, y = np.arange(6), np.array([1.0, 2, 3, np.nan, 2, 1])
    svg = plots.lines([Line(name="a", x=x, y=y, low=y - 1, high=y + 1)], title="t", x_range=(0, 5), y_range=(0, 4))
    first, second = points(paths(svg, "fe-band")[0])
    assert (len(first), len(second)) == (6, 4)
    line = points(paths(svg, "fe-line")[0])[0]
    for (px, py), (hx, hy), (lx, ly) in zip(line, first[:3], first[:2:-1], strict=True):
        assert px == hx == lx
        assert py == pytest.approx((hy + ly) / 2, abs=0.11)
        assert hy < py < ly


def test_a_histogram_counts_shares_of_each_sample():
    rng = np.random.default_rng(0)
    samples = {"genuine": rng.normal(2, 1, 500), "impostor": np.append(rng.normal(-1, 2, 3000), np.nan)}
    svg = plots.histogram(samples, title="t", x_label="score", marks=[Mark(at=0.5, label="threshold")])
    x_ticks, y_ticks = scale(svg)
    for outline, sample in zip(paths(svg, "fe-line"), samples.values(), strict=True):
        corners = np.array(points(outline)[0])
        edges = read(x_ticks, np.unique(corners[:, 0]), False)
        heights = read(y_ticks, corners[1:-1:2, 1], False)
        expected = 100 * np.histogram(sample[np.isfinite(sample)], edges)[0] / np.isfinite(sample).sum()
        np.testing.assert_allclose(heights, expected, atol=0.7)  # edges are read off to a tenth of a pixel
        assert heights.sum() == pytest.approx(100, abs=3)
    assert "threshold" in texts(svg)
    assert len(paths(svg, "fe-mark")) == 1


@pytest.mark.parametrize("same", [[3.0], [0.0, 0.0, 0.0], [1e-30, 2e-30]])
def test_samples_without_spread_are_drawn(same):
    svg = plots.histogram({"a": same}, title="t")
    assert "nan" not in svg
    assert points(paths(svg, "fe-line")[0])


def test_marks_and_shades_outside_the_axis_are_left_out():
    line = Line(name="a", x=[1, 100], y=[0, 1])
    marks = [Mark(at=10, label="in"), Mark(at=1000, label="out"), Mark(at=0.5, label="level", axis="y")]
    svg = plots.lines([line], title="t", x_log=True, marks=marks, shade=(0, 5, "doubtful"))
    assert len(paths(svg, "fe-mark")) == 2
    assert {"in", "level", "doubtful"} < set(texts(svg))
    assert "out" not in texts(svg)
    (shade,) = paths(svg, "fe-shade")
    (left, _), (right, _) = points(shade)[0][:2]
    (mark, _) = points(paths(svg, "fe-mark")[0])[0][0]
    assert left < right < mark
    assert not paths(plots.lines([line], title="t", shade=(200, 300, "none")), "fe-shade")


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (0.14, 0.185, False), (-3.4, 2.2, False), (0, 123456, False), (1e-7, 3e-7, False), (0.2, 100, True),
     (1e-6, 1, True), (1, 1.2, True), (1e-9, 1e9, True), (31, 32, True), (5.0, 5.0, False), (5.0, 5.0, True)],
)  # fmt: skip
def test_ticks_are_few_round_and_within(low, high, log):
    svg = plots.lines([Line(name="a", x=[0, 1], y=[low, high])], title="t", y_log=log)
    _, y_ticks = scale(svg)
    values = y_ticks[:, 1]
    assert 2 <= len(values) <= 9
    assert (np.diff(values) > 0).all()
    assert len(set(values)) == len(values)
    pixels = points(paths(svg, "fe-rule")[0])
    assert [piece[0][1] for piece in pixels] == pytest.approx(y_ticks[:, 0], abs=0.11)
    assert 27 < min(y_ticks[:, 0]) < max(y_ticks[:, 0]) <= plots.HEIGHT - plots.BOTTOM
    if not log:
        np.testing.assert_allclose(np.diff(values), np.diff(values)[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (-2.5, "−2.5"), (2000, "2000"), (12000, "12k"), (3e6, "3M"), (2.5e-5, "2.5e-5")],
)  # fmt: skip
def test_labels_of_ticks_are_short(value, text):
    assert plots._label(value) == text


def test_hostile_text_stays_text():
    evil = "</title><script>alert(1)</script>\"'&\x00\udcff"
    svg = plots.lines(
        [Line(name=evil, x=[0, 1], y=[0, 1]), Line(name="b", x=[0, 1], y=[1, 0])], title=evil, x_label=evil, y_label=evil,
        marks=[Mark(at=0.5, label=evil)], shade=(0, 0.5, evil),
    )  # fmt: skip
    both = plots.grid([svg, plots.histogram({evil: [0, 1], "b": [2]}, title=evil, x_label=evil)])
    root = ET.fromstring(both)  # well-formed
    assert not list(root.iter("script")) + list(root.iter(f"{SVG}script"))
    both.encode("utf-8")
    assert sum("alert(1)" in text for text in texts(both)) == 9


def test_an_svg_names_itself_and_needs_nothing_else():
    svg = plots.lines([Line(name="a", x=[0, 1], y=[0, 1])], title="Loss")
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == root.find(f"{SVG}title").text == "Loss"
    assert svg == plots.lines([Line(name="a", x=[0, 1], y=[0, 1])], title="Loss")
    assert "id=" not in svg  # several in one page cannot collide
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r"#[0-9a-f]{3,6}|https?:", svg.replace(plots.STYLE, "").replace(SVG[1:-1], ""))


def test_a_grid_places_plots_and_keeps_one_style():
    some = [plots.lines([Line(name="a", x=[0, 1], y=[0, i])], title=f"plot {i}") for i in range(3)]
    root = ET.fromstring(plots.grid(some, columns=2))
    inner = [(int(svg.get("x")), int(svg.get("y"))) for svg in root.iter(f"{SVG}svg") if svg is not root]
    assert inner == [(0, 0), (plots.WIDTH, 0), (0, plots.HEIGHT)]
    assert root.get("viewBox") == f"0 0 {2 * plots.WIDTH} {2 * plots.HEIGHT}"
    assert len(list(root.iter(f"{SVG}style"))) == 1
    nested = ET.fromstring(plots.grid([plots.grid(some), some[0]], columns=1))
    assert nested.get("viewBox") == f"0 0 {2 * plots.WIDTH} {3 * plots.HEIGHT}"
    for bad in (([], 2), (some, 0)):
        with pytest.raises(ValueError, match="at least one of each"):
            plots.grid(*bad)


def contrast(one, other):
    """WCAG's contrast ratio of two #rrggbb colours."""

    def luminance(colour):
        colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_colours_are_seen_on_their_ground():
    light, dark = (dict(re.findall(r"--fe-(\w+):(#\w+)", part)) for part in plots.STYLE.split("@media"))
    for colours in (light, dark):
        assert contrast(colours["text"], colours["ground"]) > 7
        assert contrast(colours["muted"], colours["ground"]) > 4.5
        assert min(contrast(value, colours["ground"]) for name, value in colours.items() if "hue" in name) > 3


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"loss has arrays of shapes .*give one y"):
        plots.lines([Line(name="loss", x=[1, 2], y=[1])], title="t")
    with pytest.raises(ValueError, match="goes back in x"):
        plots.lines([Line(name="", x=[2, 1], y=[1, 2])], title="t")
    with pytest.raises(ValueError, match="none of a has a finite value"):
        plots.histogram({"a": [np.nan]}, title="t")
    # No data at all is no error: a run may have logged nothing but NaN.
    assert "fe-line" in plots.lines([Line(name="", x=[1, 2], y=[np.nan, np.nan])], title="t")


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(plots).failed == 0
