"""Enrolment, claims and identification: by a stand-in for an encoder, and the commands from end to end."""

import dataclasses
import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFilter

from faceembed import cli
from faceembed.cli import enroll as cli_enroll
from faceembed.data.align import Face
from faceembed.identification import faces, policy, pooling
from faceembed.identification.gallery import Gallery
from faceembed.identification.quality import Limits
from faceembed.preprocess import Preprocess
from faceembed.verification.heads import Head

LENIENT = Limits(face=0.0, sharpness=0.0)

HEAD = Head(
    name="logistic_distance", feature="squared_distance", weight=(-4.0,), intercept=3.0, threshold=0.0, calibrated=True,
    dim=8,
)  # fmt: skip


def a_policy(distances: dict[int, float], k: tuple[int, ...] = (1, 10, 1000)) -> dict:
    """Thresholds for an FPIR of 0.01 by photos of a person: the given distance for one enrolled, less for more."""
    cuts = [
        {
            "photos": photos, "fpir": 0.01, "pool": 100, "k": list(k), "distance": [d / (1 + i) for i in range(len(k))],
            "printed_to": 10, "flagged_to": 10,
        }
        for photos, d in distances.items()
    ]  # fmt: skip
    return {"heads": {"logistic_distance": HEAD.to_dict()}, "identification": {"people": 100, "cuts": cuts}}


@dataclasses.dataclass
class Embedder:
    """Eight means of a crop's parts, of unit length: photos that look alike are near each other."""

    fingerprint: str = "a" * 64
    policy: dict | None = dataclasses.field(default_factory=lambda: a_policy({1: 0.1, 2: 0.06}))
    preprocess: Preprocess = dataclasses.field(default_factory=lambda: Preprocess(size=16))
    dim: int = 8
    calls: list[int] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        return self.preprocess.size

    def __call__(self, images):
        assert images.dtype == np.uint8
        assert images.shape[1:] == (16, 16, 3)
        self.calls.append(len(images))
        x = images.reshape(len(images), 8, -1).astype(np.float64).mean(axis=2) - 127.5
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def photo(person: int, take: int = 0) -> np.ndarray:
    """uint8 [32, 32, 3]: bands of a person's own, with a little noise that no other take has."""
    bands = np.random.default_rng(person).integers(0, 256, (8, 1))
    pixels = np.repeat(np.repeat(bands, 4, axis=0), 32 * 3, axis=1).reshape(32, 32, 3)
    noise = np.random.default_rng([person, take]).normal(0, 12, (32, 32, 3))
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def opened(where, **changes) -> Gallery:
    embedder = changes.pop("embedder", None) or Embedder()
    return Gallery(where, embedder, framing="tight", limits=LENIENT, **changes)


# ---- enrolment ---------------------------------------------------------------------------------------------------------


def test_one_photo_is_enough_and_others_are_not_recognized(tmp_path):
    with opened(tmp_path / "g") as gallery:
        for person in range(5):
            gallery.enroll(f"p{person}", photo(person))
        for person in range(5):
            found = gallery.identify(photo(person, 1))
            assert (found.answer, found.name, found.enrolled) == (f"p{person}", f"p{person}", 5)
        stranger = gallery.identify(photo(77))
        assert (stranger.answer, stranger.name) == ("not recognized", None)
        assert len(stranger.candidates) == 5
        far = [c.distance for c in stranger.candidates]
        assert far == sorted(far)
    with opened(tmp_path / "g") as again:  # another process's view
        assert again.names() == [f"p{i}" for i in range(5)]
        assert again.identify(photo(3, 9)).name == "p3"


def test_scores_are_those_of_the_checkpoints_head(tmp_path):
    with opened(tmp_path / "g") as gallery:
        entry = gallery.enroll("ann", photo(1))
        found = gallery.identify(photo(1, 1)).candidates[0]
        emb = gallery.embedder(
            np.stack([faces.look(photo(1, 1), gallery.embedder.preprocess, framing="tight")[0].crop])
        )
        assert found.llr == pytest.approx(float(HEAD.score(emb, entry.pooled[None])[0]), abs=1e-5)
        assert found.distance == pytest.approx(float(np.square(emb[0] - entry.pooled).sum()), abs=1e-6)
        claim = gallery.verify("ann", photo(1, 1), fmr=0.01)
        assert (claim.distance, claim.llr) == pytest.approx((found.distance, found.llr), abs=1e-5)
        gallery.embedder.policy = a_policy({1: 0.1}) | {"heads": {}}
        assert gallery.identify(photo(1, 1)).candidates[0].llr is None


