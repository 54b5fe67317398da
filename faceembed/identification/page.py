"""How well people are identified, as one HTML page: the planner, rates with intervals, curves, and who was let in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faceembed import metrics, page, plots, report
from faceembed.identification.openset import Rate
from faceembed.identification.protocol import IdentificationResults, Planned
from faceembed.plots import Line, Mark
from faceembed.plots import escape as _e

__all__ = ["IdentificationPage", "planner_plot", "render", "write_page"]

SHOWN = 24
"""Strangers who were let in, as thumbnails."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentificationPage:
    """What the page shows.

    Attributes:
      title: of the page.
      tested: what was tested by what, in a sentence.
      results: of `protocol.evaluate`.
      crops: photo → uint8 RGB [s, s, 3], as the network saw it: both photos of the first of `results.let_in`.
      keys: [n] name of each photo.
      facts: heading → name → value.
      commands: what each does → what to type.
    """

    title: str
    tested: str
    results: IdentificationResults
    crops: Mapping[int, NDArray[np.uint8]]
    keys: Sequence[str] | NDArray[np.str_]
    facts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    commands: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_page(path: str | os.PathLike[str], shown: IdentificationPage) -> None:
    """Writes the page as one HTML file, whole or not at all."""
    report.write_text(path, render(shown))


def render(shown: IdentificationPage) -> str:
    """The page as HTML: one document without scripts or a network. All text is escaped."""
    results = shown.results
    parts = [
        _header(shown),
        page.section("planner", "How many people can be enrolled?", _planner(results)),
        page.section("open", "Strangers among those who search", _open(results)),
        page.section("closed", "If everybody who searches were enrolled", _closed(results)),
        page.section("photos", "From one photo, and from more", _learning(results)),
        page.section("growth", "What a larger gallery does to one threshold", _growth(results)),
        page.section("tail", "Rates that are rarer than the strangers", _tail(results)),
        page.section("rivals", "Other ways to decide", _rivals(results)),
        page.section("let-in", "Strangers who were let in", _let_in(shown)),
        page.section("provenance", "Where this comes from", _provenance(shown)),
    ]
    return page.document(shown.title, parts)


# ---- parts -------------------------------------------------------------------------------------------------------------


def _header(shown: IdentificationPage) -> str:
    results = shown.results
    largest = max(row.k for row in results.closed_set if row.photos == 1)
    rows = [row for row in results.open_set if row.photos == 1 and row.k == largest and row.status != "unresolvable"]
    closed = next(row for row in results.closed_set if row.photos == 1 and row.k == largest)
    figures = [
        ("rank 1, closed set", _percent(closed.ranks[1]), f"if everybody who searches were one of the {largest:,}"),
        ("strangers", f"{results.strangers:,}", "who searched and are not enrolled"),
        ("thresholds from", f"{results.calibrated_on:,}", "other people, whose searches set them"),
    ]
    headline = ""
    if rows:
        row = min(rows, key=lambda row: row.cut.fpir)
        figures.insert(
            0,
            (
                f"FPIR, {100 * row.cut.fpir:g} % asked",
                ("~" if row.status == "flagged" else "") + report.format_percent(row.fpir.value, digits=1),
                f"of strangers were let in; interval {_between(row.fpir)}",
            ),
        )
        headline = (
            f'<div class="headline"><p class="figure">{_e(report.format_percent(row.tpir.value, digits=1))}</p>'
            f"<p>of the people enrolled are recognised in another photo, {largest:,} of them enrolled with one photo "
            "each, "
            f"at a threshold that lets one stranger in {1 / row.cut.fpir:,.0f} in. "
            f"<span>95 % interval over people {_e(_between(row.tpir))}.</span></p></div>\n"
        )
    warnings = "".join(f'<p class="note warning"><b>Warning.</b> {_e(text)}</p>' for text in results.warnings)
    return (
        f'<header id="top">\n<p class="over">faceembed · identification report</p>\n<h1>{_e(shown.title)}</h1>\n'
        f'<p class="lead">{_e(shown.tested)}</p>\n{headline}{page.tiles(figures)}\n{warnings}\n</header>'
    )


