"""Every benchmark, one after the other, each in a process of its own, so that threads and memory do not mix.

    python -m experiments.benchmarks                            # all
    python -m experiments.benchmarks loss step --json out.json  # some, with the figures in a file

What each one compares, and the bars: `python -m experiments.benchmarks.NAME --help`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import harness
from faceembed import report

BENCHMARKS = (
    "loss",
    "tiled",
    "margin_softmax",
    "encoders",
    "layers",
    "step",
    "inference",
    "reading",
    "records",
    "growth",
    "microbatches",
    "verification",
    "pretrained",
    "startup",
    "search",
    "sampling",
)


def run_all(names: Sequence[str], options: Sequence[str], package: str = "experiments.benchmarks") -> dict[str, Any]:
    """Runs benchmarks, their output going where ours goes.

    Args:
      names: modules of `package`.
      options: passed to each.
      package: where they are.

    Returns:
      name → what the benchmark wrote, or {"error": exit status}.
    """
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"\n== {name}", flush=True)
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"{package}.{name}", *options, "--json", str(file)]
            status = subprocess.run(command, check=False).returncode
            results[name] = json.loads(file.read_text()) if status == 0 else {"error": status}
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(BENCHMARKS)} (all by default)")
    harness.add_options(parser)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    passed = ["--device", options.device, *(["--quick"] if options.quick else [])]
    passed += ["--threads", str(options.threads)] if options.threads else []
    results = run_all(options.names or BENCHMARKS, passed)
    if options.json:
        report.write_json(options.json, results)
    if failed := [name for name, result in results.items() if "error" in result]:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
