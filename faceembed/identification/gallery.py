"""People enrolled from a photo each: claims (1:1), identification among them (1:K), and an honest "not recognized".

    gallery = fe.identify.Gallery("people", fe.load("dlib"))
    gallery.enroll("Ann", "ann.jpg")
    gallery.verify("Ann", "door.jpg", fmr=0.001).answer      # "yes", "no" or "cannot tell"
    gallery.identify("door.jpg", fpir=0.01).answer           # "Ann", "not recognized" or "cannot tell"

Nothing is trained. A person is a template, the mean of their photos' embeddings; somebody new is compared with all of
them.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceembed.identification import faces, policy
from faceembed.identification.faces import Framing, Photo, Shot, Which, as_photos
from faceembed.identification.policy import Cut
from faceembed.identification.quality import LIMITS, Limits
from faceembed.identification.store import (
    Entry,
    IfThere,
    Origin,
    Store,
    Template,
    check_origin,
    checked_name,
    export_npz,
    import_npz,
    open_store,
    shown,
)

if TYPE_CHECKING:
    from faceembed.embed import Embedder

__all__ = ["CANNOT_TELL", "NOT_RECOGNIZED", "Candidate", "Claim", "Doubt", "Gallery", "Identification"]

NOT_RECOGNIZED = "not recognized"
CANNOT_TELL = "cannot tell"

TIE = 1e-6
"""Squared distances this near are one: rounding says who comes first."""

MOST_LOOKED_UP = 1000
"""Candidates whose photos are counted for their likelihood ratios, in a gallery where some have several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """Is this the person they say?

    Attributes:
      answer: "yes", "no" or "cannot tell".
      name: who was claimed.
      distance: squared, to the person's template; None where nothing could be compared.
      llr: natural-log likelihood ratio of one person against two, by the checkpoint's head; None where it has none, and
        where the person has several photos: the head was calibrated on pairs of single ones.
      cut: the threshold, and the FMR it stands for.
      reason: why it cannot be told, or None.
    """

    answer: str
    name: str
    distance: float | None
    llr: float | None
    cut: Cut
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.answer == "yes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Somebody enrolled whom a face may show; `distance` and `llr` as of `Claim`."""

    name: str
    distance: float
    llr: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identification:
    """Who is this, of the people enrolled, or nobody?

    Attributes:
      answer: a name, "not recognized" or "cannot tell".
      name: of the person recognised, or None.
      also: names of others who are as near, but for rounding, and near enough.
      candidates: the nearest people, whether or not they are near enough.
      cut: the threshold, for a FPIR in a gallery of this size.
      enrolled: people in the gallery.
      photo: name of the file, or "".
      box: (left, top, right, bottom) of the face in pixels, or None.
      reason: why it cannot be told, or None.
    """

    answer: str
    name: str | None
    candidates: tuple[Candidate, ...]
    cut: Cut
    enrolled: int
    photo: str = ""
    box: tuple[float, float, float, float] | None = None
    reason: str | None = None
    also: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubt:
    """A photo that is farther from its person's other photos than two photos of one person should be.

    Attributes:
      photo, others: names of the files.
      distance: squared, to the template of the others.
      cut: what it exceeds.
    """

    photo: str
    others: tuple[str, ...]
    distance: float
    cut: Cut