def _between(rate: Rate) -> str:
    return f"{report.format_percent(rate.low, digits=1)} to {report.format_percent(rate.high, digits=1)}"


def _percent(rate: Rate) -> str:
    return report.format_percent(rate.value, digits=1)


def _cell(rate: Rate, mark: str = "") -> str:
    interval = report.format_interval(rate.low, rate.high, digits=1).replace(" ", "\u00a0")
    return f"{mark}{_percent(rate)}".replace(" ", "\u00a0") + f"<small>{_e(interval)}</small>"


def planner_plot(series: Sequence[Line], *, title: str) -> str:
    """Who is turned away over how many are enrolled, of `planner_lines` (SVG)."""
    return plots.lines(
        series,
        title=title,
        x_label="people enrolled",
        y_label="enrolled people turned away (FNIR), %",
        x_log=True,
        y_range=(0, 100),
    )


def planner_lines(planned: Mapping[float, Sequence[Planned]], *, prefix: str = "", first: int = 0) -> list[Line]:
    """The planner's curves with their intervals: exact as lines, extrapolated as single points; hues from `first` on."""
    series = []
    for hue, (fpir, rows) in enumerate(planned.items(), start=first):
        exact = [row for row in rows if not row.extrapolated]
        name = f"{prefix}FPIR {100 * fpir:g} %"
        if exact:
            series.append(
                Line(
                    name=name, x=[row.k for row in exact], y=[100 * row.fnir.value for row in exact],
                    low=[100 * row.fnir.low for row in exact], high=[100 * row.fnir.high for row in exact], hue=hue,
                )
            )  # fmt: skip
        beyond = [row for row in rows if row.extrapolated]
        if beyond:
            # A gap after each point draws dots.
            x = np.repeat([row.k for row in beyond], 2).astype(np.float64)
            y = np.array([[100 * row.fnir.value, np.nan] for row in beyond]).ravel()
            series.append(Line(name="" if exact else f"{name}, extrapolated", x=x, y=y, hue=hue))
    return series


def _planner(results: IdentificationResults) -> str:
    if not any(results.planned.values()):
        return ""
    svg = planner_plot(planner_lines(results.planned), title="Enrolled people turned away, by gallery size")
    ks = sorted({row.k for planned in results.planned.values() for row in planned})
    shown = [k for k in ks if k in (3, 10, 32, 100, 316, 1000, 3162, 10_000, 100_000, 1_000_000)]
    rows = []
    for k in shown:
        cells = [f"{k:,}"]
        for planned in results.planned.values():
            found = [row for row in planned if row.k == k]
            cells.append(_cell(found[0].fnir, "~" if found[0].extrapolated else "") if found else "-")
        rows.append(cells)
    names = ["people enrolled", *(f"turned away at FPIR {100 * fpir:g} %" for fpir in results.planned)]
    words = (
        "FPIR is the share of strangers who are taken for anybody at all: every further person enrolled is one more "
        "chance of that, so the threshold must grow stricter, and more of those enrolled are turned away. Thresholds "
        "are those of the calibrate people. ~ and points: extrapolated beyond the people or strangers there were, by a "
        "tail and the bound that K people are K/M galleries of M."
    )
    return f'<p>{_e(words)}</p><div class="figures">{_figure("planner", svg)}</div>{page.table(names, rows, wide=True)}'


