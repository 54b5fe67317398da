"""How much memory do microbatches save, and what time do they cost?  (10 min on 2 cores.)

    python -m experiments.benchmarks.microbatches

The whole update of `convnet` (augmentation, encoder, semi-hard triplets over the whole batch, AdamW, moving averages), as
`growth` measures it, with its 256 photos of 64 px encoded in N chunks: `--batch.microbatches N`. MB is the most memory one
update holds beyond its state and batch, each row in a process of its own; "of N=1" is its share of the undivided batch's.
"time" is that of an update in multiples of the undivided one, round by round in one process.

Each photo is augmented and encoded once more than in the undivided batch. Where a gradient costs twice as much as a forward
pass that makes 4/3, which is the bar; what is beyond it are chunks too small to keep the processors busy.
"""

from typing import Any

from experiments.benchmarks import growth, harness

BATCH, SIZE = 256, 64
CHUNKS = (1, 2, 4, 8, 16)
BAR = 4 / 3


def times(batch: int, size: int, chunks: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """Seconds of updates in so many chunks, by turns in this process."""
    contestants = {str(n): growth.make_alone(batch, size, 1, n) for n in chunks}
    return harness.interleave(contestants, repeats=repeats)


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each number of chunks."""
    batch, size, chunks = (16, SIZE // 2, CHUNKS[:2]) if quick else (BATCH, SIZE, CHUNKS)
    seconds = harness.fresh(times, batch, size, chunks, 2 if quick else 5)
    rows: list[dict[str, Any]] = []
    for n in chunks:
        peak = harness.peak_bytes(growth.make_alone, batch, size, 1, n)
        low, middle, high = harness.ratio(seconds, str(n), "1")
        megabytes = None if peak is None else peak / 1e6
        first = rows[0]["MB"] if rows else megabytes
        rows.append({
            "N": n, "photos at once": batch // n, "MB": megabytes,
            "of N=1": megabytes / first if megabytes and first else None,
            "ms": 1e3 * harness.summary(seconds[str(n)]).median, "time": middle, "q10": low, "q90": high,
            "bar": BAR if n > 1 else None,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    harness.main(run)