class Gallery:
    """A gallery and the encoder that its templates were made with."""

    def __init__(
        self, where: str | os.PathLike[str] | Store, embedder: Embedder, *, framing: Framing = "detect",
        create: bool = True, limits: Limits = LIMITS,
    ) -> None:  # fmt: skip
        """Opens a gallery, or starts one where there is none.

        Args:
          where: a folder, "milvus:URI", or an open `Store`.
          embedder: of `fe.load`. A gallery refuses another checkpoint than the one it was made with.
          framing: where the face is in photos, as `faces.Framing`.
          create: start a gallery where there is none.
          limits: photos below them are neither enrolled nor decided on.

        Raises:
          ValueError: the gallery was made with another checkpoint or framing, or is damaged.
          FileNotFoundError: there is none, and `create` is False.
        """
        self.embedder = embedder
        self._framing, self._limits = framing, limits
        self.origin = Origin(
            checkpoint=embedder.fingerprint, aligner=faces.aligner_of(embedder.preprocess, framing), dim=embedder.dim
        )
        opened = open_store(where, self.origin, create=create) if isinstance(where, str | os.PathLike) else where
        self.store: Store = opened

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """People enrolled."""
        return len(self.store)

    def close(self) -> None:
        """Lets go of the files."""
        self.store.close()

    # ---- enrolment -----------------------------------------------------------------------------------------------------

    def enroll(
        self, name: str, photos: Photo | Sequence[Photo], *, if_there: IfThere = "error", which: Which = "only"
    ) -> Entry:
        """Enrols a person from one photo, or from several.

        Args:
          name: of the person.
          photos: one, or several; paths or uint8 RGB arrays [h, w, 3]. Copies of a photo count once, with a warning.
          if_there: "error", "add" the photos to the person who is there, or "replace" that person.
          which: "only" demands one face a photo; "largest" takes the largest.

        Returns:
          What was enrolled now.

        Raises:
          FileNotFoundError, OSError: a photo is not there, or cannot be read.
          ValueError: a photo is no image, shows no face or several, or one that is too small or blurred; or the name is
          there already.
        """
        name, listed = checked_name(name), as_photos(photos)
        if not listed:
            raise ValueError(f"there are no photos of {name}: give one, or several.")
        shots = [found[0] for found in self._shots(listed, which, strict=True)]
        for photo, shot in zip(listed, shots, strict=True):
            if shot.trouble:
                which_one = "a photo" if isinstance(photo, np.ndarray) else f"photo '{shown(photo)}'"
                raise ValueError(f"{name} was not enrolled: {which_one}: {shot.trouble}.")
        entry = self._entry(name, shots, _now())
        self.store.write([entry], if_there=if_there)
        return entry

    def enroll_people(
        self, people: Mapping[str, Photo | Sequence[Photo]], *, if_there: IfThere = "error", which: Which = "only",
        progress: bool = False,
    ) -> tuple[list[Entry], list[tuple[str, str, str]]]:  # fmt: skip
        """Enrols many people at once, in one transaction: a kill leaves all of them in the gallery, or none.

        Args:
          people: name → photos, or one photo.
          if_there, which: as `enroll`.
          progress: show a bar.

        Returns:
          (enrolled, refused): of the refused photos (name, path, why), fit to be printed. A person none of whose photos
          will do, or whose name cannot be one, is not enrolled; the others are.

        Raises:
          ValueError: two names are one but for their spelling; or somebody is there already and `if_there` is "error".
            Nothing is written then, and nothing was embedded.
        """
        named, refused = self._named(people)
        if if_there == "error":  # before an hour of work, and not after it
            known = set(self.store.names())
            there = [name for name in named if name in known]
            if there:
                found = f"{there[0]!r} is" if len(there) == 1 else f"{len(there):,} people are"
                such = "" if len(there) == 1 else f", such as {there[0]!r}"
                raise ValueError(
                    f"{found} in the gallery already, of {len(named):,} to be enrolled{such}: add the photos to them "
                    "(--if-there add), replace them (--if-there replace), or leave them out."
                )
        owners = [name for name, photos in named.items() for _ in photos]
        listed = [photo for photos in named.values() for photo in photos]
        good: dict[str, list[Shot]] = {}
        seen = self._shots(listed, which, progress=progress)
        for owner, photo, (shot, *_) in zip(owners, listed, seen, strict=True):
            if shot.trouble:
                refused.append((owner, _path(photo), shot.trouble))
            else:
                good.setdefault(owner, []).append(shot)
        now = _now()
        entries: list[Entry] = []
        for owner, shots in good.items():
            try:
                entry = self._entry(owner, shots, now)
                assert entry.pooled is not None  # what cannot be pooled must not stop the others in the store
            except ValueError as error:
                refused.append((owner, ", ".join(shown(shot.photo) for shot in shots), str(error)))
            else:
                entries.append(entry)
        if entries:
            self.store.write(entries, if_there=if_there)
        return entries, refused

    @staticmethod
    def _named(
        people: Mapping[str, Photo | Sequence[Photo]],
    ) -> tuple[dict[str, list[Photo]], list[tuple[str, str, str]]]:
        """(names as they are stored → photos, those that are refused for their names)."""
        named: dict[str, list[Photo]] = {}
        spelled: dict[str, str] = {}
        refused: list[tuple[str, str, str]] = []
        for name, photos in people.items():
            listed = as_photos(photos)
            try:
                checked = checked_name(name)
            except ValueError as error:
                refused += [(shown(name), _path(photo), shown(error)) for photo in listed]
                continue
            if checked in named:
                raise ValueError(
                    f"{spelled[checked]!a} and {name!a} are one name, {checked!r}, in two spellings (composed "
                    "accents, or spaces around it): give all photos of the person under one of them."
                )
            spelled[checked] = name
            named[checked] = []
            for photo in listed:
                if isinstance(photo, np.ndarray) or _is_text(Path(photo).name):
                    named[checked].append(photo)
                else:
                    refused.append((checked, _path(photo), "the file's name is no Unicode text: rename it"))
        return named, refused

    def enroll_embeddings(
        self, name: str, embeddings: ArrayLike, *, photos: Sequence[str] = (), quality: Sequence[float] = (),
        if_there: IfThere = "error",
    ) -> Entry:  # fmt: skip
        """Enrols a person from ready embeddings, which this gallery's checkpoint must have made.

        Args:
          name: of the person.
          embeddings: [d], or [n, d] of several photos.
          photos: [n] names of their files, to be told by `entries`.
          quality: [n] in (0, 1], weights of the templates; 1 each when not given.
          if_there: as `enroll`.
        """
        vectors = np.atleast_2d(np.asarray(embeddings, np.float32))
        labels, weights = list(photos) or [""] * len(vectors), list(quality) or [1.0] * len(vectors)
        if not len(labels) == len(weights) == len(vectors):
            raise ValueError(
                f"{len(vectors)} embeddings, {len(labels)} photos and {len(weights)} qualities: give one each."
            )
        rows = zip(labels, weights, vectors, strict=True)
        entry = Entry(
            name=name, templates=tuple(Template(photo=p, quality=float(q), vector=v.copy()) for p, q, v in rows),
            enrolled=_now(),
        )  # fmt: skip
        self.store.write([entry], if_there=if_there)
        return entry

    def _shots(
        self, photos: Sequence[Photo], which: Which, *, strict: bool = False, progress: bool = False
    ) -> list[list[Shot]]:
        return faces.embed_faces(
            self.embedder,
            photos,
            framing=self._framing,
            which=which,
            limits=self._limits,
            strict=strict,
            progress=progress,
        )

    def _entry(self, name: str, shots: Sequence[Shot], now: str) -> Entry:
        """Of a person's photos, each once."""
        first: dict[bytes, Shot] = {}
        templates = []
        for shot in shots:
            assert shot.vector is not None
            assert shot.digest is not None
            if shot.digest in first:
                here, there = (shown(one.photo) or "a photo" for one in (first[shot.digest], shot))
                # Twice in the mean, it would count twice, and a threshold for two photos would be taken for one.
                warnings.warn(f"{name}: {here} and {there} are one picture, which counts once.", stacklevel=3)
                continue
            first[shot.digest] = shot
            quality = shot.quality.score if shot.quality else 1.0
            templates.append(Template(photo=shot.photo, quality=quality, vector=shot.vector))
        return Entry(name=name, templates=tuple(templates), enrolled=now)

    def doubts(self, entry: Entry) -> list[Doubt]:
        """Photos that may show somebody else: each is held against the template of the person's others.

        The limit is the checkpoint's threshold for pairs of photos at a false match rate of 0.1 %. It is no proof: an old
        photo of the same person may lie beyond it.

        Returns:
          Nothing where the checkpoint has no such threshold. Of two photos that differ the second is told.
        """
        try:
            cut = policy.cut_for(self.embedder.policy, fpir=0.001, k=1, photos=[1])
        except ValueError:
            return []
        found = []
        rest = list(entry.templates)
        while len(rest) > 1:  # the farthest goes first: with it among them, the others look apart, too
            distances = _apart(rest)
            worst = 1 if len(rest) == 2 else int(np.argmax(distances))
            if distances[worst] <= cut.distance:
                break
            photo = rest.pop(worst).photo
            others = tuple(template.photo for template in rest)
            found.append(Doubt(photo=photo, others=others, distance=float(distances[worst]), cut=cut))
        return found

    # ---- claims --------------------------------------------------------------------------------------------------------

    def verify(self, name: str, photo: Photo, *, fmr: float = 0.001, distance: float | None = None) -> Claim:
        """Is this the person they say?

        Args:
          name: who is claimed to be.
          photo: a path or an array; its largest face counts.
          fmr: share of others who may pass as this person; one that the checkpoint has a threshold for.
          distance: a threshold of your own, squared, in the place of the one for `fmr`.

        Raises:
          FileNotFoundError, OSError: there is no such photo, or it cannot be read.
          ValueError: it is no image; nobody of that name is enrolled; or the checkpoint has no threshold for that FMR.
        """
        entry = self.store.get(name)
        cut = self._claim_cut(entry, fmr, distance)
        shot = self._shots([photo], "largest", strict=True)[0][0]
        if shot.trouble or shot.vector is None:
            return Claim(answer=CANNOT_TELL, name=entry.name, distance=None, llr=None, cut=cut, reason=shot.trouble)
        return self._claim(entry, shot.vector, cut)

    def verify_embedding(
        self, name: str, embedding: ArrayLike, *, fmr: float = 0.001, distance: float | None = None
    ) -> Claim:
        """`verify` of a ready embedding [d]."""
        vector = self._checked(embedding, 1)
        entry = self.store.get(name)
        return self._claim(entry, vector, self._claim_cut(entry, fmr, distance))

    def _checked(self, embeddings: ArrayLike, ndim: int) -> NDArray[np.float32]:
        """[d] or [n, d] float32.

        Raises:
          ValueError: they have another shape, or hold NaN or infinity.
        """
        found = np.asarray(embeddings, np.float32)
        wanted = f"[{self.origin.dim}]" if ndim == 1 else f"[n, {self.origin.dim}]"
        if found.ndim != ndim or found.shape[-1] != self.origin.dim:
            raise ValueError(
                f"the embedding{'s have' if ndim > 1 else ' has'} shape {list(found.shape)}, and this gallery needs "
                f"{wanted}: give {'one row for each photo' if ndim > 1 else 'one row'} of the checkpoint's embeddings."
            )
        if not np.isfinite(found).all():
            raise ValueError("the embeddings hold NaN or infinity, which are near nobody: leave those photos out.")
        return found

    def _claim(self, entry: Entry, embedding: NDArray[np.float32], cut: Cut) -> Claim:
        found = _squared(embedding, entry.pooled)
        answer = "yes" if found <= cut.distance else "no"
        llr = self.llr(found) if len(entry.templates) == 1 else None
        return Claim(answer=answer, name=entry.name, distance=found, llr=llr, cut=cut)

    # ---- identification ------------------------------------------------------------------------------------------------

    def identify(
        self, photo: Photo, *, fpir: float = 0.01, candidates: int = 5, distance: float | None = None
    ) -> Identification:
        """Who is this?

        Args:
          photo: a path or an array; its largest face counts.
          fpir: share of strangers who may be taken for anybody in this gallery, whatever its size.
          candidates: how many people are ranked.
          distance: a threshold of your own, squared, in the place of the one for `fpir`.

        Raises:
          FileNotFoundError, OSError: there is no such photo, or it cannot be read.
          ValueError: it is no image; the gallery is empty; or the checkpoint has no threshold for that FPIR.
        """
        self._gallery_cut(self._people(), fpir, distance)
        shots = self._shots([photo], "largest", strict=True)
        return self._identified(shots, fpir, candidates, distance)[0][0]

    def identify_photos(
        self, photos: Photo | Sequence[Photo], *, fpir: float = 0.01, candidates: int = 5, distance: float | None = None,
        which: Which = "largest", progress: bool = False,
    ) -> list[list[Identification]]:  # fmt: skip
        """`identify` for many photos; with which="all" every face of each, the largest first.

        A photo that does not read, or shows no face, gives one answer, "cannot tell", with its reason.
        """
        self._gallery_cut(self._people(), fpir, distance)  # what cannot be answered is told before an hour of work
        found = self._shots(as_photos(photos), which, progress=progress)
        return self._identified(found, fpir, candidates, distance)

    def _identified(
        self, found: Sequence[Sequence[Shot]], fpir: float, candidates: int, distance: float | None
    ) -> list[list[Identification]]:
        vectors = [shot.vector for shots in found for shot in shots if shot.vector is not None]
        searched, nobody = self._search(np.array(vectors, np.float32), fpir, candidates, distance)
        answers = iter(searched)
        return [
            [
                dataclasses.replace(
                    dataclasses.replace(nobody, reason=shot.trouble) if shot.vector is None else next(answers),
                    photo=shot.photo, box=None if shot.box is None else tuple(shot.box.tolist()),
                )
                for shot in shots
            ]
            for shots in found
        ]  # fmt: skip

    def identify_embeddings(
        self, embeddings: ArrayLike, *, fpir: float = 0.01, candidates: int = 5, distance: float | None = None
    ) -> list[Identification]:
        """`identify` for ready embeddings [n, d]."""
        return self._search(self._checked(embeddings, 2), fpir, candidates, distance)[0]

    def _people(self) -> tuple[int, list[int]]:
        """(people enrolled, how many photos they have).

        Raises:
          ValueError: nobody is enrolled.
        """
        enrolled, photos = len(self), self.store.template_counts()
        if not enrolled or not photos:
            raise ValueError(
                "the gallery is empty: nobody can be recognised. Enrol people first: python launch.py enroll "
                "CHECKPOINT --gallery DIR PHOTOS."
            )
        return enrolled, photos

    def _gallery_cut(self, people: tuple[int, list[int]], fpir: float, distance: float | None) -> Cut:
        return self._cut(fpir, *people, distance)

    def _search(
        self, embeddings: NDArray[np.float32], fpir: float, candidates: int, distance: float | None
    ) -> tuple[list[Identification], Identification]:
        """(an answer for each of [n, d], the answer to a photo without one)."""
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}: one or more are ranked. Try 5.")
        before = self._people()
        # One more than is asked for may be as near as the best.
        names, distances = (
            self.store.search(embeddings, max(candidates, 2)) if len(embeddings) else ([], np.empty((0, 0)))
        )
        after = self._people()
        # Others may enrol people, and remove some, at the same time: the threshold is for the larger of both galleries.
        enrolled, photos = max(before[0], after[0]), sorted({*before[1], *after[1]})
        cut = self._gallery_cut((enrolled, photos), fpir, distance)
        nobody = Identification(answer=CANNOT_TELL, name=None, candidates=(), cut=cut, enrolled=enrolled)
        single = self._of_one_photo({name for row in names for name in row[:candidates]}, photos)
        answers = []
        for row, far in zip(names, distances.tolist(), strict=True):
            ranked = tuple(
                Candidate(name=n, distance=d, llr=self.llr(d) if n in single else None)
                for n, d in zip(row[:candidates], far, strict=False)
            )
            name = ranked[0].name if ranked and ranked[0].distance <= cut.distance else None
            also = tuple(
                n for n, d in zip(row[1:], far[1:], strict=True) if name and d <= min(far[0] + TIE, cut.distance)
            )
            answer = name or NOT_RECOGNIZED
            answers.append(dataclasses.replace(nobody, answer=answer, name=name, candidates=ranked, also=also))
        return answers, nobody

    def _of_one_photo(self, names: set[str], photos: Sequence[int]) -> set[str]:
        """Those who have one photo; nobody, where looking would take long."""
        if self._line is None or photos == [1]:
            return names
        single = set()
        for name in names if len(names) <= MOST_LOOKED_UP and 1 in photos else ():
            try:
                if len(self.store.get(name).templates) == 1:
                    single.add(name)
            except ValueError:  # removed meanwhile
                continue
        return single

    # ---- thresholds and scores -----------------------------------------------------------------------------------------

    def _cut(self, rate: float, k: int, photos: Sequence[int], distance: float | None) -> Cut:
        if distance is not None:
            if not 0 < distance < math.inf:
                raise ValueError(
                    f"the threshold is {distance}: give a squared distance above 0, and a finite one. Try 0.3."
                )
            return Cut(distance=distance, fpir=float("nan"), k=k, photos=1, status="given")
        return policy.cut_for(self.embedder.policy, fpir=rate, k=k, photos=photos)

    def _claim_cut(self, entry: Entry, fmr: float, distance: float | None) -> Cut:
        """A search among one person; where thresholds for searches are missing, as in older runs, the head's for pairs."""
        try:
            return self._cut(fmr, 1, (len(entry.templates),), distance)
        except ValueError:
            if distance is not None:
                raise
            found = (self.embedder.policy or {}).get("operating_points", {}).get("logistic_distance", [])
            points = [point for point in found if point["fmr"] == fmr]
            if not points or self._line is None:
                raise
            weight, intercept = self._line
            # Set on pairs of single photos: of a mean of several it says less.
            status: Any = points[0]["resolution"] if len(entry.templates) == 1 else "extrapolated"
            at = (points[0]["threshold"] - intercept) / weight
            return Cut(distance=at, fpir=fmr, k=1, photos=1, status=status)

    @property
    def _line(self) -> tuple[float, float] | None:
        """(weight, intercept) of the checkpoint's `logistic_distance`, which is linear in the squared distance."""
        head: Any = ((self.embedder.policy or {}).get("heads") or {}).get("logistic_distance")
        return None if head is None else (float(head["weight"][0]), float(head["intercept"]))

    def llr(self, distance: float) -> float | None:
        """Natural-log likelihood ratio of one person against two for two photos at a squared distance, or None."""
        return None if self._line is None else self._line[0] * distance + self._line[1]

    # ---- looking after people ------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Everybody's name, sorted."""
        return self.store.names()

    def entries(self) -> Iterator[Entry]:
        """Everybody with their templates, sorted by name."""
        return self.store.entries()

    def export(self, path: str | Path) -> None:
        """Writes everybody into one .npz that its owner alone can read."""
        export_npz(self.store, path)

    def import_from(self, path: str | Path, *, if_there: IfThere = "error") -> list[Entry]:
        """Enrols everybody of an export, all of them or none.

        Raises:
          ValueError: it is no export, or was made with another checkpoint or framing, or somebody is there already.
        """
        origin, entries = import_npz(path)
        check_origin(path, origin, self.origin)
        self.store.write(entries, if_there=if_there)
        return entries

    def remove(self, names: str | Sequence[str]) -> None:
        """Removes people and all bytes that were kept of them; all of them or none.

        Raises:
          ValueError: somebody is not there.
        """
        self.store.remove([names] if isinstance(names, str) else names)

    def rename(self, old: str, new: str) -> None:
        """Gives a person another name.

        Raises:
          ValueError: the old name is not there, or the new one is.
        """
        self.store.rename(old, new)


def _squared(a: NDArray, b: NDArray) -> float:
    return float(np.square(a.astype(np.float64) - b).sum())


def _apart(templates: Sequence[Template]) -> NDArray[np.float64]:
    """[n] squared distances of each to the pooled template (`pool`) of the n - 1 others, in one pass over them."""
    vectors = np.stack([template.vector for template in templates]).astype(np.float64)
    weight = np.array([template.quality for template in templates])
    length = np.linalg.norm(vectors, axis=1)
    directions = weight[:, None] * vectors / length[:, None]
    mean = directions.sum(axis=0) - directions
    size = np.maximum(np.linalg.norm(mean, axis=1), 1e-12)
    mean_length = ((weight * length).sum() - weight * length) / (weight.sum() - weight)
    return np.square(vectors - mean * (mean_length / size)[:, None]).sum(axis=1)


def _path(photo: Photo) -> str:
    return "" if isinstance(photo, np.ndarray) else shown(photo)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file's name that are no UTF-8
        return False
    return True


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