def _open(results: IdentificationResults) -> str:
    rows, flagged = [], False
    if not results.open_set:
        return f"<p>{results.calibrated_on:,} people are too few to set a threshold for these galleries and rates.</p>"
    for row in results.open_set:
        flagged |= row.status == "flagged"
        resolved = row.status != "unresolvable"
        mark = "~" if row.status == "flagged" else ""
        needs = f"-<small>needs\u00a0{row.needs:,} strangers</small>"
        rows.append([
            f"{row.k:,}", str(row.photos), f"{100 * row.cut.fpir:g}\u00a0%", _cell(row.fpir, mark) if resolved else needs,
            _cell(row.tpir) if resolved else "-",
            f"{row.cut.distance:.4f}<small>{'extrapolated' if row.cut.status == 'extrapolated' else 'exact'}</small>",
        ])  # fmt: skip
    names = ["enrolled", "photos each", "FPIR asked", "FPIR here", "TPIR", "squared distance"]
    series = [
        Line(name=name, x=metrics.probit(fpir), y=metrics.probit(np.clip(fnir, 1e-6, 1 - 1e-6)))
        for name, (fpir, fnir) in results.det.items()
        if fpir
    ][:6]
    figures = ""
    if series:
        ticks = {float(metrics.probit(rate)): f"{100 * rate:g}" for rate in _RATES}
        low = min(float(np.min(line.x)) for line in series)
        bottom = max(-3.1, min(float(np.min(line.y)) for line in series) - 0.1)
        top = min(2.4, max(float(np.max(line.y)) for line in series) + 0.1)
        svg = plots.lines(
            series, title="DET", x_label="FPIR: strangers let in, %", y_label="FNIR: enrolled people turned away, %",
            x_range=(low, 0.0), y_range=(bottom, top), x_ticks=ticks, y_ticks=ticks,
        )  # fmt: skip
        note = "At thresholds of these people themselves; lower is better."
        figures = f'<div class="figures">{_figure("det", svg, note)}</div>'
    notes = (
        "TPIR: the person's own name comes first, at or above the threshold, in a gallery of that size (1 - FNIR). "
        "FPIR counts searches by strangers, not comparisons. Rates are means over all galleries of that size that "
        "these people make, with 95 % intervals over people; the threshold was set on others."
        + (" ~ rests on 10 to 30 expected events." if flagged else "")
    )
    return figures + page.table(names, rows, wide=True) + f'<p class="small">{_e(notes)}</p>'


_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)


def _closed(results: IdentificationResults) -> str:
    ranks = list(dict.fromkeys(rank for row in results.closed_set for rank in row.ranks))
    rows = [
        [f"{row.k:,}", str(row.photos), *(_cell(row.ranks[rank]) if rank in row.ranks else "-" for rank in ranks)]
        for row in results.closed_set
    ]
    svg = plots.lines(
        [
            Line(
                name=f"K = {row.k}, {row.photos} photo{'s' if row.photos > 1 else ''}",
                x=np.arange(1, len(row.cmc) + 1), y=100 * np.array(row.cmc), steps=False,
            )
            for row in results.closed_set
        ][:6],
        title="CMC", x_label="rank R", y_label="mate among the first R, %", x_log=True,
    )  # fmt: skip
    table = page.table(["enrolled", "photos each", *(f"rank {rank}" for rank in ranks)], rows, wide=True)
    return f'<div class="figures">{_figure("cmc", svg)}</div>{table}'


def _learning(results: IdentificationResults) -> str:
    if not results.learning:
        return ""
    rows = results.learning
    x = [row["photos"] for row in rows]
    k, cut = rows[0]["k"], rows[0]["open"].cut
    series = [
        Line(name=name, x=x, y=[100 * rate.value for rate in rates], low=[100 * rate.low for rate in rates],
             high=[100 * rate.high for rate in rates])
        for name, rates in (
            ("rank 1, closed set", [row["rank1"] for row in rows]),
            (f"TPIR at FPIR {100 * cut.fpir:g} %", [row["open"].tpir for row in rows]),
        )
    ]  # fmt: skip
    svg = plots.lines(
        series, title=f"The same {k} people, by photos enrolled", x_label="photos of each person", y_label="found, %",
        x_ticks={n: str(n) for n in x},
    )  # fmt: skip
    note = (
        "The template is the mean of the photos' directions; each number of photos has a threshold of its own, since "
        "a mean lies nearer to its person and to others alike."
    )
    return f'<div class="figures">{_figure("learning", svg, note)}</div>'