def test_the_threshold_is_for_this_many_people_with_so_many_photos(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("p0", photo(0))
        one = gallery.identify(photo(0)).cut
        assert (one.k, one.photos, one.distance, one.status) == (1, 1, 0.1, "printed")
        for person in range(1, 11):
            gallery.enroll(f"p{person}", photo(person))
        many = gallery.identify(photo(0)).cut
        assert (many.k, many.distance, many.status) == (1000, pytest.approx(0.1 / 3), "extrapolated")
        gallery.enroll("p0", photo(0, 1), if_there="add")
        mixed = gallery.identify(photo(0)).cut
        assert (mixed.photos, mixed.distance) == (2, pytest.approx(0.06 / 3))  # the strictest of those enrolled
        # A claim is about one person, whatever the gallery holds.
        assert gallery.verify("p3", photo(3), fmr=0.01).cut.distance == 0.1
        assert gallery.verify("p0", photo(0), fmr=0.01).cut.distance == 0.06


def test_somebody_exactly_at_the_threshold_is_let_in(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll_embeddings("ann", np.eye(8)[0])
        probe = np.array([0.8, 0.6, 0, 0, 0, 0, 0, 0], np.float32)
        distance = gallery.identify_embeddings(probe[None], distance=9.0)[0].candidates[0].distance
        assert gallery.identify_embeddings(probe[None], distance=distance)[0].name == "ann"
        below = float(np.nextafter(distance, 0))
        found = gallery.identify_embeddings(probe[None], distance=below)[0]
        assert found.name is None
        assert found.cut.status == "given"
        with pytest.raises(ValueError, match="squared distance above 0"):
            gallery.identify_embeddings(probe[None], distance=0.0)


def test_claims_are_answered_with_yes_no_or_cannot_tell(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("ann", photo(1))
        gallery.enroll("bob", photo(2))
        assert gallery.verify("ann", photo(1, 1), fmr=0.01)
        no = gallery.verify("ann", photo(2, 1), fmr=0.01)
        assert (no.answer, bool(no)) == ("no", False)
        assert no.cut.fpir == 0.01
        with pytest.raises(ValueError, match="Did you mean ann"):
            gallery.verify("anm", photo(1))
        with pytest.raises(ValueError, match=r"rate of 0.5 of strangers; it has them for 0.01"):
            gallery.verify("ann", photo(1), fmr=0.5)
    with Gallery(tmp_path / "g", Embedder(), framing="tight", limits=Limits(face=64.0, sharpness=0.0)) as strict:
        unsure = strict.verify("ann", photo(1, 1), fmr=0.01)
        assert (unsure.answer, unsure.distance) == ("cannot tell", None)
        assert "16 px high, at least 64" in unsure.reason
        found = strict.identify(photo(1, 1))
        assert (found.answer, found.candidates) == ("cannot tell", ())
        with pytest.raises(ValueError, match=r"cid was not enrolled: .* 16 px high, at least 64"):
            strict.enroll("cid", photo(3))
        assert len(strict) == 2


def test_runs_without_thresholds_for_searches_answer_claims_by_those_for_pairs(tmp_path):
    points = [{"fmr": 0.01, "threshold": 2.6, "resolution": "flagged"}]
    older = a_policy({}) | {"operating_points": {"logistic_distance": points}}
    older.pop("identification")
    with opened(tmp_path / "g", embedder=Embedder(policy=older)) as gallery:
        gallery.enroll("ann", photo(1))
        claim = gallery.verify("ann", photo(1, 1), fmr=0.01)
        assert claim.cut.distance == pytest.approx((2.6 - 3.0) / -4.0)
        assert claim.cut.status == "flagged"
        assert bool(claim) == (claim.llr >= 2.6)
        gallery.enroll("ann", photo(1, 2), if_there="add")
        assert gallery.verify("ann", photo(1, 1), fmr=0.01).cut.status == "extrapolated"
        with pytest.raises(ValueError, match="no thresholds for identification"):
            gallery.verify("ann", photo(1), fmr=0.001)
        with pytest.raises(ValueError, match="no thresholds for identification"):
            gallery.identify(photo(1))


def test_several_photos_are_pooled_and_stay(tmp_path):
    with opened(tmp_path / "g") as gallery:
        entry = gallery.enroll("ann", [photo(1, take) for take in range(3)])
        assert len(entry.templates) == 3
        vectors = np.stack([t.vector for t in entry.templates])
        weights = np.array([t.quality for t in entry.templates])
        np.testing.assert_allclose(entry.pooled, pooling.pooled(vectors, weights), rtol=1e-6)
        stored = gallery.store.get("ann")
        np.testing.assert_array_equal(stored.templates[2].vector, entry.templates[2].vector)


def test_another_checkpoint_or_framing_is_refused(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("ann", photo(1))
    with pytest.raises(ValueError, match="aaaaaaaaaaaa there, bbbbbbbbbbbb now"):
        opened(tmp_path / "g", embedder=Embedder(fingerprint="b" * 64))
    with pytest.raises(ValueError, match="framing tight, portrait 16 px"):
        Gallery(tmp_path / "g", Embedder(), framing="celeba")
    with pytest.raises(FileNotFoundError, match="launch.py enroll"):
        opened(tmp_path / "nowhere", create=False)


def test_a_policy_without_identification_says_what_to_do(tmp_path):
    with opened(tmp_path / "g", embedder=Embedder(policy=None)) as gallery:
        gallery.enroll("ann", photo(1))
        with pytest.raises(ValueError, match="--set-policy; or give a distance"):
            gallery.identify(photo(1))
        assert gallery.identify(photo(1, 1), distance=0.1).name == "ann"


def test_an_empty_gallery_recognises_nobody(tmp_path):
    with opened(tmp_path / "g") as gallery:
        with pytest.raises(ValueError, match="the gallery is empty"):
            gallery.identify(photo(1))
        with pytest.raises(ValueError, match="nobody is"):
            gallery.verify("ann", photo(1))


def test_many_are_enrolled_in_batches_and_the_bad_are_told(tmp_path):
    corrupt = tmp_path / "torn.jpg"
    corrupt.write_bytes(b"\xff\xd8\xff\xe0 no image")
    people = {f"p{i}": [photo(i)] for i in range(40)}
    with opened(tmp_path / "g") as gallery:
        enrolled, refused = gallery.enroll_people(people | {"torn": [corrupt], "p3": [photo(3), corrupt]})
        assert gallery.embedder.calls == [40]  # one batch, not forty
        assert len(enrolled) == len(gallery) == 40
        why = "it is no whole image: Truncated File Read"  # without the path, which stands before it
        assert refused == [("p3", str(corrupt), why), ("torn", str(corrupt), why)]
        # Somebody is there already: nothing is embedded, nothing written.
        with pytest.raises(ValueError, match=r"'p7' is in the gallery already, of 2 to be enrolled"):
            gallery.enroll_people({"new": [photo(90)], "p7": [photo(7)]})
        assert len(gallery) == 40
        assert gallery.embedder.calls == [40]
        with pytest.raises(ValueError, match="2 people are in the gallery already, of 2 to be enrolled, such as 'p1'"):
            gallery.enroll_people({"p1": [photo(90)], "p2": [photo(7)]})
        with pytest.raises(ValueError, match=r"'Zoe\\u0308' and 'Zo\\xeb' are one name"):
            gallery.enroll_people({"Zoe\u0308": [photo(1)], "Zo\u00eb": [photo(1)]})
        assert gallery.embedder.calls == [40]


def test_photos_that_do_not_read_are_answered_and_not_raised(tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"nothing")
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("ann", photo(1))
        (good,), (bad,), (gone,) = gallery.identify_photos([photo(1, 1), torn, tmp_path / "gone.jpg"])
        assert good.name == "ann"
        assert (bad.answer, bad.photo) == ("cannot tell", "torn.png")
        assert (bad.reason, gone.reason) == ("it is no image that Pillow reads", "there is no such file")
        half = saved(tmp_path / "half.png", photo(1))
        half.write_bytes(half.read_bytes()[:900])
        assert gallery.identify_photos(half)[0][0].reason.startswith("it is no whole image: ")


def test_strangers_are_let_in_as_rarely_as_asked_for(tmp_path):
    """Thresholds set on some people hold for a gallery of others: the rate of wrong names is the one asked for."""
    rng = np.random.default_rng(0)

    def unit(n):
        x = rng.normal(size=(n, 8))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    calibrate = unit(1500)
    embedder = Embedder(
        policy={"identification": policy.thresholds(calibrate, np.arange(1500), fpirs=(0.1,), photos=(1,))}
    )
    with opened(tmp_path / "g", embedder=embedder) as gallery:
        rates = []
        for name, vector in enumerate(unit(50)):
            gallery.enroll_embeddings(f"p{name}", vector)
        for _ in range(4):
            found = gallery.identify_embeddings(unit(500), fpir=0.1)
            rates.append(np.mean([answer.name is not None for answer in found]))
        assert found[0].cut.k == 50
        assert 0.06 < np.mean(rates) < 0.14


def test_people_are_renamed_and_removed(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("ann", photo(1))
        gallery.enroll("bob", photo(2))
        gallery.rename("ann", "Anna")
        assert gallery.identify(photo(1, 1)).name == "Anna"
        gallery.remove("Anna")
        assert gallery.identify(photo(1, 1)).name is None
        assert gallery.names() == ["bob"]
        with pytest.raises(ValueError, match="already"):
            gallery.enroll("bob", photo(3))
        gallery.enroll("bob", photo(3), if_there="replace")
        assert gallery.identify(photo(3, 1)).name == "bob"


def test_an_export_of_another_checkpoint_is_not_taken_in(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("ann", photo(1))
        gallery.export(tmp_path / "all.npz")
        assert [entry.name for entry in gallery.entries()] == ["ann"]
    with opened(tmp_path / "h", embedder=Embedder(fingerprint="b" * 64)) as other:
        with pytest.raises(ValueError, match="aaaaaaaaaaaa there, bbbbbbbbbbbb now"):
            other.import_from(tmp_path / "all.npz")
        assert len(other) == 0
    with opened(tmp_path / "i") as same:
        same.import_from(tmp_path / "all.npz")
        assert same.identify(photo(1, 1)).name == "ann"
        with pytest.raises(ValueError, match="already"):
            same.import_from(tmp_path / "all.npz")


def test_thousands_of_photos_are_embedded_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "CHUNK", 7)
    with opened(tmp_path / "g") as gallery:
        gallery.enroll_people({f"p{i:02d}": [photo(i)] for i in range(20)})
        assert gallery.embedder.calls == [7, 7, 6]
        found = gallery.identify_photos([photo(i, 1) for i in range(20)])
        assert [shots[0].name for shots in found] == [f"p{i:02d}" for i in range(20)]
        with pytest.raises(FileNotFoundError):
            gallery.identify(tmp_path / "gone.jpg")


def test_embeddings_come_with_their_photos_or_not_at_all(tmp_path):
    with opened(tmp_path / "g") as gallery:
        entry = gallery.enroll_embeddings("ann", np.eye(8)[:2], photos=["a", "b"], quality=[0.5, 1.0])
        assert [(t.photo, t.quality) for t in entry.templates] == [("a", 0.5), ("b", 1.0)]
        with pytest.raises(ValueError, match="2 embeddings, 1 photos and 2 qualities"):
            gallery.enroll_embeddings("bob", np.eye(8)[:2], photos=["a"])
        with pytest.raises(ValueError, match="have 7 numbers, and the gallery's have 8"):
            gallery.enroll_embeddings("bob", np.ones(7))


def test_claims_of_embeddings_are_about_one_person_with_so_many_photos(tmp_path):
    with opened(tmp_path / "g") as gallery:
        for person in range(11):
            gallery.enroll_embeddings(f"p{person}", np.eye(8)[person % 8])
        gallery.enroll_embeddings("two", np.eye(8)[:2])
        probe = np.array([0.8, 0.6, 0, 0, 0, 0, 0, 0], np.float32)
        assert gallery.verify_embedding("p0", probe, fmr=0.01).cut.distance == 0.1
        cut = gallery.verify_embedding("two", probe, fmr=0.01).cut
        assert (cut.k, cut.photos, cut.distance) == (1, 2, 0.06)
        far = gallery.verify_embedding("p0", probe, distance=9.0).distance
        assert gallery.verify_embedding("p0", probe, distance=far)  # exactly at the threshold
        assert not gallery.verify_embedding("p0", probe, distance=float(np.nextafter(far, 0)))
        for bad in (np.nan, np.inf, 0.0, -1.0):
            with pytest.raises(ValueError, match="a squared distance above 0, and a finite one"):
                gallery.verify_embedding("p0", probe, distance=bad)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [(np.ones((1, 8)), r"shape \[1, 8\], and this gallery needs \[8\]"), (np.ones(7), r"shape \[7\]"),
     (np.full(8, np.nan), "NaN or infinity")],
)  # fmt: skip
def test_embeddings_of_another_shape_are_refused(embedding, message, tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll_embeddings("ann", np.eye(8)[0])
        with pytest.raises(ValueError, match=message):
            gallery.verify_embedding("ann", embedding, fmr=0.01)
        with pytest.raises(ValueError, match=r"shape \[8\], and this gallery needs \[n, 8\]"):
            gallery.identify_embeddings(np.ones(8))
        with pytest.raises(ValueError, match="NaN or infinity"):
            gallery.identify_embeddings(np.full((2, 8), np.inf))
        with pytest.raises(ValueError, match="candidates is 0"):
            gallery.identify_embeddings(np.ones((1, 8)), candidates=0)


def test_single_photos_that_do_not_read_raise_and_say_which(tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    with opened(tmp_path / "g") as gallery:
        gallery.enroll("ann", photo(1))
        for ask in (gallery.identify, lambda p: gallery.verify("ann", p, fmr=0.01), lambda p: gallery.enroll("bob", p)):
            with pytest.raises(FileNotFoundError, match=r"gone.jpg: there is no such file"):
                ask(tmp_path / "gone.jpg")
            with pytest.raises(ValueError, match=r"torn.jpg: it is no image that Pillow reads"):
                ask(tmp_path / "torn.jpg")
            with pytest.raises(ValueError, match=r": it is a folder"):
                ask(tmp_path)
            with pytest.raises(ValueError, match=r"float64 \[32, 32, 3\], not uint8"):
                ask(photo(1).astype(np.float64))


def test_one_photo_given_bare_is_a_list_of_one(tmp_path):
    path = saved(tmp_path / "ann.png", photo(1))
    with opened(tmp_path / "g") as gallery:
        enrolled, _ = gallery.enroll_people(
            {"ann": path, "bob": str(saved(tmp_path / "b.png", photo(2))), "cid": photo(3)}
        )
        assert [len(entry.templates) for entry in enrolled] == [1, 1, 1]
        for given in (path, str(path), photo(1, 1), [path], np.stack([photo(1, 1)])):
            assert [shots[0].name for shots in gallery.identify_photos(given)] == ["ann"]


def test_weights_of_photos_are_their_qualities(tmp_path):
    sharp = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    blurred = np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(3)))
    with opened(tmp_path / "g") as gallery:
        entry = gallery.enroll("ann", [sharp, blurred])
        crops = [faces.look(p, gallery.embedder.preprocess, framing="tight")[0] for p in (sharp, blurred)]
        assert [t.quality for t in entry.templates] == [shot.quality.score for shot in crops]
        assert entry.templates[0].quality != entry.templates[1].quality


def test_a_photo_given_twice_counts_once(tmp_path):
    path, copy = saved(tmp_path / "a.png", photo(1)), saved(tmp_path / "b.bmp", photo(1))
    with opened(tmp_path / "g") as gallery:
        with pytest.warns(UserWarning, match=r"ann: a.png and b.bmp are one picture, which counts once"):
            entry = gallery.enroll("ann", [path, photo(1, 1), copy])
        assert len(entry.templates) == 2
        np.testing.assert_array_equal(entry.templates[0].vector, gallery.enroll("bob", path).pooled)


def test_names_that_cannot_be_are_refused_and_the_others_enrolled(tmp_path):
    with opened(tmp_path / "g") as gallery:
        people = {"a\nb": [tmp_path / "a\nb" / "1.jpg"], "ann": [photo(1), "x/\udcff.jpg"], " ": [photo(2)]}
        enrolled, refused = gallery.enroll_people(people)
        assert [entry.name for entry in enrolled] == gallery.names() == ["ann"]
        assert [row[:2] for row in refused] == [
            ("a\\nb", f"{tmp_path}/a\\nb/1.jpg"), ("ann", "x/\\udcff.jpg"), (" ", ""),
        ]  # fmt: skip
        assert "control character U+000A" in refused[0][2]
        assert "no Unicode text" in refused[1][2]
        assert gallery.embedder.calls == [1]


def test_somebody_whose_photos_cancel_out_does_not_stop_the_others(tmp_path):
    dark = np.full((32, 32, 3), 100, np.uint8)
    with opened(tmp_path / "g") as gallery:
        enrolled, refused = gallery.enroll_people({"ann": [dark, 255 - dark], "bob": [photo(2)]})
        assert [entry.name for entry in enrolled] == ["bob"]
        assert refused[0][0] == "ann"
        assert "cancel out" in refused[0][2]


def test_photos_unlike_the_persons_others_are_told(tmp_path):
    strict = a_policy({1: 0.1})
    strict["identification"]["cuts"].append(
        strict["identification"]["cuts"][0] | {"fpir": 0.001, "distance": [0.05] * 3}
    )
    with opened(tmp_path / "g", embedder=Embedder(policy=strict)) as gallery:
        entry = gallery.enroll("ann", [photo(1), photo(1, 1), photo(2), photo(1, 2)])
        (doubt,) = gallery.doubts(entry)
        others = pooling.pooled(
            np.stack([entry.templates[i].vector for i in (0, 1, 3)]), [entry.templates[i].quality for i in (0, 1, 3)]
        )
        assert doubt.distance == pytest.approx(float(np.square(entry.templates[2].vector - others).sum()), rel=1e-5)
        assert (doubt.cut.distance, doubt.cut.fpir) == (0.05, 0.001)
        assert len(gallery.doubts(gallery.enroll("bob", [photo(1), photo(2)]))) == 1
        assert gallery.doubts(gallery.enroll("cid", [photo(1), photo(1, 1)])) == []
        assert gallery.doubts(gallery.enroll("dan", photo(1))) == []
        gallery.embedder.policy = a_policy({1: 0.1})
        assert gallery.doubts(entry) == []


def test_ties_are_told(tmp_path):
    with opened(tmp_path / "g") as gallery:
        for name in ("ann", "bob"):
            gallery.enroll_embeddings(name, np.eye(8)[0])
        gallery.enroll_embeddings("cid", np.eye(8)[1])
        for ranked in (1, 5):
            found = gallery.identify_embeddings(np.eye(8)[:1], distance=0.1, candidates=ranked)[0]
            assert {found.name, *found.also} == {"ann", "bob"}
            assert len(found.candidates) == min(ranked, 3)
        assert gallery.identify_embeddings(np.eye(8)[1:2], distance=0.1)[0].also == ()
        assert gallery.identify_embeddings(0.5 * np.eye(8)[:1], distance=0.1)[0].also == ()  # alike, and too far


def test_likelihood_ratios_are_for_people_with_one_photo(tmp_path):
    with opened(tmp_path / "g") as gallery:
        gallery.enroll_embeddings("one", np.eye(8)[0])
        gallery.enroll_embeddings("two", np.eye(8)[1:3])
        found = gallery.identify_embeddings(np.eye(8)[:1], distance=0.1)[0]
        assert {c.name: c.llr for c in found.candidates} == {"one": pytest.approx(gallery.llr(0.0)), "two": None}
        assert gallery.verify_embedding("two", np.eye(8)[0], distance=0.1).llr is None
        assert gallery.verify_embedding("one", np.eye(8)[0], distance=0.1).llr == pytest.approx(3.0)


def test_the_threshold_is_for_the_gallery_that_is_searched(tmp_path, monkeypatch):
    """Somebody else enrols and removes people while photos are looked at and searched for."""
    with opened(tmp_path / "g") as gallery, opened(tmp_path / "g") as other:
        gallery.enroll("p0", photo(0))

        def meanwhile(act):
            search = type(gallery.store).search

            def searched(store, *arguments):
                found = search(store, *arguments)
                act()
                return found

            monkeypatch.setattr(type(gallery.store), "search", searched)
            try:
                return gallery.identify_photos([photo(0, 1), photo(0, 2)])
            finally:
                monkeypatch.setattr(type(gallery.store), "search", search)

        for found in meanwhile(
            lambda: other.enroll_people({f"p{i}": photo(i) for i in range(1, 11)}, if_there="replace")
        ):
            assert (found[0].enrolled, found[0].cut.k) == (11, 1000)
        for found in meanwhile(lambda: other.remove([f"p{i}" for i in range(5, 11)]) if len(other) > 5 else None):
            assert (found[0].enrolled, found[0].cut.k) == (11, 1000)  # the stricter of both
        with pytest.raises(ValueError, match="the gallery is empty"):
            meanwhile(lambda: other.remove(other.names()) if len(other) else None)


def test_which_faces_are_taken(tmp_path, found):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 300, 3), np.uint8)
    with Gallery(tmp_path / "g", Embedder(), limits=LENIENT) as gallery:
        found.append(face(0, 80))
        gallery.enroll("ann", pixels)
        found.append(face(100, 70))
        assert gallery.verify("ann", pixels, fmr=0.01)
        assert gallery.identify(pixels).name == "ann"
        assert [[answer.name for answer in shots] for shots in gallery.identify_photos([pixels])] == [["ann"]]
        assert [len(shots) for shots in gallery.identify_photos([pixels], which="all")] == [2]
        with pytest.raises(ValueError, match="2 faces were found"):
            gallery.enroll("bob", pixels)
        assert gallery.enroll("bob", pixels, which="largest").name == "bob"
        assert gallery.enroll_people({"cid": pixels})[1][0][2].startswith("2 faces were found")


def test_folders_tell_what_they_hold_and_what_is_left_out(tmp_path, monkeypatch):
    for name in ("b/2.JPG", "b/1.png", "a.Webp", ".hidden/x.png", ".y.png"):
        saved(tmp_path / "f" / name.replace(".Webp", ".webp"), photo(0))
    for name in ("notes.txt", "b/x.HEIC", "b/y.heic", ".z.txt"):
        (tmp_path / "f" / name).write_bytes(b"")
    (tmp_path / "f" / "link").symlink_to(tmp_path / "f" / "b")
    (tmp_path / "f" / "dead.png").symlink_to(tmp_path / "nothing")
    listing = faces.photos_in(tmp_path / "f")
    assert [str(p.relative_to(tmp_path / "f")) for p in listing.photos] == ["a.webp", "b/1.png", "b/2.JPG"]
    assert listing.others == {".heic": 2, ".txt": 1}
    assert [(p.name, why) for p, why in listing.unreadable] == [
        ("dead.png", "it is no file, or a link to nothing"),
        ("link", "it is a link to a folder, and those are not followed"),
    ]
    scan = os.scandir

    def locked(path):  # whoever runs the tests may be root
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert (tmp_path / "f" / "b", "Permission denied") in faces.photos_in(tmp_path / "f").unreadable
    assert faces.photos_in(tmp_path / "f" / "b").unreadable == ((tmp_path / "f" / "b", "Permission denied"),)
    with pytest.raises(ValueError, match=r"no photo in .*/b: .* Left out: .*/b: Permission denied\."):
        cli_enroll.people_of((tmp_path / "f" / "b",), None)


# ---- faces of a photo --------------------------------------------------------------------------------------------------


def face(left: float, height: float, score: float = 0.9) -> Face:
    places = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    return Face(box=np.array([left, 0, left + height, height]), landmarks=places * height + [left, 0], score=score)


@pytest.fixture
def found(monkeypatch):
    """What the detector finds, to be filled by a test."""
    there: list[Face] = []

    def largest_first():
        return sorted(there, key=lambda f: -f.box[3])

    def find(pixels, aligner):
        assert aligner.face == "largest"
        every = largest_first()
        return faces.crops.Found(faces=len(every), face=every[0] if every else None, seen=tuple(there))

    monkeypatch.setattr(faces.crops, "find_all", lambda pixels, aligner: largest_first())
    monkeypatch.setattr(faces.crops, "find", find)
    monkeypatch.setattr(faces.crops, "require", lambda detector: None)
    return there


def test_a_photo_to_enrol_shows_one_face(found):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 300, 3), np.uint8)
    pre = Preprocess(size=16)
    for which in ("only", "largest", "all"):
        assert [shot.trouble for shot in faces.look(pixels, pre, which=which)] == ["no face was found"]
    found.append(face(0, 80))
    assert faces.look(pixels, pre, which="only", limits=LENIENT)[0].trouble is None
    found.append(face(100, 39))  # less than half as high: somebody behind
    shot = faces.look(pixels, pre, which="only", limits=LENIENT)[0]
    assert shot.trouble is None
    assert shot.box.tolist() == [0, 0, 80, 80]
    found.append(face(200, 41))
    assert faces.look(pixels, pre, which="only")[0].trouble.startswith("2 faces were found")
    assert faces.look(pixels, pre, which="largest", limits=LENIENT)[0].box.tolist() == [0, 0, 80, 80]
    every = faces.look(pixels, pre, which="all", limits=Limits(face=40.0, sharpness=0.0))
    assert [shot.box[3] for shot in every] == [80, 41, 39]
    assert every[2].trouble == "the face is 39 px high, at least 40 are needed"
    assert [shot.trouble for shot in every[:2]] == [None, None]


