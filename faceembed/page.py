"""The one page to look at: results, curves and photos as a single HTML file without scripts or a network.

Everything that a page shows is plain data, so that a test, or a later version, can make one without a run. All text is
escaped: people and folders are named by strangers. The same data give the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from faceembed import metrics, plots, report
from faceembed.plots import Line, Mark
from faceembed.plots import escape as _e

__all__ = [
    "Page",
    "Pair",
    "Setting",
    "data_uri",
    "document",
    "headline",
    "section",
    "settings",
    "table",
    "tiles",
    "write_page",
]

Floats = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]

THUMBNAIL = 96
"""Pixels of a side: larger crops are scaled down to it."""


CURVES = 6
"""Heads that are drawn in one figure: the headline's, and the first of the others in the order asked for."""

EVENTS = 8
"""Events of a training that are spelled out; the others are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A pair of photos to look at.

    Attributes:
      same: whether both show one person.
      accepted: whether the head said so.
      score: higher = same person.
      crops: uint8 RGB [s, s, 3] of each side.
      people, photos: who is on each side, and the photo's key.
    """

    same: bool
    accepted: bool
    score: float
    crops: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    people: tuple[str, str]
    photos: tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a config: "batch.people", its value, and the default where that is another."""

    name: str
    value: Any
    default: Any = None
    changed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows; parts that are empty are left out.

    Attributes:
      title: of the page.
      tested: what was verified, in a sentence.
      results: `Results.to_dict()` of a list of pairs, or nothing.
      scores: head → [n] scores of the tested pairs, higher = same person.
      same: [n] bool, True for genuine pairs.
      everyone: `DenseResults.to_dict()` of all photos against each other, or nothing.
      slices: rows of `slices.Slice.row()`.
      warnings: what a reader must know, beside the warnings of `results`.
      hardest: pairs that the head of `headline` finds hardest.
      rows: of metrics.jsonl, each with its "step".
      events: of events.jsonl: step, kind, message.
      settings: of the config.
      facts: heading → name → value: what the checkpoint was trained on, versions.
      commands: what each does → what to type.
    """

    title: str
    tested: str
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    same: NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    everyone: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slices: Rows = ()
    warnings: Sequence[str] = ()
    hardest: Sequence[Pair] = ()
    rows: Rows = ()
    events: Rows = ()
    settings: Sequence[Setting] = ()
    facts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    commands: Mapping[str, str] = dataclasses.field(default_factory=dict)


def headline(heads: Iterable[str]) -> str:
    """The head that a page opens with: the one that `Embedder.head` gives unless told, or the first. Never the best."""
    names = list(heads)
    return "logistic_distance" if "logistic_distance" in names else names[0]


