"""What says that a photo is too poor to decide on, and does it help to weigh templates by it?  (15 minutes on 2 cores.)

    python -m experiments.photo_quality dlib runs/celeba

Photos of LFW's View 1 training people are made worse in ways that happen; the face is looked for again, compared with other
photos of its person and with others' at the threshold for an FMR of 0.1 % on the photos as they are.

Expect (220 people, 1,653 photos as they are):

- The share of differences that a blur takes away ("sharpness") is the measure: it tells a photo spoiled by blur, movement
  or distance from one as it is (AUC 0.97 from a blur of 1 % of the face's height on), and which of them dlib's network
  will miss (AUC 0.87; Laplacian 0.85, spectrum 0.84, bands 0.83, the detector's confidence 0.78). Noise and JPEG it does
  not see.
- dlib misses 5 % as they are, 14 % at sharpness 0.32-0.35 or with faces of 32 px, 27 % at 0.29-0.32, 61 % at 0.20-0.25;
  the limits refuse 0.4 % of the photos as they are. Two strangers' photos spoiled alike match dlib in 0.07 % as they are,
  0.24 % at 32 px, 5 % at a blur of 3 %, 27 % at 4.5 %. The encoder trained here (FNMR 82 %) has little to lose.
- Of 2 to 5 templates, about half spoiled: weights by score give +1.6 points of TAR [+0.8, +2.4] with dlib, and +0.7
  [-0.5, +1.9] with the encoder trained here; where none is spoiled they change nothing (0.0; -0.2 [-0.6, +0.2]). Steeper
  weights are no better, and to leave out whatever was spoiled is worse: more photos are more, even poor ones.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage
from PIL import Image, ImageFilter

from faceembed import embed, metrics, report, uncertainty
from faceembed.data import crops, pairs, sources
from faceembed.data.align import Face
from faceembed.identification import quality

FMR = 1e-3
AS_IS = "as it is"
REFERENCES = 3
"""Photos of a person that a probe is compared with, at most."""
TEMPLATES = 5
"""Photos of a person that are pooled, at most."""

# ---- photos made worse -----------------------------------------------------------------------------------------------

Spoil = Callable[[np.ndarray, float, int], np.ndarray]
"""(photo, height of its face in pixels, seed) → photo."""


def blurred(share: float) -> Spoil:
    """Out of focus: a Gaussian whose σ is this share of the face's height."""

    def spoil(photo: np.ndarray, face: float, seed: int) -> np.ndarray:
        return np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(float(share * face))))

    return spoil


def moved(share: float) -> Spoil:
    """Moved while the shutter was open: by this share of the face's height, in a direction drawn."""

    def spoil(photo: np.ndarray, face: float, seed: int) -> np.ndarray:
        angle = np.random.default_rng(seed).uniform(0, np.pi)
        steps = np.linspace(-0.5, 0.5, 4 * max(1, round(share * face)) + 1) * share * face
        half = int(np.ceil(share * face / 2)) + 1
        kernel = np.zeros((2 * half + 1, 2 * half + 1))
        y, x = half + steps * np.sin(angle), half + steps * np.cos(angle)
        np.add.at(kernel, (np.round(y).astype(int), np.round(x).astype(int)), 1 / len(steps))
        planes = [scipy.ndimage.convolve(photo[..., c].astype(np.float32), kernel, mode="nearest") for c in range(3)]
        return np.stack(planes, axis=-1).round().clip(0, 255).astype(np.uint8)

    return spoil


def reduced(height: float, *, back: bool) -> Spoil:
    """From far away: the face this many pixels high; `back` enlarges the photo to its size again."""

    def spoil(photo: np.ndarray, face: float, seed: int) -> np.ndarray:
        whole = photo.shape[1], photo.shape[0]
        size = tuple(max(1, round(side * height / face)) for side in whole)
        small = Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(small.resize(whole, Image.Resampling.BICUBIC) if back else small)

    return spoil


def compressed(jpeg: int) -> Spoil:
    def spoil(photo: np.ndarray, face: float, seed: int) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=jpeg)
        return sources.decode(file.getvalue())

    return spoil


