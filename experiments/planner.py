"""How many people can be enrolled before one stranger in a hundred is let in?  (Seconds, after two reports of a minute.)

    python launch.py identification-report dlib --source lfw:dev_test --sizes 100 250 496 --out reports/dlib
    python launch.py identification-report runs/celeba --source lfw:dev_test --sizes 100 250 496 --out reports/celeba
    python -m experiments.planner dlib=reports/dlib/results.json celeba=reports/celeba/results.json \\
        --out docs/img/planner.svg

Draws the planner's curves of several reports into one figure, and prints its table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from faceembed import plots, report
from faceembed.identification import page
from faceembed.identification.openset import Rate
from faceembed.identification.policy import Cut
from faceembed.identification.protocol import Planned


def planned(results: dict[str, Any], fpir: float) -> list[Planned]:
    """The planner's rows of a report at one FPIR."""
    rows = next(rows for rate, rows in results["planned"].items() if float(rate) == fpir)
    return [
        Planned(k=row["k"], cut=Cut(**row["cut"]), fnir=Rate(**row["fnir"]), extrapolated=row["extrapolated"])
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", help="NAME=results.json of identification-report")
    parser.add_argument("--fpirs", type=float, nargs="+", default=[0.1, 0.01], help="shares of strangers let in")
    parser.add_argument("--out", type=Path, required=True, help="the figure, .svg")
    options = parser.parse_args()
    series: list[plots.Line] = []
    table: list[dict[str, str]] = []
    for given in options.reports:
        name, _, path = given.partition("=")
        results = json.loads(Path(path).read_text())["results"]
        curves = {fpir: planned(results, fpir) for fpir in options.fpirs}
        series += page.planner_lines(curves, prefix=f"{name}, ", first=len(table))
        for fpir, rows in curves.items():
            turned_away = {
                f"{row.k:,}": ("~" if row.extrapolated else "") + report.format_percent(row.fnir.value, digits=1)
                for row in rows
                if row.k in (10, 32, 100, 316, 1000, 10_000, 100_000)
            }
            table.append({"encoder": name, "FPIR": report.format_percent(fpir, digits=1), **turned_away})
    title = "Enrolled people turned away, by how many are enrolled"
    report.write_text(options.out, page.planner_plot(series, title=title))
    print(f"{report.table(table)}\nwritten: {options.out}")


if __name__ == "__main__":
    main()