def _growth(results: IdentificationResults) -> str:
    figures = []
    for row in results.growth:
        k = np.array(row["k"], np.float64)
        inside = k <= row["pool"]
        beyond = k >= k[inside][-1]
        low, high = 100 * np.array(row["low"]), 100 * np.array(row["high"])
        series = [
            Line(name="exact", x=k[inside], y=low[inside]),
            Line(name="", x=k, y=np.full(len(k), np.nan), band=(k[beyond], low[beyond], high[beyond]), hue=0),
            Line(name="if independent", x=k, y=100 * np.array(row["naive"])),
        ]
        cut = row["cut"]
        svg = plots.lines(
            series, title=f"FPIR at the threshold for {100 * cut.fpir:g} % among {cut.k:,}", x_label="people enrolled",
            y_label="strangers let in (FPIR), %", x_log=True, y_range=(0, 100),
        )  # fmt: skip
        figures.append(_figure(f"growth-{cut.fpir:g}", svg))
    if not figures:
        return ""
    note = (
        "Beyond the people there are, the truth lies in expectation within the band: below, strangers with no match "
        "so far have none anywhere; above, the last person's share of new ones goes on. “If independent” is 1 - (1 - "
        "FMR)^K, for comparison."
    )
    return f'<div class="figures">{"".join(figures)}</div><p class="small">{_e(note)}</p>'


def _tail(results: IdentificationResults) -> str:
    tail, stability = results.tail, results.stability
    if tail is None or stability is None:
        return ""
    score, seen = (np.array(part) for part in results.seen)
    grid = np.linspace(tail.at, max(score[0], tail.threshold(min(1e-4, tail.share / 2))), 120)
    model = 100 * tail.fpir(grid)
    survival = plots.lines(
        [
            Line(name="seen", x=score[::-1], y=100 * seen[::-1]),
            Line(name="generalised Pareto tail", x=grid, y=model),
        ],
        title=f"Best scores of strangers, {tail.k:,} enrolled", x_label="score: minus squared distance",
        y_label="strangers at or above it, %", y_log=True, y_range=(0.005, 20),
    )  # fmt: skip
    order = np.argsort(stability.share)
    share = 100 * stability.share[order]
    shape = plots.lines(
        [Line(name="shape", x=share, y=stability.shape[order], low=stability.shape_low[order],
              high=stability.shape_high[order])],
        title="Shape ξ by where the tail begins", x_label="strangers above the start of the tail, %", x_log=True,
        marks=[Mark(at=0.0, label="0: exponential", axis="y")],
    )  # fmt: skip
    at = plots.lines(
        [Line(name="threshold", x=share, y=-stability.threshold[order], low=-stability.high[order],
              high=-stability.low[order])],
        title=f"Squared distance for FPIR {100 * stability.target:g} %", x_log=True,
        x_label="strangers above the start of the tail, %",
    )  # fmt: skip
    rows = [
        [
            f"{test.k:,}", f"{100 * test.target:g}\u00a0%",
            f"{test.fitted_on:,}<small>{test.expected:.0f} expected</small>",
            f"{report.format_percent(test.realised)}<small>"
            f"{_e(report.format_interval(test.low, test.high)).replace(' ', chr(160))}</small>",
            f"{test.others:,}",
        ]
        for test in results.backtests
    ]  # fmt: skip
    words = (
        f"{results.calibrated_on:,} strangers cannot show a rate of one in ten thousand. Above the score that one in "
        "ten reaches, the excess of each stranger's best score is taken to be generalised Pareto; thresholds that "
        "were found so are marked as extrapolated. Where the model holds, it says the same wherever the tail begins. "
        "People who are in the set under two names, and wrong labels, are strangers with very high scores: they make "
        "a tail heavy."
    )
    figures = _figure("tail", survival) + _figure("shape", shape) + _figure("tail-threshold", at)
    backtest = ""
    if rows:
        names = ["enrolled", "FPIR asked", "strangers shown", "FPIR of the hidden", "strangers hidden"]
        backtest = (
            "<h3>With most strangers hidden</h3><p>Half of the calibrate people are enrolled, the others are "
            "strangers, few of whom are shown: ten or three are expected at the rate asked for, as near as a policy "
            "goes. The many who are hidden say what the thresholds are worth: the mean over draws, and where 95 % of "
            "them lie. Where the mean lies above what was asked for, extrapolated thresholds let in "
            f"more.</p>{page.table(names, rows)}"
        )
    return f'<p>{_e(words)}</p><div class="figures">{figures}</div>{backtest}'