def test_crops_are_drawn_by_landmarks_into_the_encoders_template(found):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 300, 3), np.uint8)
    found += [face(10, 80), face(150, 60)]
    pre = Preprocess(size=16)
    aligner = faces.crops.Aligner(template="portrait", size=16)
    for shot, expected in zip(faces.look(pixels, pre, which="all", limits=LENIENT), found, strict=True):
        drawn = faces.crops.draw(pixels, faces.crops.place(expected, aligner), 16)
        np.testing.assert_array_equal(shot.crop, drawn)


def test_a_framing_takes_its_square_whatever_it_shows():
    pixels = np.zeros((250, 250, 3), np.uint8)
    pixels[127 - 70 : 127 + 70, 125 - 70 : 125 + 70] = 200
    (shot,) = faces.look(pixels, Preprocess(size=16), framing="lfw", limits=LENIENT)
    assert shot.crop[2:-2, 2:-2].min() == 200
    (tight,) = faces.look(pixels, Preprocess(size=16), framing="tight", limits=LENIENT)
    assert tight.crop[0, 0].tolist() == [0, 0, 0]


# ---- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(monkeypatch, capsys, found):
    """Runs a command with the stand-in for an encoder; every photo shows one face, all of it."""
    for command in ("enroll", "claim", "identify"):
        monkeypatch.setattr(f"faceembed.cli.{command}.load", lambda checkpoint: Embedder())
    monkeypatch.setitem(Gallery.__init__.__kwdefaults__, "limits", LENIENT)

    def run(*arguments) -> tuple[int, str, str]:
        status = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def saved(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_session_from_enrolment_to_deletion(tmp_path, launch):
    for person in range(3):
        saved(tmp_path / "people" / f"p{person}.png", photo(person))
    shared = ("--gallery", tmp_path / "g")
    status, out, _ = launch(
        "enroll", "run", tmp_path / "people", *shared, "--framing", "tight", "--json", tmp_path / "e"
    )
    assert status == 0
    assert "3 enrolled; 3 people in all" in out
    assert [row["name"] for row in json.loads((tmp_path / "e").read_text())["enrolled"]] == ["p0", "p1", "p2"]
    mine, other = saved(tmp_path / "mine.png", photo(1, 1)), saved(tmp_path / "other.png", photo(50))
    claim = ("claim", "run", *shared, "--framing", "tight", "--fmr", 0.01, "--name")
    status, out, _ = launch(*claim, "p1", mine)
    assert status == 0
    assert out.startswith("yes: this is p1 (squared distance")
    assert "for a false match rate of 1 %" in out
    status, out, _ = launch(*claim, "p1", other, "--json", tmp_path / "c")
    assert status == 3
    assert out.startswith("no: this is not shown to be p1")
    assert json.loads((tmp_path / "c").read_text())["answer"] == "no"
    status, out, _ = launch("identify", "run", *shared, "--framing", "tight", mine)
    assert (status, out.splitlines()[0]) == (0, "p1")
    status, out, _ = launch("identify", "run", *shared, "--framing", "tight", other)
    assert (status, out.splitlines()[0]) == (0, "not recognized")
    status, out, _ = launch("gallery", "delete", "p1", *shared)
    assert (status, out) == (0, "p1: deleted; 2 people are left\n")
    status, out, _ = launch("identify", "run", *shared, "--framing", "tight", mine)
    assert out.splitlines()[0] == "not recognized"
    status, out, _ = launch("gallery", "list", *shared, "--json", tmp_path / "l")
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["p0", "p2"]
    assert json.loads((tmp_path / "l").read_text())["people"][0]["from"] == ["p0.png"]


def test_a_folder_is_identified_as_a_table(tmp_path, launch):
    for person in range(2):
        saved(tmp_path / "people" / f"p{person}.png", photo(person))
        saved(tmp_path / "door" / f"visit{person}.png", photo(person, 1))
    saved(tmp_path / "door" / "visit9.png", photo(9))
    (tmp_path / "door" / "notes.txt").write_text("not a photo")
    (tmp_path / "door" / "torn.jpg").write_bytes(b"torn")
    launch("enroll", "run", tmp_path / "people", "--gallery", tmp_path / "g", "--framing", "tight")
    status, out, _ = launch(
        "identify",
        "run",
        tmp_path / "door",
        "--gallery",
        tmp_path / "g",
        "--framing",
        "tight",
        "--json",
        tmp_path / "i",
    )
    assert status == 0
    assert "1 cannot tell, 2 recognised, 1 not recognized" in out
    content = json.loads((tmp_path / "i").read_text())
    answers = {row["photo"].split("/")[-1]: row["faces"][0]["answer"] for row in content["photos"]}
    assert answers == {
        "torn.jpg": "cannot tell",
        "visit0.png": "p0",
        "visit1.png": "p1",
        "visit9.png": "not recognized",
    }
    assert content["cut"]["fpir"] == 0.01


def test_every_face_of_a_group_is_named_in_a_copy(tmp_path, launch, found, monkeypatch):
    group = np.concatenate([photo(0, 1), photo(9), photo(1, 1)], axis=1)
    for person in range(2):
        saved(tmp_path / "people" / f"p{person}.png", photo(person))
    launch("enroll", "run", tmp_path / "people", "--gallery", tmp_path / "g", "--framing", "tight")
    # The stand-in for detection: three squares side by side, of which the crops are cut.
    boxes = [
        Face(box=np.array([32.0 * i, 0, 32 * i + 32, 32]), landmarks=np.full((5, 2), i), score=0.9) for i in range(3)
    ]
    monkeypatch.setattr(faces.crops, "find_all", lambda pixels, aligner: boxes)
    monkeypatch.setattr(faces.crops, "place", lambda face, aligner: face)
    monkeypatch.setattr(
        faces.crops, "draw", lambda pixels, face, size: np.asarray(
            Image.fromarray(pixels[:, int(face.box[0]) : int(face.box[2])]).resize((size, size), Image.Resampling.BILINEAR)
        )
    )  # fmt: skip
    monkeypatch.setattr(faces, "aligner_of", lambda preprocess, framing: "framing tight, portrait 16 px")
    path = saved(tmp_path / "group.png", group)
    status, out, _ = launch("identify", "run", path, "--gallery", tmp_path / "g", "--out", tmp_path / "drawn")
    assert status == 0
    assert "2 recognised, 1 not recognized" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("group.png ")]
    assert [line[2:5] for line in lines] == [["16,", "16", "p0"], ["48,", "16", "not"], ["80,", "16", "p1"]]
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "group.png"))
    assert drawn.shape == group.shape
    assert (drawn != group).any(axis=2)[:, :32].any()
    assert (drawn != group).any(axis=2)[:, 64:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["enroll", "run", "nowhere.jpg", "--gallery", "g"], "there is no nowhere.jpg"),
        (["claim", "run", "nowhere.jpg", "--gallery", "g", "--name", "x"], "there is no photo nowhere.jpg"),
        (["identify", "run", "nowhere.jpg", "--gallery", "g"], "there is no nowhere.jpg"),
        (["gallery", "list", "--gallery", "g"], "there is no gallery at g"),
        (["gallery", "export", "people.csv", "--gallery", "g"], "Try people.npz"),
        (["gallery", "import", "people.npz", "--gallery", "g"], "people.npz"),
    ],
)
def test_what_is_not_there_is_said(arguments, message, launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = launch(*arguments)
    assert status == 1
    assert message in err
    assert not (tmp_path / "g").exists()


def test_nobody_enrolled_is_an_error_that_says_why(tmp_path, launch):
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    status, out, err = launch("enroll", "run", tmp_path / "torn.jpg", "--gallery", tmp_path / "g", "--framing", "tight")
    assert status == 1
    assert f"refused: torn: {tmp_path / 'torn.jpg'}: it is no image that Pillow reads\n" in out
    assert "nobody was enrolled: the photo will not do, see above" in err


def test_names_come_from_files_and_folders(tmp_path, launch):
    from faceembed.cli.enroll import people_of

    for path in ("a/ann.PNG", "a/bob/2.png", "a/bob/1.png", "a/bob/10.png", "a/.hidden/3.png", "b/ann.png"):
        saved(tmp_path / path, photo(0))
    found, _ = people_of((tmp_path / "a",), None)
    assert {name: [p.name for p in photos] for name, photos in found.items()} == {
        "ann": ["ann.PNG"], "bob": ["1.png", "10.png", "2.png"],
    }  # fmt: skip
    assert list(people_of((tmp_path / "a", tmp_path / "b"), "Ann")[0]) == ["Ann"]
    with pytest.raises(ValueError, match="give one name, 'ann'"):
        people_of((tmp_path / "a", tmp_path / "b"), None)
    deep = saved(tmp_path / "a/bob/x/2.png", photo(0))
    with pytest.raises(
        ValueError, match=rf"{deep} lies deeper than .*is it of 'bob' or of 'x'\? Give .*{tmp_path}/a/bob"
    ):
        people_of((tmp_path / "a",), None)
    assert len(people_of((tmp_path / "a",), "Bob")[0]["Bob"]) == 5
    for name in ("Zoe\u0308", "Zo\u00eb"):
        saved(tmp_path / "c" / f"{name}.png", photo(0))
    with pytest.raises(
        ValueError, match=r"Zo\\xeb.png' and .*Zoe\\u0308.png' give one name|Zoe\\u0308.png' and .*Zo\\xeb"
    ):
        people_of((tmp_path / "c",), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no photo in"):
        people_of((tmp_path / "empty",), None)


def test_an_export_comes_back_whole(tmp_path, launch):
    for person in range(2):
        saved(tmp_path / "people" / f"p{person}.png", photo(person))
    launch("enroll", "run", tmp_path / "people", "--gallery", tmp_path / "g", "--framing", "tight")
    status, out, _ = launch("gallery", "export", tmp_path / "all.npz", "--gallery", tmp_path / "g")
    assert status == 0
    assert (tmp_path / "all.npz").stat().st_mode & 0o777 == 0o600
    status, out, _ = launch("gallery", "import", tmp_path / "all.npz", "--gallery", tmp_path / "h")
    assert "2 people imported; 2 in all" in out
    status, out, _ = launch("gallery", "rename", "p0", "Ann", "--gallery", tmp_path / "h")
    assert out == "p0 is Ann now\n"
    status, _, err = launch("gallery", "import", tmp_path / "all.npz", "--gallery", tmp_path / "h")
    assert status == 1
    assert "p1" in err


def told(tmp_path, launch, *people):
    """A gallery of p0, p1, …; the options that name it."""
    for person in people:
        saved(tmp_path / "people" / f"p{person}.png", photo(person))
    there = ("--gallery", tmp_path / "g", "--framing", "tight")
    assert launch("enroll", "run", tmp_path / "people", *there)[0] == 0
    return there


def test_copies_overwrite_nothing(tmp_path, launch, monkeypatch):
    there = told(tmp_path, launch, 0)
    box = (2.0, 2.0, 30.0, 30.0)
    identified = Gallery.identify_photos

    def boxed(*arguments, **options):
        return [[dataclasses.replace(a, box=box) for a in found] for found in identified(*arguments, **options)]

    monkeypatch.setattr(Gallery, "identify_photos", boxed)
    mine = [saved(tmp_path / folder / name, photo(0, i)) for i, (folder, name) in enumerate(
        [("a", "me.png"), ("b", "ME.bmp"), ("b", "you.jpg")]
    )]  # fmt: skip
    before = {path: path.read_bytes() for path in mine}
    for out in (tmp_path / "a", tmp_path / "b" / ".." / "a"):
        status, _, err = launch("identify", "run", *mine, *there, "--out", out)
        assert status == 1
        assert "one of the photos themselves. Name another folder" in err
    out = tmp_path / "out"
    out.mkdir()
    (out / "you.PNG").write_bytes(b"of somebody")
    (out / "you-2.png").write_bytes(b"of somebody")
    status, told_of, _ = launch("identify", "run", *mine, *there, "--out", out, "--json", tmp_path / "i")
    assert status == 0
    assert told_of.index("written:") < told_of.index("drawn:")  # drawing may fail
    assert sorted(p.name for p in out.iterdir()) == ["ME-2.png", "me.png", "you-2.png", "you-3.png", "you.PNG"]
    assert (out / "you.PNG").read_bytes() == (out / "you-2.png").read_bytes() == b"of somebody"
    assert {path: path.read_bytes() for path in mine} == before
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    for option in (("--out", blocked / "x"), ("--json", blocked / "x"), ("--json", out)):
        status, _, err = launch("identify", "run", mine[0], *there, *option)
        assert status == 1
        assert "of yours" in err


def test_thresholds_of_ones_own_and_rates_reach_the_answer(tmp_path, launch, monkeypatch):
    cuts = a_policy({1: 0.1})
    first = cuts["identification"]["cuts"][0]
    first["flagged_to"] = 1
    cuts["identification"]["cuts"].append(first | {"fpir": 0.1, "distance": [0.4, 0.3, 0.2], "flagged_to": 1000})
    for command in ("enroll", "claim", "identify"):
        monkeypatch.setattr(f"faceembed.cli.{command}.load", lambda checkpoint: Embedder(policy=cuts))
    there = told(tmp_path, launch, 0, 1)
    mine = saved(tmp_path / "mine.png", photo(0, 1))
    last = launch("identify", "run", mine, *there)[1].splitlines()[-1]
    # The log-likelihood ratio of the threshold, 3 - 4 · 0.05, stands beside it.
    assert last == (
        "2 people enrolled; threshold 0.0500 (log-likelihood ratio +2.80), set for 1 % of strangers in a gallery of 10 "
        "(extrapolated)"
    )
    last = launch("identify", "run", mine, mine, *there, "--fpir", 0.1)[1].splitlines()[-1]
    assert last.endswith(
        "threshold 0.3000 (log-likelihood ratio +1.80), set for 10 % of strangers in a gallery of 10, for each face"
    )
    out = launch("identify", "run", mine, *there, "--threshold", 1e-9)[1]
    assert out.splitlines()[0] == "not recognized"
    assert "threshold 0.0000" in out
    assert "your threshold" in out
    claim = ("claim", "run", mine, *there, "--name")
    assert launch(*claim, "p0", "--threshold", 1e-9)[0] == 3
    assert launch(*claim, "p1", "--threshold", 3.9)[0] == 0
    assert "finite" in launch(*claim, "p1", "--threshold", "inf")[2]
    assert "rate of 0.5" in launch("identify", "run", mine, *there, "--fpir", 0.5)[2]


def test_claims_that_cannot_be_decided_have_statuses_of_their_own(tmp_path, launch, monkeypatch):
    there = told(tmp_path, launch, 0)
    mine = saved(tmp_path / "mine.png", photo(0, 1))
    claim = ("claim", "run", *there, "--fmr", 0.01, "--name", "p0")
    monkeypatch.setitem(Gallery.__init__.__kwdefaults__, "limits", Limits(face=99.0, sharpness=0.0))
    status, out, _ = launch(*claim, mine)
    assert (status, out) == (4, "cannot tell: the face is 16 px high, at least 99 are needed\n")
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    status, _, err = launch(*claim, tmp_path / "torn.jpg")
    assert (status, err) == (1, f"error: {tmp_path}/torn.jpg: it is no image that Pillow reads\n")
    status, _, err = launch(*claim, tmp_path)
    assert status == 1
    assert "is a folder: a claim is decided by one photo" in err
    for command in (("claim", "run", mine, "--name", "p0"), ("identify", "run", mine)):
        status, _, err = launch(*command, "--gallery", tmp_path / "new")
        assert status == 1
        assert "there is no gallery at" in err
        assert not (tmp_path / "new").exists()
        assert "--gallery is empty" in launch(*command, "--gallery", " ")[2]


def test_largest_faces_only_where_they_are_asked_for(tmp_path, launch, found):
    found += [face(0, 80), face(100, 70)]
    pixels = np.random.default_rng(0).integers(0, 256, (120, 300, 3), np.uint8)
    path = saved(tmp_path / "ann.png", pixels)
    there = ("--gallery", tmp_path / "g")
    status, out, _ = launch("enroll", "run", path, *there)
    assert status == 1
    assert f"refused: ann: {path}: 2 faces were found" in out
    assert "crop it, or take the largest: --face largest" in out
    status, out, _ = launch("enroll", "run", path, *there, "--face", "largest")
    assert (status, out.splitlines()[0]) == (0, f"{tmp_path}/g: 1 enrolled; 1 person in all")
    out = launch("identify", "run", path, *there)[1]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("ann.png ")] == ["1", "2"]
    out = launch("identify", "run", path, *there, "--face", "largest")[1]
    assert out.splitlines()[0] == "ann"
    assert "1 person enrolled; threshold" in out


def test_people_who_are_there_are_kept_added_to_or_replaced(tmp_path, launch):
    there = told(tmp_path, launch, 0)
    new = saved(tmp_path / "new" / "p0.png", photo(0, 1))
    status, _, err = launch("enroll", "run", new, *there)
    assert status == 1
    assert "'p0' is in the gallery already" in err

    def photos():
        with opened(tmp_path / "g") as gallery:
            return len(gallery.store.get("p0").templates)

    assert launch("enroll", "run", new, *there, "--if-there", "add")[0] == 0
    assert photos() == 2
    assert launch("enroll", "run", new, *there, "--if-there", "replace")[0] == 0
    assert photos() == 1


def test_an_enrolment_says_what_to_look_at(tmp_path, launch, monkeypatch):
    strict = a_policy({1: 0.1})
    strict["identification"]["cuts"].append(
        strict["identification"]["cuts"][0] | {"fpir": 0.001, "distance": [0.05] * 3}
    )
    monkeypatch.setattr("faceembed.cli.enroll.load", lambda checkpoint: Embedder(policy=strict))
    there = told(tmp_path, launch, 0)
    more = tmp_path / "more"
    for name, pixels in {
        "ann/a1.png": photo(1), "ann/a2.png": photo(2), "ann/a3.png": photo(1, 1), "bob/1.png": photo(3),
        "bob/2.png": photo(4), "P0/1.png": photo(5), "P0/copy.png": photo(5), "x\ty.png": photo(6),
    }.items():  # fmt: skip
        saved(more / name, pixels)
    (more / "a.gif").write_bytes(b"")
    (more / "ann" / "a.heic").write_bytes(b"")
    status, out, err = launch("enroll", "run", more, *there, "--no-progress", "--json", tmp_path / "j")
    assert status == 0
    assert "left out: 2 files that are no photos by their names (.gif, .heic)\n" in out
    assert f"refused: x\\ty: {more}/x\\ty.png: " in out
    assert "3 enrolled, 2 of them from several photos; 4 people in all" in out
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        "note: P0: 1.png and copy.png are one picture, which counts once.",
        "note: P0 differs from p0 by upper and lower case alone: are they one person?",
        "note: ann: a2.png does not look like ann's other photos",
        "note: bob: 1.png and 2.png do not look alike",
    ]
    assert "at most 0.05 for a false match rate of 0.1 %): is it somebody else?" in err
    assert len(json.loads((tmp_path / "j").read_text())["notes"]) == 3
    assert "--json" in launch("enroll", "run", more, *there, "--json", more / "a.gif" / "x")[2]