def settings(config: Any, *, prefix: str = "") -> list[Setting]:
    """The fields of nested dataclasses, each held against the default of its own class.

    Args:
      config: a dataclass all of whose fields have defaults. A field that holds another dataclass than its default
        (a union's other member) counts as changed, and its fields are held against that other one's.
      prefix: stands before the names.
    """
    usual = type(config)()
    found = []
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(usual, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(value):
            kinds = type(value).__name__, type(default).__name__
            found.append(Setting(name=name, value=kinds[0], default=kinds[1], changed=kinds[0] != kinds[1]))
            found += settings(value, prefix=f"{name}.")
        else:
            found.append(Setting(name=name, value=value, default=default, changed=value != default))
    return found


def write_page(path: str | os.PathLike[str], page: Page) -> None:
    """Writes the page as one HTML file, whole or not at all.

    Raises:
      OSError: the folder cannot be written; the old file stands.
    """
    report.write_text(path, render(page))


def render(page: Page) -> str:
    """The page as HTML: one document that needs no other file."""
    parts = [
        _header(page),
        section("results", "Heads side by side", _heads(page)),
        section("differences", "Is one better?", _differences(page)),
        section("everyone", "Every photo against every other", _everyone(page)),
        section("scores", "Where the errors lie", _score_figures(page)),
        section("slices", "Whom it suits less well", _slices(page)),
        section("hardest", "The hardest pairs", _hardest(page)),
        section("training", "Training", _training(page)),
        section("provenance", "Where this comes from", _provenance(page)),
    ]
    return document(page.title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """One HTML document that needs no other file and runs no script; empty parts are left out.

    Args:
      title: text, escaped here.
      parts: HTML of the header and the sections.
    """
    # Nothing may be fetched or run, whatever a name smuggles in.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{_e(title)}</title>\n{plots.STYLE}\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---- parts -------------------------------------------------------------------------------------------------------------


def _header(page: Page) -> str:
    figure = _headline_of_list(page) if page.results else _headline_of_everyone(page)
    warnings = [*page.results.get("warnings", ()), *page.warnings]
    notes = "".join(f'<p class="note warning"><b>Warning.</b> {_e(warning)}</p>' for warning in warnings)
    for event in page.events[:EVENTS]:
        notes += f'<p class="note event"><b>Step {_e(event["step"])}.</b> {_e(event["message"])}</p>'
    if len(page.events) > EVENTS:
        notes += f'<p class="small">{len(page.events) - EVENTS} more events are in events.jsonl.</p>'
    return (
        f'<header id="top">\n<p class="over">faceembed · verification report</p>\n<h1>{_e(page.title)}</h1>\n'
        f'<p class="lead">{_e(page.tested)}</p>\n{figure}\n{notes}\n</header>'
    )


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Figures to open a page with: (what, value, words beneath), all text."""
    shown = "".join(
        f"<div><dt>{_e(what)}</dt><dd><b>{_e(value)}</b><span>{_e(words)}</span></dd></div>"
        for what, value, words in figures
    )
    return f'<dl class="tiles">{shown}</dl>'


def _headline_of_everyone(page: Page) -> str:
    results = page.everyone
    name = headline(results["heads"])
    head = results["heads"][name]
    points = [point for point in head["tar"] if point["resolution"]["status"] != "unresolvable"]
    point = min(points, key=lambda p: p["fmr"]) if points else head["tar"][0]
    interval = point["interval"]
    level = f"{100 * interval['level']:g} %"
    n = results["n_genuine"] + results["n_impostor"]
    figures = [
        ("AUC", f"{head['auc']:.4f}", "how often a genuine pair outscores an impostor pair"),
        ("EER", report.format_percent(head["eer"]), "error rate where false matches and false non-matches are equal"),
        ("by pairs", report.format_percent(point["tar_pairs"]), "the same, every genuine pair weighing equally"),
        ("compared", f"{n:,}", f"{results['n_genuine']:,} genuine, {results['n_impostor']:,} impostor pairs"),
    ]
    return (
        f'<div class="headline"><p class="figure">{_e(report.format_percent(point["tar"]))}</p>'
        f"<p>of the pairs of one person's photos are accepted when {100 * point['fmr']:g} % of the pairs of two people's "
        f"are: mean over {results['n_genuine_people']:,} people. "
        f"<span>With the head <code>{_e(name)}</code>; {level} interval "
        f"{_e(report.format_percent(interval['low']))} to {_e(report.format_percent(interval['high']))}.</span></p></div>\n"
        + tiles(figures)
    )


def _headline_of_list(page: Page) -> str:
    results = page.results
    name = headline(results["heads"])
    head = results["heads"][name]
    interval = head["interval"]
    n = results["n_genuine"] + results["n_impostor"]
    people = "" if results["n_people"] is None else f" of {results['n_people']:,} people"
    level = f"{100 * interval['level']:g} %"
    points = [_operating_point(point) for point in head["tar"]]
    figures = [
        ("AUC", f"{head['auc']:.4f}", "how often a genuine pair outscores an impostor pair"),
        ("EER", report.format_percent(head["eer"]), "error rate where false accepts and false rejects are equal"),
    ]
    resolved = [point for point in points if point.resolution]
    if resolved:
        point = min(resolved, key=lambda point: point.target)
        flagged = "~" if point.resolution.status == "flagged" else ""
        figures.append(
            (
                f"TAR @ FAR {100 * point.target:g} %",
                flagged + report.format_percent(point.tar),
                f"genuine pairs accepted; {report.format_percent(point.far)} of impostor pairs were, too",
            )
        )
    figures.append(("tested pairs", f"{n:,}", f"{results['n_genuine']:,} genuine, {results['n_impostor']:,} impostor"))
    return (
        f'<div class="headline"><p class="figure">{_e(report.format_percent(head["accuracy"]))}</p>'
        f"<p>of {n:,} pairs of photos{people} were decided correctly: same person, or two? "
        f"<span>With the head <code>{_e(name)}</code>; {level} interval "
        f"{_e(report.format_percent(interval['low']))} to {_e(report.format_percent(interval['high']))}.</span></p></div>\n"
        + tiles(figures)
    )


def _operating_point(point: Mapping[str, Any]) -> metrics.OperatingPoint:
    return metrics.OperatingPoint(**{f.name: point[f.name] for f in dataclasses.fields(metrics.OperatingPoint)})


def _heads(page: Page) -> str:
    if not page.results:
        return ""
    heads = page.results["heads"]
    first = next(iter(heads.values()))
    fars = [point["target"] for point in first["tar"]]
    level = f"{100 * first['interval']['level']:g} %"
    names = ["head", "accuracy", f"{level} interval", "AUC", "EER"]
    names += [*(f"TAR @ FAR {100 * far:g} %" for far in fars), "Cllr, bits", "threshold"]
    rows, flagged = [], False
    for name, head in heads.items():
        points = [_operating_point(point) for point in head["tar"]]
        flagged |= any(point.resolution.status == "flagged" for point in points)
        folds, interval = head["fold_accuracy"], head["interval"]
        spread = f"folds {100 * min(folds):.1f} to {100 * max(folds):.1f}" if len(folds) > 1 else ""
        rows.append(
            [
                f"<code>{_e(name)}</code>" + _beneath(_fitted(head["fitted"])),
                _solid(report.format_percent(head["accuracy"]))
                + _beneath(f"± {100 * head['standard_error']:.2f}")
                + _beneath(spread),
                _solid(report.format_interval(interval["low"], interval["high"]))
                + _beneath(f"effective n {interval['n_effective']:,.0f}"),
                f"{head['auc']:.4f}" + _beneath(f"{head['auc_low']:.3f}\u00a0to\u00a0{head['auc_high']:.3f}"),
                _solid(report.format_percent(head["eer"])),
                *(_tar(point) for point in points),
                ("-" if head["cllr"] is None else f"{head['cllr']:.3f}")
                + _beneath(f"least\u00a0{head['min_cllr']:.3f}")
                + ("" if head["brier"] is None else _beneath(f"Brier\u00a0{head['brier']:.3f}"))
                + ("" if head["ece"] is None else _beneath(f"ECE\u00a0{100 * head['ece']:.1f}\u00a0%")),
                _several(head["threshold"]),
            ]
        )
    notes = [
        f"{page.results['protocol'].capitalize()}.",
        "± is one standard error.",
        f"The intervals assume: {first['interval']['assumes']}.",
        "TAR: genuine pairs accepted, and beneath it the impostor pairs accepted with them; the threshold was set, for the "
        "FAR above, on the pairs that fitted the head.",
        "Least: what the best calibration of the same scores would cost. Brier score and calibration error (ECE) are at "
        "equally many genuine and impostor pairs.",
    ]
    if flagged:
        notes.append("~ rests on fewer than 30 expected false accepts.")
    return table(names, rows, wide=True) + f'<p class="small">{_e(" ".join(notes))}</p>'


def _differences(page: Page) -> str:
    results = page.results
    if not results or not results["differences"].get(results["primary"]):
        return ""
    figures = []
    for quantity, found in results["differences"].items():
        words = _quantity(quantity)
        svg = plots.forest(
            [_estimate(name, difference) for name, difference in found.items()],
            title=f"Minus {results['reference']}: {words}",
            x_label="points",
        )
        note = "Declared in advance to compare by." if quantity == results["primary"] else ""
        figures.append(_figure(f"difference-{quantity}", svg, note))
    rows = [
        [
            f"<code>{_e(name)}</code>",
            f"{100 * difference['estimate']:+.2f}",
            _e(_between(difference)),
            f"{100 * difference['detectable']:.2f}",
            _p_value(results["mcnemar"][name]["p"]),
        ]
        for name, difference in results["differences"][results["primary"]].items()
    ]
    primary = _quantity(results["primary"])
    shown = table(
        ["head", f"difference in {primary}, points", "interval for all at once", "detectable", "McNemar p"], rows
    )
    sentences = "".join(f"<li>{_e(sentence)}</li>" for sentence in results["conclusions"])
    sentences = f'<ul class="sentences">{sentences}</ul>'
    refits = ", heads refitted on training people drawn anew" if results["refits"] else "; the heads are given"
    notes = (
        "Thick: the interval of this head alone; thin: intervals that hold for all heads at once. They allow for pairs "
        f"that share people{refits}. Detectable: the true difference that such data would show four times in five. "
        "McNemar's test assumes independent pairs."
    )
    return f'{sentences}<div class="figures">{"".join(figures)}</div>{shown}<p class="small">{_e(notes)}</p>'


def _quantity(name: str) -> str:
    if name.startswith("tar@"):
        return f"TAR at matched FAR {100 * float(name[4:]):g} %"
    return {"accuracy": "accuracy", "auc": "AUC"}[name]


def _estimate(name: str, difference: Mapping[str, Any], value: str = "estimate") -> plots.Estimate:
    return plots.Estimate(
        name=name,
        value=100 * difference[value],
        low=100 * difference["low"],
        high=100 * difference["high"],
        wide_low=100 * difference["simultaneous_low"],
        wide_high=100 * difference["simultaneous_high"],
    )


def _between(difference: Mapping[str, Any]) -> str:
    return f"{100 * difference['simultaneous_low']:+.2f} to {100 * difference['simultaneous_high']:+.2f}".replace(
        "-", "−"
    )


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"


def _everyone(page: Page) -> str:
    results = page.everyone
    if not results:
        return ""
    heads = results["heads"]
    first = next(iter(heads.values()))
    level = f"{100 * results['level']:g} %"
    rows = []
    for name, head in heads.items():
        cells = []
        for point in head["tar"]:
            if point["resolution"]["status"] == "unresolvable":
                cells.append("-" + _beneath(f"needs\u00a0{point['resolution']['needs']:,} pairs"))
                continue
            flag = "~" if point["resolution"]["status"] == "flagged" else ""
            interval = report.format_interval(point["interval"]["low"], point["interval"]["high"], digits=1)
            by_pair = f"by pairs {report.format_percent(point['tar_pairs'], digits=1)}"
            tar = flag + report.format_percent(point["tar"], digits=1)
            cells.append(_solid(tar) + _beneath(interval) + _beneath(by_pair))
        rows.append(
            [f"<code>{_e(name)}</code>", *cells, f"{head['auc']:.4f}", _solid(report.format_percent(head["eer"]))]
        )
    names = ["head", *(f"TAR @ FMR {100 * point['fmr']:g} %" for point in first["tar"]), "AUC", "EER"]
    parts = [
        f"<p>{results['n_images']:,} photos of {results['n_people']:,} people: {results['n_genuine']:,} genuine and "
        f"{results['n_impostor']:,} impostor pairs, counted one by one. In TAR each of the {results['n_genuine_people']:,} "
        "people with two photos or more weighs equally; weighing pairs equally would leave the say to "
        f"{results['effective_people']:,.1f} people.</p>",
        table(names, rows, wide=True),
        f'<p class="small">[ ]: {level} intervals over {results["draws"]:,} draws of people; thresholds at each FMR of '
        "these photos, to compare heads at one point. The heads are given.</p>",
    ]
    moved = [
        [
            f"<code>{_e(name)}</code>",
            f"{100 * point['target']:g}\u00a0%",
            _solid(f"{100 * point['fmr']:.3g} %") + _beneath(_tight(point["fmr_interval"])),
            _solid(report.format_percent(point["fnmr"])) + _beneath(_tight(point["fnmr_interval"])),
        ]
        for name, head in heads.items()
        for point in head["transferred"]
    ]
    if moved:
        parts.append("<h3>At thresholds that were set on other people</h3>")
        parts.append(table(["head", "set for FMR", "FMR here", "FNMR"], moved))
    figures = []
    for fmr in sorted({difference["fmr"] for difference in results["differences"]}):
        found = [d for d in results["differences"] if d["fmr"] == fmr and d["resolution"]["status"] != "unresolvable"]
        if found:
            svg = plots.forest(
                [_estimate(difference["head"], difference, "difference") for difference in found],
                title=f"Minus {results['reference']}: TAR at FMR {100 * fmr:g} %",
                x_label="points",
            )
            figures.append(_figure(f"everyone-difference-{fmr:g}", svg, ""))
    figures.insert(0, _figure("everyone-roc", _dense_roc(results), "Band: 95 % over people, double or nothing."))
    figures.insert(1, _figure("everyone-det", _dense_det(results), _DET_NOTE))
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    spread = first["concentration"]
    if spread:
        name = next(iter(heads))
        who = [
            [_e(p["person"]), f"{p['photos']:,}", f"{p['errors']:,}", f"{p['comparisons']:,}"]
            for p in spread["lambs_and_wolves"]
        ]
        not_found = [
            [_e(p["person"]), f"{p['photos']:,}", f"{p['errors']:,}", f"{p['comparisons']:,}"] for p in spread["goats"]
        ]
        parts.append(
            f"<h3>Who has the errors, at FMR {100 * spread['fmr']:g} %</h3><p>1 % of the people hold "
            f"{100 * spread['top_1']:.0f} % of <code>{_e(name)}</code>'s false matches and take part in "
            f"{100 * spread['exposure_1']:.0f} % of the impostor comparisons; 10 % hold {100 * spread['top_10']:.0f} % and "
            f"take part in {100 * spread['exposure_10']:.0f} %.</p>"
            f'<div class="two"><div><h3>Most false matches (lambs and wolves)</h3>'
            f"{table(('person', 'photos', 'false matches', 'comparisons'), who)}</div>"
            f"<div><h3>Refused most often (goats)</h3>"
            f"{table(('person', 'photos', 'refused', 'own pairs'), not_found)}</div></div>"
        )
    return "".join(parts)


def _tight(interval: Mapping[str, Any]) -> str:
    return f"{100 * interval['low']:.3g} to {100 * interval['high']:.3g} %"


def _dense_roc(results: Mapping[str, Any]) -> str:
    """TAR over people against FMR, from ten impostor pairs on."""
    name = headline(results["heads"])
    least = 100 * metrics.FLAGGED / results["n_impostor"]
    band = results["heads"][name]["band"]
    grid = 100 * np.asarray(band["fmr"], np.float64)
    low, high = (100 * np.asarray(band[edge], np.float64) for edge in ("low", "high"))
    series = [
        Line(name=other, x=100 * np.asarray(head["curve"]["fmr"]), y=100 * np.asarray(head["curve"]["tar"]), steps=True)
        for other, head in results["heads"].items()
    ]
    # The band has the colour of the line whose it is: that one comes first.
    order = [name, *(other for other in results["heads"] if other != name)]
    series = sorted(series, key=lambda line: order.index(line.name))[:CURVES]
    if len(grid):
        series[0] = dataclasses.replace(series[0], band=(grid, low, high))
    return plots.lines(
        series,
        title="ROC, all pairs",
        x_label="FMR: impostor pairs accepted, %",
        y_label="TAR: own photos accepted, mean over people, %",
        x_log=True,
        x_range=(least, 100),
        y_range=(0, 100),
    )


_DET_NOTE = (
    "Lower is better. Axes are normal deviates: scores that are normal for each kind of pair give a straight line."
)
_RATES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)


def _dense_det(results: Mapping[str, Any]) -> str:
    return _det(
        {
            name: (np.asarray(head["curve"]["fmr"], np.float64), 1 - np.asarray(head["curve"]["tar"], np.float64))
            for name, head in list(results["heads"].items())[:CURVES]
        },
        10 / results["n_impostor"],
        10 / max(1, results["n_genuine"]),
    )


def _det(curves: Mapping[str, tuple[Floats, Floats]], least_fmr: float, least_fnmr: float) -> str:
    """FNMR over FMR on normal deviates, as far as ten errors of each kind support it."""
    ticks = {float(metrics.probit(rate)): f"{100 * rate:g}" for rate in _RATES}
    low = [float(metrics.probit(min(0.4, max(1e-6, least)))) for least in (least_fmr, least_fnmr)]
    high = float(metrics.probit(0.6))
    series = []
    for name, (fmr, fnmr) in curves.items():
        kept = (fmr >= least_fmr) & (fmr < 1) & (fnmr > 0) & (fnmr < 1)
        series.append(Line(name=name, x=metrics.probit(fmr[kept]), y=metrics.probit(fnmr[kept])))
    top = max((float(np.max(line.y, initial=low[1])) for line in series), default=high)
    return plots.lines(
        series,
        title="DET" if len(series) > 1 else f"DET of {series[0].name}",
        x_label="FMR: impostor pairs accepted, %",
        y_label="FNMR: genuine pairs refused, %",
        x_range=(low[0], high),
        y_range=(low[1], max(high, min(top, float(metrics.probit(0.99))))),
        x_ticks=ticks,
        y_ticks=ticks,
    )


def _reliability(heads: Mapping[str, Any]) -> str:
    """Observed shares against stated probabilities, of heads that state some."""
    series = [Line(name="perfect", x=[0, 100], y=[0, 100])]
    prior = 0.5
    for name, head in heads.items():
        found = head["reliability"]
        if found is not None:
            prior = found["prior"]
            x, y = (100 * np.asarray(found[part], np.float64) for part in ("predicted", "observed"))
            series.append(Line(name=name, x=np.maximum.accumulate(x), y=y))
    if len(series) == 1:
        return ""
    return plots.lines(
        series,
        title="Reliability",
        x_label=f"stated probability of one person, % (at {100 * prior:g} % genuine pairs)",
        y_label="share that is one person, %",
        x_range=(0, 100),
        y_range=(0, 100),
    )


def _slices(page: Page) -> str:
    if not page.slices:
        return ""
    names = list(page.slices[0])
    rows = [[_e(_value(row[name])) for name in names] for row in page.slices]
    words = (
        f"By <code>{_e(headline(page.results['heads']))}</code>, at the thresholds that decided all pairs. Parts with few "
        "pairs have wide intervals; look at those before at the rates."
    )
    return f"<p>{words}</p>{table(names, rows, wide=True)}"


def _several(threshold: Any) -> str:
    values = [float(value) for value in (threshold if isinstance(threshold, list | tuple) else [threshold])]
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return _solid(f"{min(values):.3g} to {max(values):.3g}") + _beneath(f"{len(values)} folds")


def _tar(point: metrics.OperatingPoint) -> str:
    if not point.resolution:
        return "-" + _beneath(f"needs\u00a0{point.resolution.needs:,} pairs")
    flag = "~" if point.resolution.status == "flagged" else ""
    return _solid(flag + report.format_percent(point.tar)) + _beneath(f"FAR\u00a0{100 * point.far:.2f}\u00a0%")


def _solid(text: str) -> str:
    """A figure that is not broken over two lines."""
    return _e(text.replace(" ", "\u00a0"))


def _beneath(text: str) -> str:
    """A second, smaller line of a cell."""
    return f"<small>{_e(text)}</small>" if text else ""


def _fitted(fitted: Sequence[Mapping[str, Any]]) -> str:
    head = fitted[0]
    words = [head["feature"].replace("_", " ")]
    if head["regularisation"] is not None:
        words.append(f"C = {head['regularisation']:g}" + (f" ({head['note']})" if head["note"] else ""))
    return ", ".join(words)


def _score_figures(page: Page) -> str:
    if not page.scores:
        return ""
    heads = page.results["heads"]
    same = np.asarray(page.same, bool)
    name = headline(page.scores)
    order = [name, *(other for other in page.scores if other != name)]
    order = order[:CURVES]
    bands = {other: heads[other]["band"] for other in order}
    figures = [_figure("roc", _roc({other: page.scores[other] for other in order}, same, bands[name]), _ROC_NOTE)]
    curves = {other: metrics.det(page.scores[other], same) for other in _distinct(page.scores) if other in order}
    figures.append(
        _figure(
            "det",
            _det({other: (c.fmr, c.fnmr) for other, c in curves.items()}, 1 / int((~same).sum()), 1 / int(same.sum())),
            _DET_NOTE,
        )
    )
    calibration = _reliability({other: heads[other] for other in order})
    if calibration:
        note = "Below the diagonal a head is too sure that it is one person, above it too unsure."
        figures.append(_figure("reliability", calibration, note))
    for other in order:
        thresholds = np.atleast_1d(np.asarray(heads[other]["threshold"], np.float64))
        label = "threshold" if len(thresholds) == 1 else "mean threshold"
        scores = np.asarray(page.scores[other], np.float64)
        svg = plots.histogram(
            {"genuine": scores[same], "impostor": scores[~same]},
            title=f"Scores of {other}",
            x_label="log-likelihood ratio" if heads[other]["cllr"] is not None else "score",
            marks=[Mark(at=float(thresholds.mean()), label=label)],
        )
        note = "Genuine pairs left of the threshold and impostor pairs right of it are the errors."
        figures.append(_figure(f"scores-{other}", svg, note if other == name else ""))
    left_out = len(page.scores) - len(order)
    note = f'<p class="small">Drawn are {len(order)} of {len(page.scores)} heads.</p>' if left_out else ""
    return f'<div class="figures">{"".join(figures)}</div>{note}'


_ROC_NOTE = (
    "Higher is better. Shaded: fewer than 10 impostor pairs stand behind a point, so nothing can be said there. The band "
    "is that of the first curve: 95 % over people, double or nothing."
)


def _distinct(scores: Mapping[str, Floats]) -> list[str]:
    """Heads that order the pairs differently: of several alike, the first."""
    seen: dict[bytes, str] = {}
    for name, values in scores.items():
        seen.setdefault(np.argsort(np.asarray(values), kind="stable").tobytes(), name)
    return list(seen.values())


def _roc(scores: Mapping[str, Floats], same: NDArray[np.bool_], band: Any = None) -> str:
    """TAR over FAR in steps, from the FAR of one impostor pair on; the band, if any, is of the first head."""
    least = 100 / int((~same).sum())
    curves: dict[tuple[bytes, bytes], list[str]] = {}
    for name, values in scores.items():
        curve = metrics.roc(values, same)
        last = np.append(np.diff(curve.far) > 0, True)  # the highest TAR of each FAR
        far, tar = 100 * curve.far[last], 100 * curve.tar[last]
        begun = max(0, int(np.searchsorted(far, least * (1 + 1e-9))) - 1)
        far = np.concatenate([[least], far[begun + 1 :]])
        # Heads that put the pairs in one order share a curve, and would hide each other.
        curves.setdefault((far.tobytes(), tar[begun:].tobytes()), []).append(name)
    series = [
        Line(name=", ".join(names), x=np.frombuffer(far), y=np.frombuffer(tar), steps=True)
        for (far, tar), names in curves.items()
    ]
    title = "ROC" if len(series) > 1 else f"ROC of {series[0].name}"
    if band is not None:
        x, low, high = (100 * np.asarray(part, np.float64) for part in band)
        series[0] = dataclasses.replace(series[0], band=(x, low, high))
    return plots.lines(
        series,
        title=title,
        x_label="FAR: impostor pairs accepted, %",
        y_label="TAR: genuine pairs accepted, %",
        x_log=True,
        x_range=(least, 100),
        y_range=(0, 100),
        shade=(0, 10 * least, "too few pairs"),
    )


def _hardest(page: Page) -> str:
    if not page.hardest:
        return ""
    name = headline((page.results or page.everyone)["heads"])
    parts = [
        f"<p>By the scores of <code>{_e(name)}</code>, at most one pair a person. Whoever has this page has these photos: "
        "share it as you would share them.</p>"
    ]
    kinds = (
        (True, "false-non-matches", "One person, lowest scores", "refused (false non-matches)"),
        (False, "false-matches", "Two people, highest scores", "accepted (false matches)"),
    )
    for same, which, title, wrong in kinds:
        chosen = [pair for pair in page.hardest if pair.same == same]
        if not chosen:
            continue
        errors = sum(pair.accepted != same for pair in chosen)
        cards = "".join(_card(pair) for pair in chosen)
        words = f"{errors} of {len(chosen)} were {wrong}: those with a bar."
        if errors == len(chosen):
            words = f"All {errors} were {wrong}."
        parts.append(
            f'<h3>{_e(title)}</h3><p class="small">{_e(words)}</p><div class="pairs" id="{which}">{cards}</div>'
        )
    return "".join(parts)


def _card(pair: Pair) -> str:
    shown = "".join(
        f'<img src="{data_uri(crop)}" alt="{_e(photo)}" title="{_e(photo)}" width="{THUMBNAIL}" height="{THUMBNAIL}">'
        for crop, photo in zip(pair.crops, pair.photos, strict=True)
    )
    people = pair.people[:1] if pair.same else pair.people
    names = "".join(f"<bdi>{_e(person)}</bdi>" for person in people)
    wrong = ' class="wrong"' if pair.accepted != pair.same else ""
    return f"<figure{wrong}><div>{shown}</div><figcaption><b>{_signed(pair.score)}</b>{names}</figcaption></figure>"


def data_uri(crop: NDArray[np.uint8]) -> str:
    """A picture uint8 RGB [s, s, 3], at most THUMBNAIL pixels a side, as the source of an <img>."""
    image = Image.fromarray(crop)
    if max(image.size) > THUMBNAIL:
        image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- training ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A figure of the training: metrics by name with their legends, and how they are drawn."""

    which: str
    title: str
    names: Mapping[str, str]
    y_label: str = ""
    percent: bool = False
    y_log: bool = False
    note: str = ""


_PANELS: Mapping[str, Sequence[_Panel]] = {
    "Does it learn?": (
        _Panel(
            "loss",
            "Loss",
            {"loss": "loss", "loss_genuine": "genuine pairs", "loss_impostor": "impostor pairs"},
            note="A triplet loss that stands still at the margin has collapsed; at 0 no triplet is left to learn from.",
        ),
        _Panel(
            "select-auc", "AUC on pairs of select people", {"select_auc": ""}, note="It chooses the best checkpoint."
        ),
        _Panel("accuracy", "Accuracy on the batch", {"accuracy": ""}, "%", percent=True),
        _Panel(
            "cosines",
            "Cosines to the training people",
            {"cos_target": "the own person", "cos_other": "the closest other"},
            note="Learning pulls the own person above every other.",
        ),
    ),
    "Triplets and embeddings": (
        _Panel(
            "distances",
            "Distances of the mined triplets",
            {"d_ap": "anchor to positive", "d_an": "anchor to negative"},
            "squared distance, median and 10-90 % band",
            note="Learning pulls the negatives above the positives; both at 0 is collapse.",
        ),
        _Panel(
            "active",
            "Active triplets",
            {
                "active": "the miner's",
                "active_hardest": "hardest",
                "active_semi_hard": "semi-hard",
                "active_all": "all",
            },
            "% of the triplets that a miner chooses",
            percent=True,
            note="Triplets within the margin are what is learned from.",
        ),
        _Panel(
            "effective-rank",
            "Effective rank of the embeddings",
            {"effective_rank": ""},
            "directions",
            note="How many directions the embeddings fill; near 1 all photos get one embedding.",
        ),
        _Panel("triplets", "Valid triplets", {"triplets": ""}, "in a batch"),
    ),
    "Optimization": (
        _Panel("grad-norm", "Gradient norm", {"grad_norm": "all", "grad_norm/": ""}, "L2, by layer group", y_log=True),
        _Panel("learning-rate", "Learning rate", {"learning_rate": ""}),
        _Panel("skipped", "Updates not finite and not applied", {"skipped": ""}, "so far"),
    ),
    "Speed and memory": (
        _Panel("images-per-s", "Speed", {"images_per_s": ""}, "images/s"),
        _Panel("memory", "Memory", {"device_memory_gb": "of the device", "host_memory_gb": "of the host"}, "GB"),
    ),
}
"""Heading → figures. A name that ends in a slash stands for all metrics of that group."""

_PART = re.compile(r"_(mean|q\d+)$")


def _training(page: Page) -> str:
    if not page.rows:
        return ""
    columns = _columns(page.rows)
    margin = _margin(page.settings)
    begun: dict[str, Mark] = {}
    for event in page.events:
        kind = str(event["kind"])
        if not kind.endswith(" over"):
            begun.setdefault(kind, Mark(at=float(event["step"]), label=kind))
    used: set[str] = set()
    groups = []
    for title, panels in _PANELS.items():
        figures = []
        for panel in panels:
            names, series = _series(panel, columns)
            used |= names
            if not series or (panel.which == "skipped" and not any(np.nan_to_num(line.y).any() for line in series)):
                continue
            marks = [] if title == "Speed and memory" else list(begun.values())
            level = margin if panel.which == "loss" else None
            figures.append(_figure(panel.which, _plot(panel, series, marks, level), panel.note))
        if figures:
            groups.append((title, figures))
    others = sorted(columns.keys() - used)
    if others:
        figures = [
            _figure(f"metric-{_slug(name)}", _plot(panel, _series(panel, columns)[1]), "")
            for name in others
            for panel in [_Panel("", name, {name: ""})]
        ]
        groups.append(("Other measurements", figures))
    return "".join(f'<h3>{_e(title)}</h3><div class="figures">{"".join(figures)}</div>' for title, figures in groups)


def _columns(rows: Rows) -> dict[str, tuple[Floats, Floats]]:
    """Metric → (steps, values), null as NaN."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                found.setdefault(name, []).append((float(row["step"]), math.nan if value is None else float(value)))
    return {
        name: (np.array([s for s, _ in points]), np.array([v for _, v in points])) for name, points in found.items()
    }


def _series(panel: _Panel, columns: Mapping[str, tuple[Floats, Floats]]) -> tuple[set[str], list[Line]]:
    """The metrics that a panel takes care of, and the lines it draws of them."""
    used: set[str] = set()
    series = []
    scale = 100.0 if panel.percent else 1.0
    for name, legend in panel.names.items():
        parts = {found: columns[found] for found in columns if found == name or _PART.sub("", found) == name}
        if name.endswith("/"):
            members = {found: columns[found] for found in columns if found.startswith(name)}
            used |= members.keys()
            series += [Line(name=found.removeprefix(name), x=x, y=scale * y) for found, (x, y) in members.items()]
        elif parts:
            used |= parts.keys()
            middle = next(part for part in (name, f"{name}_q50", f"{name}_mean", *parts) if part in parts)
            x, y = parts[middle]
            edges = [parts.get(f"{name}_{edge}", (np.zeros(0), np.zeros(0)))[1] for edge in ("q10", "q90")]
            banded = all(edge.shape == y.shape for edge in edges)
            low, high = (scale * edge if banded else None for edge in edges)
            series.append(Line(name=legend, x=x, y=scale * y, low=low, high=high))
    return used, series


def _plot(panel: _Panel, series: Sequence[Line], marks: Sequence[Mark] = (), margin: float | None = None) -> str:
    y_range = (0.0, 100.0) if panel.percent else None
    values = np.concatenate([np.asarray(line.y, np.float64) for line in series])
    top = float(np.max(values, initial=0.0, where=np.isfinite(values)))
    if margin is not None and top > margin / 2:
        # How near the loss is to the margin is what one looks for, unless it is far below.
        marks = [*marks, Mark(at=margin, label="margin", axis="y")]
        y_range = (0.0, 1.08 * max(margin, top))
    return plots.lines(
        series,
        title=panel.title,
        x_label="step",
        y_label=panel.y_label,
        y_log=panel.y_log,
        y_range=y_range,
        marks=marks,
    )


def _margin(settings: Sequence[Setting]) -> float | None:
    """The margin of a triplet loss, where its loss stands still when all embeddings are one."""
    values = {setting.name: setting.value for setting in settings}
    return float(values["loss.margin"]) if values.get("loss") == "Triplet" and "loss.margin" in values else None


# ---- provenance --------------------------------------------------------------------------------------------------------


def _provenance(page: Page) -> str:
    parts = []
    for what, command in page.commands.items():
        parts.append(f"<h3>{_e(what)}</h3><pre>{_e(command)}</pre>")
    tables = []
    for title, facts in page.facts.items():
        rows = [[_e(name.replace("_", " ")), _e(_value(value))] for name, value in facts.items()]
        tables.append(f"<div><h3>{_e(title)}</h3>{table((), rows)}</div>")
    if tables:
        parts.append(f'<div class="columns">{"".join(tables)}</div>')
    if page.settings:
        changed = sum(setting.changed for setting in page.settings)
        rows = [
            [
                f"<code>{_e(setting.name)}</code>",
                _e(_value(setting.value)),
                _e(_value(setting.default)) if setting.changed else "",
            ]
            for setting in page.settings
        ]
        classes = ["changed" if setting.changed else "" for setting in page.settings]
        parts.append(
            f'<details id="config"><summary>Configuration: {len(page.settings)} values, {changed} of them not the '
            f"default</summary>{table(('field', 'value', 'default'), rows, classes=classes)}</details>"
        )
    return "".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- HTML --------------------------------------------------------------------------------------------------------------


def section(which: str, title: str, content: str) -> str:
    """A part of a page; nothing if there is no content (HTML)."""
    return f'<section id="{which}">\n<h2>{_e(title)}</h2>\n{content}\n</section>' if content else ""


def _figure(which: str, svg: str, note: str) -> str:
    caption = f"<figcaption>{_e(note)}</figcaption>" if note else ""
    return f'<figure id="figure-{_slug(which)}">{svg.replace(plots.STYLE, "")}{caption}</figure>\n'


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool = False, classes: Sequence[str] = ()
) -> str:
    """Cells are HTML already. The first of a row is its heading."""
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in names)
    body = []
    for i, (first, *others) in enumerate(rows):
        kind = f' class="{classes[i]}"' if classes and classes[i] else ""
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr{kind}><th scope="row">{first}</th>{cells}</tr>')
    kind = ' class="wide"' if wide else ""
    top = f"<thead><tr>{head}</tr></thead>" if names else ""
    # A table wider than a phone scrolls by itself, by keyboard too.
    return f'<div class="table" tabindex="0"><table{kind}>{top}<tbody>{"".join(body)}</tbody></table></div>'


_CSS = """
:root{color-scheme:light dark;--page:#f6f7f8;--ground:#fff;--text:#1b1f24;--muted:#5b6470;--rule:#e3e6ea;
--accent:#0a66b7;--wash:#eef5fb;--warn:#8a4b00;--warn-wash:#fdf3e4}
@media screen and (prefers-color-scheme:dark){:root{--page:#0e1013;--ground:#15181d;--text:#e8eaed;--muted:#9aa4b0;
--rule:#2c323a;--accent:#62b0f0;--wash:#16222d;--warn:#f0b768;--warn-wash:#29210f}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:clamp(24px,5vw,56px) clamp(16px,4vw,40px) 72px}
h1{font-size:clamp(24px,4vw,34px);line-height:1.2;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
h2{font-size:21px;letter-spacing:-.01em;margin:0 0 16px}
h3{font-size:15px;margin:28px 0 10px}
section{margin-top:56px}
p{margin:0 0 12px;max-width:75ch;overflow-wrap:anywhere}
code,pre{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.over{margin:0 0 8px;color:var(--accent);font-size:13px;font-weight:600;letter-spacing:.02em}
.lead{color:var(--muted);margin:10px 0 0}
.lead+.tiles{margin-top:28px}
small{display:block;color:var(--muted);font:12px/1.35 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
.sentences{margin:0 0 20px;padding-left:18px}
.sentences li{margin:0 0 4px;overflow-wrap:anywhere}
.small,figcaption{color:var(--muted);font-size:13px;line-height:1.5}
.headline{display:flex;flex-wrap:wrap;align-items:center;gap:8px 28px;margin:32px 0 24px}
.headline p{margin:0;max-width:46ch;flex:1 1 300px;font-size:17px}
.headline span{color:var(--muted)}
.headline .figure{flex:none;font-size:clamp(44px,8vw,68px);line-height:1;font-weight:650;letter-spacing:-.03em;
color:var(--accent);font-variant-numeric:tabular-nums}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:1px;margin:0 0 24px;overflow:hidden;
background:var(--rule);border:1px solid var(--rule);border-radius:10px}
.tiles>div{background:var(--ground);padding:16px 18px}
.tiles dt{color:var(--muted);font-size:13px}
.tiles dd{margin:2px 0 0}
.tiles b{display:block;font-size:24px;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tiles span{display:block;color:var(--muted);font-size:12.5px;line-height:1.4}
.note{max-width:none;margin:12px 0 0;padding:12px 16px;border-left:3px solid var(--accent);border-radius:0 8px 8px 0;
background:var(--wash);font-size:14.5px}
.warning,.event{border-color:var(--warn);background:var(--warn-wash)}
.warning b,.event b{color:var(--warn)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:20px;margin-bottom:20px}
.figures figure{margin:0;background:var(--ground);border:1px solid var(--rule);border-radius:10px;overflow:hidden;
break-inside:avoid}
.figures svg{display:block;width:100%;height:auto}
.figures figcaption{padding:0 16px 12px 12px}
.table{overflow-x:auto;background:var(--ground);border:1px solid var(--rule);border-radius:10px;margin:0 0 12px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:9px 12px;text-align:left;vertical-align:top;border-top:1px solid var(--rule);font-weight:400;
overflow-wrap:anywhere}
thead th{border-top:0;color:var(--muted);font-size:12.5px;vertical-align:bottom}
tbody:first-child tr:first-child>*{border-top:0}
tbody th{color:var(--muted);white-space:nowrap}
.wide td,.wide th{overflow-wrap:normal;padding-inline:9px}
.wide thead th{min-width:70px}
.wide tbody th{color:var(--text);white-space:normal;min-width:118px;position:sticky;left:0;background:var(--ground)}
.wide td,.wide thead th:nth-child(n+2){text-align:right}
.changed th{box-shadow:inset 3px 0 var(--accent);color:var(--text)}
.changed td:nth-child(2){font-weight:600}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 20px}
.columns td{width:70%}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 20px}
pre{margin:0;padding:14px 16px;overflow-x:auto;background:var(--ground);border:1px solid var(--rule);border-radius:10px;
white-space:pre-wrap;overflow-wrap:anywhere}
details{margin-top:28px}
summary{cursor:pointer;font-size:15px;font-weight:600;margin-bottom:12px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(144px,1fr));gap:16px}
.pairs figure{margin:0;break-inside:avoid;background:var(--ground);border:1px solid var(--rule);border-radius:10px;
overflow:hidden}
.pairs .wrong{border-bottom:3px solid var(--warn)}
.pairs div{display:flex;gap:1px}
.pairs img{width:50%;height:auto;aspect-ratio:1;object-fit:cover;display:block;background:var(--rule)}
.pairs figcaption{padding:7px 9px 8px;font-size:11.5px;line-height:1.35;overflow-wrap:anywhere}
.pairs b{display:block;color:var(--text);font-size:13px;font-variant-numeric:tabular-nums}
.pairs bdi{display:block}
.case{margin:0 0 14px;padding:12px 14px 14px;background:var(--ground);border:1px solid var(--rule);border-radius:10px;
break-inside:avoid}
.case>p{margin:0 0 10px;max-width:none;font-size:14px}
.case>p span{color:var(--muted)}
.groups{display:flex;flex-wrap:wrap;gap:12px 22px}
.groups figure{margin:0;min-width:0}
.groups div{display:flex;flex-wrap:wrap;gap:3px}
.groups img{display:block;width:72px;height:72px;object-fit:cover;border-radius:3px;background:var(--rule)}
.groups .suspect img{outline:3px solid var(--warn);outline-offset:-3px}
.groups figcaption{margin-top:4px;font-size:12px;max-width:300px;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media print{body{background:#fff;font-size:11pt}main{max-width:none;padding:0}section{margin-top:28px}
.table{overflow:visible}.wide{font-size:11px}.wide small{font-size:9px}.wide td,.wide th{padding:4px}
.figures{grid-template-columns:1fr 1fr}details::details-content{content-visibility:visible;block-size:auto}}
"""


def _signed(score: float) -> str:
    return f"{score:+.2f}".replace("-", "−")
