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
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceembed.identification import faces, policy
from faceembed.identification.faces import Framing, Photo, Shot, Which
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
)

if TYPE_CHECKING:
    from faceembed.embed import Embedder

__all__ = ["CANNOT_TELL", "NOT_RECOGNIZED", "Candidate", "Claim", "Gallery", "Identification"]

NOT_RECOGNIZED = "not recognized"
CANNOT_TELL = "cannot tell"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """Is this the person they say?

    Attributes:
      answer: "yes", "no" or "cannot tell".
      name: who was claimed.
      distance: squared, to the person's template; None where nothing could be compared.
      llr: natural-log likelihood ratio of one person against two, by the checkpoint's head; None where it has none.
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
          photos: paths or uint8 RGB arrays [h, w, 3].
          if_there: "error", "add" the photos to the person who is there, or "replace" that person.
          which: "only" demands one face a photo; "largest" takes the largest.

        Returns:
          What was enrolled now.

        Raises:
          FileNotFoundError: a photo is not there.
          ValueError: a photo shows no face or several, or one that is too small or blurred; or the name is there
          already.
        """
        listed: list[Photo] = [photos] if isinstance(photos, str | Path | np.ndarray) else list(photos)
        if not listed:
            raise ValueError(f"there are no photos of {name}: give one, or several.")
        shots = [found[0] for found in self._shots(listed, which, strict=True)]
        for photo, shot in zip(listed, shots, strict=True):
            if shot.trouble:
                shown = f"photo {shot.photo!r}" if not isinstance(photo, np.ndarray) else "a photo"
                raise ValueError(f"{name} was not enrolled: {shown}: {shot.trouble}.")
        return self._write({checked_name(name): shots}, if_there)[0]

    def enroll_people(
        self, people: Mapping[str, Sequence[Photo]], *, if_there: IfThere = "error", which: Which = "only",
        progress: bool = False,
    ) -> tuple[list[Entry], list[tuple[str, str, str]]]:  # fmt: skip
        """Enrols many people at once, in one transaction: a kill leaves all of them in the gallery, or none.

        Args:
          people: name → photos.
          if_there, which: as `enroll`.
          progress: show a bar.

        Returns:
          (enrolled, refused): of the refused photos (name, photo, why). A person none of whose photos will do is not
          enrolled; the others are.

        Raises:
          ValueError: somebody is there already and `if_there` is "error": nothing is written, and nothing was embedded.
        """
        named = {checked_name(name): list(photos) for name, photos in people.items()}
        if len(named) < len(people):
            raise ValueError("two of the names are spelled alike but for spaces or composed accents: give each once.")
        if if_there == "error":  # before an hour of work, and not after it
            known = set(self.store.names())
            there = [name for name in named if name in known]
            if there:
                raise ValueError(
                    f"{len(there):,} of {len(named):,} people are in the gallery already, such as {there[0]!r}: add the "
                    "photos to them (--if-there add), replace them (--if-there replace), or leave them out."
                )
        owners = [name for name, photos in named.items() for _ in photos]
        listed = [photo for photos in named.values() for photo in photos]
        found = self._shots(listed, which, progress=progress)
        good: dict[str, list[Shot]] = {}
        refused = []
        for owner, (shot, *_) in zip(owners, found, strict=True):
            if shot.trouble:
                refused.append((owner, shot.photo, shot.trouble))
            else:
                good.setdefault(owner, []).append(shot)
        return (self._write(good, if_there) if good else []), refused

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

    def _write(self, people: Mapping[str, Sequence[Shot]], if_there: IfThere) -> list[Entry]:
        def template(shot: Shot) -> Template:
            assert shot.vector is not None
            return Template(photo=shot.photo, quality=shot.quality.score if shot.quality else 1.0, vector=shot.vector)

        now = _now()
        entries = [
            Entry(name=name, templates=tuple(map(template, shots)), enrolled=now) for name, shots in people.items()
        ]
        self.store.write(entries, if_there=if_there)
        return entries

    # ---- claims --------------------------------------------------------------------------------------------------------

    def verify(self, name: str, photo: Photo, *, fmr: float = 0.001, distance: float | None = None) -> Claim:
        """Is this the person they say?

        Args:
          name: who is claimed to be.
          photo: a path or an array; its largest face counts.
          fmr: share of others who may pass as this person; one that the checkpoint has a threshold for.
          distance: a threshold of your own, squared, in the place of the one for `fmr`.

        Raises:
          FileNotFoundError: there is no such photo.
          ValueError: nobody of that name is enrolled, or the checkpoint has no threshold for that FMR.
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
        entry = self.store.get(name)
        return self._claim(entry, np.asarray(embedding, np.float32), self._claim_cut(entry, fmr, distance))

    def _claim(self, entry: Entry, embedding: NDArray[np.float32], cut: Cut) -> Claim:
        found = float(np.square(embedding.astype(np.float64) - entry.pooled).sum())
        answer = "yes" if found <= cut.distance else "no"
        return Claim(answer=answer, name=entry.name, distance=found, llr=self._llr(found), cut=cut)

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
          FileNotFoundError: there is no such photo.
          ValueError: the gallery is empty, or the checkpoint has no threshold for that FPIR.
        """
        self._gallery_cut(fpir, distance)
        shots = self._shots([photo], "largest", strict=True)
        return self._identified(shots, fpir, candidates, distance)[0][0]

    def identify_photos(
        self, photos: Sequence[Photo], *, fpir: float = 0.01, candidates: int = 5, distance: float | None = None,
        which: Which = "largest", progress: bool = False,
    ) -> list[list[Identification]]:  # fmt: skip
        """`identify` for many photos; with which="all" every face of each, the largest first.

        A photo that does not read, or shows no face, gives one answer, "cannot tell", with its reason.
        """
        self._gallery_cut(fpir, distance)  # what cannot be answered is told before an hour of work
        found = self._shots(photos, which, progress=progress)
        return self._identified(found, fpir, candidates, distance)

    def _identified(
        self, found: Sequence[Sequence[Shot]], fpir: float, candidates: int, distance: float | None
    ) -> list[list[Identification]]:
        cut = self._gallery_cut(fpir, distance)  # for the gallery as it is now
        vectors = [shot.vector for shots in found for shot in shots if shot.vector is not None]
        answers = iter(self._search(np.array(vectors), cut, candidates))
        return [
            [
                dataclasses.replace(
                    self._unknown(cut, shot.trouble) if shot.vector is None else next(answers),
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
        return self._search(np.asarray(embeddings, np.float32), self._gallery_cut(fpir, distance), candidates)

    def _gallery_cut(self, fpir: float, distance: float | None) -> Cut:
        if not len(self):
            raise ValueError(
                "the gallery is empty: nobody can be recognised. Enrol people first: python launch.py enroll "
                "CHECKPOINT --gallery DIR PHOTOS."
            )
        return self._cut(fpir, len(self), self.store.template_counts(), distance)

    def _search(self, embeddings: NDArray[np.float32], cut: Cut, candidates: int) -> list[Identification]:
        if not len(embeddings):
            return []
        names, distances = self.store.search(embeddings, candidates)
        enrolled = len(self)
        answers = []
        for row, far in zip(names, distances.tolist(), strict=True):
            ranked = tuple(Candidate(name=n, distance=d, llr=self._llr(d)) for n, d in zip(row, far, strict=True))
            name = ranked[0].name if ranked and ranked[0].distance <= cut.distance else None
            answers.append(
                Identification(
                    answer=name or NOT_RECOGNIZED, name=name, candidates=ranked, cut=cut, enrolled=enrolled
                )
            )  # fmt: skip
        return answers

    def _unknown(self, cut: Cut, reason: str | None) -> Identification:
        return Identification(answer=CANNOT_TELL, name=None, candidates=(), cut=cut, enrolled=len(self), reason=reason)

    # ---- thresholds and scores -----------------------------------------------------------------------------------------

    def _cut(self, rate: float, k: int, photos: Sequence[int], distance: float | None) -> Cut:
        if distance is not None:
            if not distance > 0:
                raise ValueError(f"the threshold is {distance}: a squared distance above 0. Try 0.3.")
            return Cut(distance=distance, fpir=float("nan"), k=k, photos=1, status="given")
        return policy.cut_for(self.embedder.policy, fpir=rate, k=k, photos=photos)

    def _claim_cut(self, entry: Entry, fmr: float, distance: float | None) -> Cut:
        """A search among one person; where thresholds for searches are missing, as in older runs, the head's for pairs."""
        try:
            return self._cut(fmr, 1, (len(entry.templates),), distance)
        except ValueError:
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

    def _llr(self, distance: float) -> float | None:
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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