def test_a_stopped_enrolment_says_that_nobody_was_enrolled(tmp_path, launch, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    saved(tmp_path / "ann.png", photo(0))
    monkeypatch.setattr(faces, "embed_faces", stop)
    status, _, err = launch("enroll", "run", tmp_path / "ann.png", "--gallery", tmp_path / "g", "--framing", "tight")
    assert status == 130
    assert "nobody was enrolled" in err


def test_warnings_are_notes_and_others_stay(capsys):
    with cli_enroll.notes_for_warnings():
        warnings.warn("somebody is reading", stacklevel=1)
        with pytest.raises(DeprecationWarning):  # an error, as everywhere in the tests
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: somebody is reading\n"


def test_the_table_tells_photos_of_one_name_apart_and_says_why(tmp_path, launch, monkeypatch):
    there = told(tmp_path, launch, 0)
    for name in ("door/a/1.png", "door/b/1.png", "yard/a/1.png"):
        saved(tmp_path / name, photo(0, 1))
    (tmp_path / "door" / "a\nb.png").write_bytes(b"")
    (tmp_path / "door" / "x.avi").write_bytes(b"")
    monkeypatch.setattr(
        faces, "_pixels", lambda photo, read=faces._pixels: read(photo) if os.path.getsize(photo) else fail()
    )

    def fail():
        raise ValueError("long " * 30)

    out = launch("identify", "run", tmp_path / "door", *there, "--json", tmp_path / "j")[1]
    assert out.startswith("left out: 1 file that is no photo by its name (.avi)\n")
    rows = out.splitlines()[3:6]
    assert [row.split()[0] for row in rows] == ["a/1.png", "a\\nb.png", "b/1.png"]
    assert rows[1].endswith("long " * 15 + "long…")
    assert "long " * 30 in (tmp_path / "j").read_text()
    out = launch("identify", "run", tmp_path / "door", tmp_path / "yard", *there)[1]
    assert [row.split()[0] for row in out.splitlines() if row.endswith("-") is False and "/1.png" in row] == [
        f"{tmp_path}/door/a/1.png", "b/1.png", f"{tmp_path}/yard/a/1.png",
    ]  # fmt: skip


# ---- real photographs --------------------------------------------------------------------------------------------------


def test_the_session_of_the_readme_with_real_photographs(tmp_path, real_data, capsys):
    """Three people from one photo each; a claim, a second photo, a stranger, a deletion: dlib's network, faces found."""
    import tarfile

    wanted = {
        "Aaron_Peirsol_0001": "people/ann.jpg", "Abdullah_Gul_0001": "people/bob.jpg",
        "Adrien_Brody_0001": "people/cid.jpg", "Abdullah_Gul_0002": "today.jpg",
            "Aaron_Peirsol_0002": "door.jpg", "Zico_0001": "stranger.jpg",
    }  # fmt: skip
    (tmp_path / "people").mkdir()
    with tarfile.open(real_data / "lfw" / "lfw-deepfunneled.tgz") as archive:
        for name, target in wanted.items():
            member = archive.extractfile(f"lfw-deepfunneled/{name[:-5]}/{name}.jpg")
            (tmp_path / target).write_bytes(member.read())
    gallery = ("--gallery", str(tmp_path / "gallery"))

    def launch(*arguments):
        status = cli.main([str(a) for a in arguments])
        return status, capsys.readouterr().out

    status, out = launch("enroll", "dlib", tmp_path / "people", *gallery)
    assert (status, "3 enrolled; 3 people in all" in out) == (0, True)
    status, out = launch("claim", "dlib", *gallery, "--name", "bob", tmp_path / "today.jpg")
    assert (status, out.startswith("yes: this is bob")) == (0, True)
    status, out = launch("claim", "dlib", *gallery, "--name", "ann", tmp_path / "today.jpg")
    assert (status, out.startswith("no: this is not shown to be ann")) == (3, True)
    assert launch("identify", "dlib", *gallery, tmp_path / "door.jpg")[1].splitlines()[0] == "ann"
    assert launch("identify", "dlib", *gallery, tmp_path / "stranger.jpg")[1].splitlines()[0] == "not recognized"
    status, out = launch("gallery", "delete", "ann", *gallery)
    assert status == 0
    assert launch("identify", "dlib", *gallery, tmp_path / "door.jpg")[1].splitlines()[0] == "not recognized"
    Image.fromarray(np.full((200, 200, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    status, out = launch("claim", "dlib", *gallery, "--name", "bob", tmp_path / "grey.png")
    assert (status, out) == (4, "cannot tell: no face was found\n")