def noisy(sigma: float) -> Spoil:
    def spoil(photo: np.ndarray, face: float, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, sigma, photo.shape)
        return (photo + noise).round().clip(0, 255).astype(np.uint8)

    return spoil


SPOILS: dict[str, Spoil] = (
    {f"blur {share:g}": blurred(share) for share in (0.01, 0.015, 0.02, 0.03, 0.045, 0.06)}
    | {f"motion {share:g}": moved(share) for share in (0.06, 0.12, 0.2, 0.3)}
    | {f"back {height}": reduced(height, back=True) for height in (64, 40, 28, 20, 14, 8)}
    | {f"small {height}": reduced(height, back=False) for height in (64, 48, 40, 32, 24, 16, 12)}
    | {f"jpeg {level}": compressed(level) for level in (40, 15, 8, 4)}
    | {f"noise {sigma}": noisy(sigma) for sigma in (15, 40)}
)

# ---- measures that were tried ----------------------------------------------------------------------------------------


def _grey(crop: np.ndarray, side: int = 64) -> np.ndarray:
    grey = Image.fromarray(crop).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(grey, np.float64)[side // 8 : -side // 8, side // 8 : -side // 8]


def laplacian(crop: np.ndarray) -> float:
    """RMS of the Laplacian over the standard deviation ("variance of the Laplacian", made free of contrast)."""
    g = _grey(crop)
    fine = scipy.ndimage.laplace(g)[1:-1, 1:-1] / 4
    return float(np.sqrt(np.mean(fine**2) / max(g.var(), 1e-3)))


def _power(crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(power, frequency in cycles a crop) of the middle, under a Hann window."""
    g = _grey(crop)
    window = np.hanning(len(g) + 2)[1:-1]
    weight = np.outer(window, window)
    g = (g - np.sum(g * weight) / weight.sum()) * weight
    f = np.fft.fftfreq(len(g), 1 / 64)
    return np.abs(np.fft.fft2(g)) ** 2, np.hypot(f[:, None], f[None])


def spectrum(crop: np.ndarray) -> float:
    """Square root of the share of energy beyond 10 cycles a crop."""
    power, f = _power(crop)
    return float(np.sqrt(power[f >= 10].sum() / max(power[f >= 1].sum(), 1e-9)))


def bands(crop: np.ndarray) -> float:
    """Amplitude at 10 to 20 cycles a crop over that at 3 to 6."""
    power, f = _power(crop)
    return float(np.sqrt(power[(f >= 10) & (f < 20)].sum() / max(power[(f >= 3) & (f < 6)].sum(), 1e-9)))


def sharpness(crop: np.ndarray) -> float:
    """The one that was taken: share of the differences between neighbours that a blur takes away."""
    return quality.measure(crop).sharpness


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "sharpness": sharpness, "laplacian": laplacian, "spectrum": spectrum, "bands": bands,
}  # fmt: skip

# ---- what every photo gives ------------------------------------------------------------------------------------------


def collect(
    embedders: dict[str, embed.Embedder], photos: sources.Photos, jobs: Sequence[tuple[int, str]], threads: int
) -> dict[str, np.ndarray]:
    """For each (photo, name of a spoil or "as it is"): whether a face was found, what was measured, the embeddings.

    The face is looked for in the spoiled photo, as it would be in practice; one that is not found has NaN.
    """
    aligners = {
        name: crops.Aligner(template=one.preprocess.template, size=one.size, face="central")
        for name, one in embedders.items()
    }

    def look(job: tuple[int, str]) -> tuple[Face | None, dict[str, np.ndarray]]:
        index, name = job
        photo = photos.read(index)
        face = crops.find(photo, next(iter(aligners.values()))).face
        if face is None:
            return None, {}
        if name in SPOILS:
            seed = zlib.crc32(f"{photos.keys[index]} {name}".encode())
            photo = SPOILS[name](photo, float(face.box[3] - face.box[1]), seed)
            face = crops.find(photo, next(iter(aligners.values()))).face
            if face is None:
                return None, {}
        return face, {key: crops.draw(photo, crops.place(face, a), a.size) for key, a in aligners.items()}

    height, confidence = np.full(len(jobs), np.nan), np.full(len(jobs), np.nan)
    measured = {key: np.full((len(jobs), len(MEASURES)), np.nan) for key in embedders}
    emb: dict[str, np.ndarray] = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        chunks = range(0, len(jobs), 256)
        for start in sources.progress_bar(chunks, len(chunks), "photos, 256 at a time"):
            seen = list(pool.map(look, jobs[start : start + 256]))
            there = [i for i, (face, _) in enumerate(seen) if face is not None]
            if not there:
                continue
            rows = start + np.array(there)
            faces = [face for face, _ in seen if face is not None]
            height[rows] = [face.box[3] - face.box[1] for face in faces]
            confidence[rows] = [face.score for face in faces]
            for key, embedder in embedders.items():
                cut = np.stack([seen[i][1][key] for i in there])
                measured[key][rows] = [[measure(crop) for measure in MEASURES.values()] for crop in cut]
                found = embedder(cut, batch=64)
                emb.setdefault(key, np.full((len(jobs), found.shape[1]), np.nan, np.float32))[rows] = (
                    found / np.linalg.norm(found, axis=1, keepdims=True)
                )
    return (
        {"photo": np.array([index for index, _ in jobs]), "spoil": np.array([name for _, name in jobs]),
         "height": height, "confidence": confidence}
        | {f"measured {key}": value for key, value in measured.items()}
        | {f"embedding {key}": value for key, value in emb.items()}
    )  # fmt: skip


def draw_jobs(photos: sources.Photos, people: int) -> list[tuple[int, str]]:
    """Every spoil of one photo of each person, some as they are to compare it with; and of people with four photos or
    more, several as they are and spoiled in one way each, to be pooled."""
    rng = np.random.default_rng(0)
    count = np.bincount(photos.identity, minlength=len(photos.people))
    jobs: dict[tuple[int, str], None] = {}
    for person in rng.permutation(np.flatnonzero(count >= 2))[:people]:
        own = rng.permutation(np.flatnonzero(photos.identity == person))
        jobs |= dict.fromkeys((int(own[0]), name) for name in (AS_IS, *SPOILS))
        jobs |= dict.fromkeys((int(index), AS_IS) for index in own[1 : 1 + REFERENCES])
    for person in rng.permutation(np.flatnonzero(count >= 4))[:people]:
        own = rng.permutation(np.flatnonzero(photos.identity == person))[: TEMPLATES + 1]
        jobs |= dict.fromkeys((int(index), AS_IS) for index in own)
        jobs |= dict.fromkeys((int(index), str(rng.choice(list(SPOILS)))) for index in own)
    return list(jobs)


# ---- what follows ----------------------------------------------------------------------------------------------------


def compare(data: dict[str, np.ndarray], who: np.ndarray, encoders: Sequence[str]) -> None:
    """Prints a row for each way to spoil a photo, how FNMR grows as sharpness falls, and whom the limits refuse."""
    place = {
        (int(photo), str(name)): row for row, (photo, name) in enumerate(zip(data["photo"], data["spoil"], strict=True))
    }
    there = ~np.isnan(data["height"])
    whole = np.flatnonzero((data["spoil"] == AS_IS) & there)
    probes = [photo for photo in np.unique(data["photo"]).tolist() if all((photo, name) in place for name in SPOILS)]
    other = who[whole][:, None] != who[whole][None]
    threshold, missed = {}, {}
    for key in encoders:
        emb = data[f"embedding {key}"]
        score = (emb[whole] @ emb[whole].T)[other]
        threshold[key] = metrics.threshold_at_far(score, np.zeros(len(score), bool), FMR)
        missed[key] = np.full(len(there), np.nan)
        for row in [place[photo, name] for photo in probes for name in (AS_IS, *SPOILS)]:
            mates = whole[(who[whole] == who[row]) & (data["photo"][whole] != data["photo"][row])][:REFERENCES]
            if there[row]:
                missed[key][row] = np.mean(emb[mates] @ emb[row] < threshold[key])
    rows = []
    for name in (AS_IS, *SPOILS):
        all_rows = np.array([place[photo, name] for photo in probes])
        own = all_rows[there[all_rows]]
        start = np.array([place[photo, AS_IS] for photo in probes])
        is_whole = np.arange(len(start) + len(own)) < len(start)
        line = {"photo": name, "found": report.format_percent(len(own) / len(all_rows), digits=0),
                "face, px": f"{np.median(data['height'][own]):.0f}"}  # fmt: skip
        for key in encoders:
            measured = data[f"measured {key}"]
            if key == encoders[0]:
                line["sharpness"] = f"{np.median(measured[own, 0]):.3f}"
                for column, measure in enumerate(MEASURES):
                    both = np.concatenate([measured[start, column], measured[own, column]])
                    line[f"AUC {measure}"] = f"{metrics.auc(both, is_whole):.3f}"
            emb = data[f"embedding {key}"]
            strangers = who[own][:, None] != who[own][None]
            line[f"FNMR {key}"] = report.format_percent(float(np.mean(missed[key][own])), digits=1)
            line[f"FMR of two so, {key}"] = report.format_percent(
                float(np.mean((emb[own] @ emb[own].T)[strangers] >= threshold[key])), digits=2
            )
        rows.append(line)
    print(f"{len(probes)} photos of as many people, {len(whole):,} as they are; measures in {encoders[0]}'s template")
    print(report.table(rows))
    seen = np.array([not name.startswith(("noise", "jpeg")) for name in data["spoil"]])
    steps = np.array([0, 0.2, 0.25, 0.29, 0.32, 0.35, 0.38, 0.41, 0.45, 0.5, 1])
    rows = []
    for key in encoders:
        measured = data[f"measured {key}"]
        used = ~np.isnan(missed[key])
        failed = missed[key][used & seen] >= 0.5
        said = {name: metrics.auc(measured[used & seen, column], ~failed) for column, name in enumerate(MEASURES)}
        said |= {name: metrics.auc(data[name][used & seen], ~failed) for name in ("height", "confidence")}
        print(
            f"{key}: which will be missed, noise and JPEG aside, AUC: "
            + ", ".join(f"{name} {auc:.3f}" for name, auc in said.items())
        )
        refused = (measured[whole, 0] < quality.LIMITS.sharpness) | (data["height"][whole] < quality.LIMITS.face)
        share = report.format_percent(float(refused.mean()))
        print(f"{key}: the limits refuse {int(refused.sum())} of {len(whole):,} photos as they are, {share}")
        line = {"FNMR by sharpness": key}
        for low, high in itertools.pairwise(steps):
            part = used & seen & (measured[:, 0] >= low) & (measured[:, 0] < high)
            line[f"{low:g}-{high:g}"] = report.format_percent(float(np.mean(missed[key][part])), digits=0)
        rows.append(line)
    print(report.table(rows))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A probe against templates of its person; all in rows of what was collected."""

    person: int
    probe: int
    mixed: np.ndarray
    """[k] the templates, some of them spoiled."""
    whole: np.ndarray
    """[k] the same photos as they are."""
    spoiled: np.ndarray
    """[k] bool, which of `mixed`."""


def pool(data: dict[str, np.ndarray], who: np.ndarray, encoders: Sequence[str], draws: int = 6) -> None:
    """Prints TAR with 2 to 5 templates pooled, some of them spoiled, by what each is weighted with."""
    rng = np.random.default_rng(1)
    there = ~np.isnan(data["height"])
    as_is: dict[int, dict[int, int]] = {}
    worse: dict[int, list[int]] = {}
    for row in np.flatnonzero(there).tolist():
        photo = int(data["photo"][row])
        if data["spoil"][row] == AS_IS:
            as_is.setdefault(int(who[row]), {})[photo] = row
        else:
            worse.setdefault(photo, []).append(row)
    trials: list[Trial] = []
    for person, photos in as_is.items():
        for _ in range(draws if len(photos) > 2 else 0):
            probe, *others = rng.permutation(list(photos)).tolist()
            chosen = others[: int(rng.integers(2, TEMPLATES + 1))]
            spoiled = (rng.random(len(chosen)) < 0.5) & [photo in worse for photo in chosen]
            spoiled[rng.integers(len(chosen))] = False  # one at least is as it was
            if spoiled.any():
                whole = np.array([photos[photo] for photo in chosen])
                mixed = np.array([
                    rng.choice(worse[photo]) if bad else photos[photo] for photo, bad in zip(chosen, spoiled, strict=True)
                ])  # fmt: skip
                trials.append(Trial(person=person, probe=photos[probe], mixed=mixed, whole=whole, spoiled=spoiled))
    people, probes = np.array([trial.person for trial in trials]), np.array([trial.probe for trial in trials])
    print(f"{len(trials)} templates of 2 to {TEMPLATES} photos of {len(np.unique(people))} people; probes as they are")
    weights = uncertainty.vertex_weights(len(np.unique(people)), 1000, 0).astype(float)
    number = np.unique(people, return_inverse=True)[1]
    rows = []
    for key in encoders:
        emb, measured = data[f"embedding {key}"], data[f"measured {key}"]

        def score(rows: np.ndarray, bad: np.ndarray, power: int = 1, measured: np.ndarray = measured) -> np.ndarray:
            found = [quality.Quality(face=1.0, sharpness=measured[row, 0], confidence=1.0).score for row in rows]
            return np.array(found) ** power

        def passes(rows: np.ndarray, bad: np.ndarray, measured: np.ndarray = measured) -> np.ndarray:
            poor = (measured[rows, 0] < quality.LIMITS.sharpness) | (data["height"][rows] < quality.LIMITS.face)
            return np.where(poor, 1e-3, 1.0)

        ways: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
            "equal": lambda rows, bad: np.ones(len(rows)), "score": score,
            "score²": functools.partial(score, power=2), "score⁴": functools.partial(score, power=4),
            "those within the limits": passes, "those not spoiled (an oracle)": lambda rows, bad: np.where(bad, 1e-6, 1.0),
        }  # fmt: skip
        for mixed_in in (True, False):
            templates = [(t.mixed, t.spoiled) if mixed_in else (t.whole, np.zeros_like(t.spoiled)) for t in trials]
            before: np.ndarray | None = None
            for name, way in ways.items():
                pooled = np.stack([way(chosen, bad) @ emb[chosen] for chosen, bad in templates])
                pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
                scores = pooled @ emb[probes].T
                strangers = scores[people[:, None] != people[None]]
                accepted = np.diag(scores) >= metrics.threshold_at_far(strangers, np.zeros(len(strangers), bool), FMR)
                before = accepted if before is None else before
                gain = np.bincount(number, accepted.astype(float) - before)
                of = np.bincount(number)
                low, high = np.quantile((weights @ gain) / (weights @ of), [0.025, 0.975])
                rows.append({
                    "encoder": key, "templates": "some spoiled" if mixed_in else "none spoiled", "weights": name,
                    "TAR": report.format_percent(accepted.mean()),
                    "against equal, points": f"{100 * gain.sum() / of.sum():+.2f}",
                    "95 % (people, threshold held)": f"[{100 * low:+.2f}, {100 * high:+.2f}]",
                })  # fmt: skip
    print(report.table(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="checkpoints; the first one's template is the table's")
    parser.add_argument("--people", type=int, default=220)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=sources.default_data_dir())
    parser.add_argument("--keep", type=Path, help="an .npz of all that was measured; read where it exists")
    options = parser.parse_args(arguments)
    photos = pairs.load_people("all:lfw:dev_train", data_dir=options.data_dir)
    names = [Path(path).name for path in options.encoders]
    if options.keep and options.keep.exists():
        data = dict(np.load(options.keep))
    else:
        embedders = {name: embed.load(path) for name, path in zip(names, options.encoders, strict=True)}
        data = collect(embedders, photos, draw_jobs(photos, options.people), options.threads)
        if options.keep:
            np.savez(options.keep, allow_pickle=False, **data)
    who = photos.identity[data["photo"]]
    compare(data, who, names)
    pool(data, who, names)


if __name__ == "__main__":
    main()