def _rivals(results: IdentificationResults) -> str:
    if not results.rivals:
        return ""
    names = ["method", "enrolled", "photos each", "TPIR", "FPIR here", "rank 1", "one more person"]
    rows = [
        [
            f"<code>{_e(row['method'])}</code><small>{_e(row['words'])}</small>", f"{row['k']:,}", str(row["photos"]),
            _cell(row["tpir"]), _cell(row["fpir"]), _cell(row["rank1"]), _seconds(row["seconds"]),
        ]
        for row in results.rivals
    ]  # fmt: skip
    fpir = results.rivals[0]["target"]
    words = (
        f"All decide on the same embeddings, at thresholds that the calibrate people set for an FPIR of {100 * fpir:g} "
        "%. The last column is the time from one more person's photos to the first search that knows them."
    )
    return f"<p>{_e(words)}</p>{page.table(names, rows, wide=True)}"


def _seconds(seconds: float) -> str:
    return (
        f"{1e6 * seconds:.0f}\u00a0µs"
        if seconds < 1e-3
        else f"{1e3 * seconds:.1f}\u00a0ms"
        if seconds < 1
        else f"{seconds:.1f}\u00a0s"
    )


def _let_in(shown: IdentificationPage) -> str:
    rows = [row for row in shown.results.let_in if row.probe in shown.crops and row.template in shown.crops][:SHOWN]
    if not rows:
        return "<p>Nobody was.</p>"
    cards = []
    for row in rows:
        images = "".join(
            f'<img src="{page.data_uri(shown.crops[photo])}" alt="{_e(shown.keys[photo])}" title="{_e(shown.keys[photo])}" '
            f'width="{page.THUMBNAIL}" height="{page.THUMBNAIL}">'
            for photo in (row.probe, row.template)
        )
        names = "".join(f"<bdi>{_e(shown.keys[photo])}</bdi>" for photo in (row.probe, row.template))
        cards.append(
            f"<figure><div>{images}</div><figcaption><b>{row.distance:.3f} · let in at FPIR {100 * row.fpir:g} "
            f"%</b>{names}</figcaption></figure>"
        )
    words = (
        f"{len(shown.results.let_in):,} of {shown.results.strangers:,} strangers were taken for somebody in one of the "
        "draws, at the most lenient threshold above; the nearest are shown, the stranger on the left and the enrolled "
        "photo on the right. Look whether it is one person under two names. Whoever has this page has these photos: "
        "share it as you would share them."
    )
    return f'<p>{_e(words)}</p><div class="pairs">{"".join(cards)}</div>'


def _provenance(shown: IdentificationPage) -> str:
    commands = "".join(f"<h3>{_e(what)}</h3><pre>{_e(command)}</pre>" for what, command in shown.commands.items())
    tables = [
        f"<div><h3>{_e(title)}</h3>{page.table((), [[_e(name), _e(value)] for name, value in facts.items()])}</div>"
        for title, facts in shown.facts.items()
    ]
    return commands + (f'<div class="columns">{"".join(tables)}</div>' if tables else "")


def _figure(which: str, svg: str, note: str = "") -> str:
    caption = f"<figcaption>{_e(note)}</figcaption>" if note else ""
    return f'<figure id="figure-{which}">{svg.replace(plots.STYLE, "")}{caption}</figure>\n'
