"""Do learned heads beat a threshold?  (3 minutes a checkpoint on 2 cores.)

For each checkpoint: every head of `HEADS`, also on the encoder's non-negative features, fitted on

- LFW's View 1 training pairs (the same kind of photos as the test), and
- CelebA's calibrate people, whom the checkpoint was not trained on (transfer: what a product does),

and tested on LFW's View 1 test pairs by accuracy, declared in advance, and on all pairs of the View 1 test people by TAR at
matched FMR. Every head is held against `threshold`, with intervals for all heads at once and the smallest difference that
the data could detect. docs/verification.md says what came out: expect one head or two beyond their intervals, and transfer
to take the gain away.

    python -m experiments.heads runs/celeba [CHECKPOINT …] [--data-dir DIR] [--draws 1000] [--json FILE]
"""

import argparse
from pathlib import Path
from typing import Any

from faceembed import embed, evaluate, report
from faceembed.data import pairs as pair_lists
from faceembed.verification import HEADS
from faceembed.verification.heads import fit_pairs, layers_of

NAMES = (*HEADS, "threshold@features", "logistic_abs@features", "logistic_chi2@features", "chi2_svm@features")
FITS = {"lfw:view1_train": "report", "heldout:celeba": "calibrate"}
"""Training pairs → whose people, where people are held out."""
FMR = 1e-3


def study(checkpoint: Path, data_dir: Path | None, draws: int) -> dict[str, Any]:
    """Both tests of one checkpoint for each kind of training pairs, printed and as JSON's types."""
    embedder = embed.load(checkpoint)
    layers = layers_of(NAMES)
    listed, photos = pair_lists.load_pairs("lfw:view1_test", data_dir=data_dir)
    test = evaluate.embed_pairs(embedder, photos, listed, layers=layers)
    everyone = pair_lists.load_people("all:lfw:dev_test", data_dir=data_dir)
    found: dict[str, Any] = {}
    for fit, split in FITS.items():
        train_list, train_photos = pair_lists.load_pairs(fit, data_dir=data_dir, split=split)
        train = evaluate.embed_pairs(embedder, train_photos, train_list, layers=layers)
        results = evaluate.compare_pairs(embedder, test, fit=train, heads=NAMES, draws=draws)
        heads = {name: fit_pairs(name, train) for name in NAMES}
        dense = evaluate.compare_photos(embedder, everyone, heads, fmrs=[FMR], draws=draws)
        gaps = {difference.head: difference for difference in dense.differences}
        rows = []
        for name, head in results.heads.items():
            listed_gap, dense_gap = results.differences["accuracy"].get(name), gaps.get(name)
            rows.append(
                {
                    "head": name,
                    "accuracy": report.format_percent(head.accuracy),
                    "minus threshold": "-" if listed_gap is None else _points(listed_gap.estimate, listed_gap),
                    "detectable": "-" if listed_gap is None else f"{100 * listed_gap.detectable:.2f}",
                    "Cllr": "-" if head.cllr is None else f"{head.cllr:.3f}",
                    "min Cllr": f"{head.min_cllr:.3f}",
                    f"TAR at FMR {100 * FMR:g} %": report.format_percent(dense[name].tar[FMR].tar),
                    "minus threshold ": "-" if dense_gap is None else _points(dense_gap.difference, dense_gap),
                }
            )
        print(f"\n{checkpoint}, heads fitted on {len(train):,} pairs of {fit} ({split} people)\n\n{report.table(rows)}")
        found[fit] = {"results": results.to_dict(), "all_pairs": dense.to_dict()}
    return found


def _points(estimate: float, difference: Any) -> str:
    low, high = difference.simultaneous_low, difference.simultaneous_high
    return f"{100 * estimate:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Prints a table for each checkpoint and each kind of training pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = {str(path): study(path, options.data_dir, options.draws) for path in options.checkpoints}
    if options.json:
        report.write_json(options.json, found)
    return found


if __name__ == "__main__":
    main()
