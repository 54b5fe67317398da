"""Which thresholds does dlib's network need for which share of false matches?  (10 min on 2 cores.)

    python -m experiments.dlib_policy faceembed/encoders/dlib_policy.json

Writes the policy that `fe.load("dlib")` carries: heads fitted on LFW's View 1 training pairs; thresholds for false
match
rates set on all pairs of photos of its 4,038 training people (at most 50 of a person), and for identification by
everybody
searching among all others. Faces are found and aligned by CenterFace. View 1's test people are others.
"""

import argparse
from pathlib import Path

from faceembed import embed, evaluate, report
from faceembed.data import pairs
from faceembed.data.sources import default_data_dir
from faceembed.verification import dense
from faceembed.verification.heads import USUAL_HEADS, fit_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the policy's file")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="where prepared sets are kept")
    options = parser.parse_args()
    embedder = embed.load("dlib")
    listed, lfw = pairs.load_pairs("lfw:view1_train", data_dir=options.data_dir)
    fitted = evaluate.embed_pairs(embedder, lfw, listed)
    heads = {name: fit_pairs(name, fitted) for name in USUAL_HEADS}
    people = evaluate.bounded(pairs.load_people("all:lfw:dev_train", data_dir=options.data_dir))
    emb, _ = evaluate.embed_photos(embedder, people)
    calibrated = dense.compare_all(emb, people.people[people.identity], heads, fmrs=evaluate.POLICY_FMRS)
    print(calibrated)
    report.write_json(options.out, evaluate.make_policy(embedder, people, heads, calibrated, (emb, people.identity)))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
