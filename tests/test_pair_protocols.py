"""All pairs, hard pairs, missing photos, slices; and `verify` with each of them."""

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed import evaluate
from faceembed.data import pairs, sources, splits
from faceembed.preprocess import Preprocess
from tests.test_pairs import made_up

COUNTS = [3, 1, 2, 5, 2, 1, 4, 2]


# ---- hard pairs --------------------------------------------------------------------------------------------------------


def by_hand(photos, emb, person, other):
    """The most alike pair of photos of two people."""
    one, two = (np.flatnonzero(photos.identity == who) for who in (person, other))
    similar = emb[one] @ emb[two].T
    i, j = np.unravel_index(np.argmax(similar), similar.shape)
    return similar.max(), frozenset((photos.keys[one[i]], photos.keys[two[j]]))


def unit(seed, n, d=5):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(4))
def test_hard_impostors_are_the_nearest_photos_of_the_nearest_people(seed):
    photos = made_up(COUNTS)
    emb = unit(seed, len(photos))
    listed = pairs.hard_pairs(photos, 3 * emb, n=1000, cap=50)
    couples = [{key.split("/")[0] for key in two} for two in zip(listed.key_a, listed.key_b, strict=True)]
    assert [len(couple) == 1 for couple in couples] == listed.same.tolist()
    impostors = [frozenset(couple) for couple, same in zip(couples, listed.same, strict=True) if not same]
    assert len(set(impostors)) == len(impostors)
    number = {name: i for i, name in enumerate(photos.people)}
    for a, b, same in zip(listed.key_a, listed.key_b, listed.same, strict=True):
        if not same:
            people = [number[key.split("/")[0]] for key in (a, b)]
            assert by_hand(photos, emb, *people)[1] == {a, b}
    # In the first round whoever is first takes the nearest of all others.
    one = pairs.hard_pairs(made_up([2, 2, 2]), unit(seed, 6), n=2, cap=1)
    [at] = np.flatnonzero(~one.same)
    small = made_up([2, 2, 2])
    first = {str(one.key_a[at]).split("/")[0], str(one.key_b[at]).split("/")[0]}
    ranked = sorted(((by_hand(small, unit(seed, 6), p, q)[0], p, q) for p in range(3) for q in range(p)), reverse=True)
    # Two of the three couples contain the one who chose; the nearest of theirs was taken.
    assert first != {small.people[ranked[-1][1]], small.people[ranked[-1][2]]}


def test_hard_pairs_are_harder_balanced_and_repeatable():
    photos = made_up([3] * 150)
    emb = unit(0, len(photos))
    place = {key: i for i, key in enumerate(photos.keys)}

    def similarity(listed):
        rows = [[place[key] for key in side[~listed.same]] for side in (listed.key_a, listed.key_b)]
        return float(np.einsum("nd,nd->n", emb[rows[0]], emb[rows[1]]).mean())

    listed = pairs.hard_pairs(photos, emb, n=400, cap=4)
    random = pairs.heldout(photos, "train", n=400)
    assert similarity(listed) > similarity(random) + 0.5
    assert listed.same.sum() == (~listed.same).sum() == 200
    load = np.zeros(150, int)
    for key in (*listed.key_a[~listed.same], *listed.key_b[~listed.same]):
        load[photos.identity[place[key]]] += 1
    assert load.max() <= 4
    again = pairs.hard_pairs(photos, emb, n=400, cap=4)
    np.testing.assert_array_equal(again.key_a, listed.key_a)
    assert len({*zip(listed.key_a.tolist(), listed.key_b.tolist(), strict=True)}) == 400


@pytest.mark.parametrize(
    ("emb", "message"),
    [
        (np.ones((3, 2)), r"embedding has shape \(3, 2\) for 20 photos"),
        (np.zeros((20, 2)), "not finite or all zero"),
        (np.full((20, 2), np.nan), "not finite or all zero"),
    ],
)
def test_hard_pairs_need_an_embedding_of_each_photo(emb, message):
    with pytest.raises(ValueError, match=message):
        pairs.hard_pairs(made_up(COUNTS), emb)


def test_embeddings_are_found_by_key_and_missing_ones_named(tmp_path):
    photos = made_up(COUNTS)
    order = np.random.default_rng(0).permutation(len(photos))
    emb = unit(0, len(photos))
    np.savez(tmp_path / "e.npz", embedding=emb[order], key=photos.keys[order])
    np.testing.assert_array_equal(pairs.read_embeddings(tmp_path / "e.npz", photos), emb)
    np.savez(tmp_path / "few.npz", embedding=emb[2:], key=photos.keys[2:])
    with pytest.raises(ValueError, match=f"lacks 2 of the 20 photos of made up: {photos.keys[0]}, {photos.keys[1]}"):
        pairs.read_embeddings(tmp_path / "few.npz", photos)
    np.savez(tmp_path / "object.npz", embedding=np.array([object()]), key=photos.keys[:1])
    with pytest.raises(ValueError, match="is not a file of launch.py embed"):
        pairs.read_embeddings(tmp_path / "object.npz", photos)
    with pytest.raises(FileNotFoundError, match="make it with python launch.py embed"):
        pairs.read_embeddings(tmp_path / "none.npz", photos)


# ---- what is missing ---------------------------------------------------------------------------------------------------


def test_pairs_of_missing_photos_are_named_or_dropped_and_counted():
    photos = made_up([2, 2, 2])
    listed = pairs.Pairs(
        key_a=np.array(["p0000/000", "p0001/000", "p0002/000", "p0000/000", "p0001/001"]),
        key_b=np.array(["p0000/001", "p0001/009", "p0002/001", "p0002/008", "p0002/000"]),
        same=np.array([True, True, True, False, False]),
        fold=np.array([0, 0, 1, 1, 2], np.int32),
    )
    with pytest.raises(ValueError, match=r"2 photos .* p0001/009, p0002/008\..* without 2 pairs: --allow-missing"):
        pairs.present(listed, photos, allow_missing=False)
    kept = pairs.present(listed, photos, allow_missing=True)
    assert kept.lost == (1, 1)
    assert kept.fold.tolist() == [0, 1, 2]
    assert kept.key_b.tolist() == ["p0000/001", "p0002/001", "p0002/000"]
    assert pairs.present(kept, photos, allow_missing=False) is kept
    # Of a list that has lost some already, all are counted.
    fewer = sources.select(photos, photos.keys != "p0002/001")
    assert pairs.present(kept, fewer, allow_missing=True).lost == (2, 1)
    assert pairs.used(kept, photos).tolist() == [True, True, False, True, True, True]
    with pytest.raises(ValueError, match="of 2 pairs 1 have both photos"):
        pairs.present(pairs.Pairs(key_a=listed.key_a[2:4], key_b=listed.key_b[2:4], same=listed.same[2:4]), photos,
                      allow_missing=True)  # fmt: skip


# ---- slices --------------------------------------------------------------------------------------------------------------


def test_slices_are_pairs_of_which_both_sides_have_the_value(tmp_path):
    photos = made_up([2, 2, 2])
    listed = pairs.Pairs(
        key_a=np.array(["p0000/000", "p0001/000", "p0000/000", "p0001/000"]),
        key_b=np.array(["p0000/001", "p0001/001", "p0001/000", "p0002/001"]),
        same=np.array([True, True, False, False]),
    )
    path = tmp_path / "meta.csv"
    path.write_text("\ufeffperson,sex,club\np0000,f,\np0001,f,a\np0002,m,a\n")
    found = pairs.slices(listed, photos, pairs.read_metadata(path))
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "sex=f": [True, True, True, False],
        "club=a": [False, True, False, True],
    }
    path.write_text("key,camera\np0000/000,door\np0000/001,door\np0001/000,phone\n")
    found = pairs.slices(listed, photos, pairs.read_metadata(path))
    assert {name: mask.tolist() for name, mask in found.items()} == {"camera=door": [True, False, False, False]}
    path.write_text("key,camera\nelsewhere,door\n")
    with pytest.raises(ValueError, match="no pair has both sides in the metadata"):
        pairs.slices(listed, photos, pairs.read_metadata(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,sex\n", "columns are name, sex; expected key"),
        ("key,person,sex\n", "expected key"),
        ("person\nann\n", "columns are person; expected"),
        ("", "columns are none"),
        ("person,sex\nann,f\nann,m\n", "line 3: person is 'ann': given before"),
        ("person,sex\n,f\n", "line 2: person is '': empty"),
    ],
)
def test_malformed_metadata_names_the_line(tmp_path, text, message):
    (tmp_path / "meta.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        pairs.read_metadata(tmp_path / "meta.csv")


# ---- verify --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """400 people of three photos: a person's own noise with a photo's own."""
    folder = tmp_path_factory.mktemp("data") / "album"
    for person in range(400):
        (folder / f"p{person:03d}").mkdir(parents=True)
        base = np.random.default_rng(person).integers(40, 215, (8, 8, 3))
        for photo in range(3):
            noise = np.random.default_rng((person, photo)).integers(-250, 250, (8, 8, 3))
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(
                folder / f"p{person:03d}" / f"{photo}.png"
            )
    return folder


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """`launch.py verify` with a fake checkpoint whose embeddings are pixels."""
    from faceembed import config
    from faceembed.cli import verify

    class Embedder:
        path, size = Path("runs/fake/checkpoints/000001"), 8
        data: typing.ClassVar = {"source": "elsewhere", "people_hashes": []}
        config: typing.Any = None
        preprocess = Preprocess(size=16)

        def __call__(self, images, batch=256):
            x = images.reshape(len(images), -1) - np.float32(127.5)
            return x / np.linalg.norm(x, axis=1, keepdims=True)

        def layers(self, images, names, batch=256):
            return {name: images.reshape(len(images), -1)[:, :24].astype(np.float32) for name in names}

    Embedder.config = config.Experiment(seed=7)
    monkeypatch.setattr(verify, "load", lambda checkpoint: Embedder())

    def run(*arguments):
        verify.run(
            ["runs/fake", "--json", str(tmp_path / "results.json"), "--no-progress", "--draws", "50",
             "--data-dir", str(tmp_path / "cache"), *arguments]
        )  # fmt: skip
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_every_photo_against_every_other(album, verify, capsys, tmp_path):
    got = verify("--pairs", f"all:heldout:folder:{album}", "--heads", "threshold", "logistic_abs@early",
                 "--out", str(tmp_path / "out"))  # fmt: skip
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path)
    people = int((splits.split_of(photos.people) == "report").sum())
    dense = got["all_pairs"]
    assert (dense["n_people"], dense["n_images"], dense["n_genuine"]) == (people, 3 * people, 3 * people)
    assert dense["n_impostor"] == 9 * people * (people - 1) // 2
    assert got["fit"] == f"heldout:folder:{album}"
    resolved = [p["fmr"] for p in dense["heads"]["threshold"]["tar"] if p["resolution"]["status"] != "unresolvable"]
    assert resolved == [0.01]
    # Thresholds were set on the calibrate people and reported apart.
    moved = dense["heads"]["logistic_abs@early"]["transferred"]
    assert [p["target"] for p in moved] == [0.01]
    assert 0 < moved[0]["fmr"] < 0.1
    assert "thresholds set on all pairs of its photos" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="figure-everyone-roc"' in page
    assert 'id="false-matches"' in page
    with pytest.raises(ValueError, match="--parity is for lists of pairs"):
        verify("--pairs", f"all:heldout:folder:{album}", "--parity")


def test_a_list_with_slices_clusters_refits_and_parity(album, verify, capsys, tmp_path):
    rows = [f"p{i:03d},{'even' if i % 2 == 0 else 'odd'}" for i in range(400)]
    (tmp_path / "meta.csv").write_text("person,parity\n" + "\n".join(rows) + "\n")
    spec = f"folder:{album}"
    got = verify("--pairs", f"heldout:{spec}", "--fit", f"{spec}:calibrate", "--refit", "3", "--parity", "--clusters", "2",
                 "--slices", str(tmp_path / "meta.csv"), "--primary", "auc")  # fmt: skip
    usual = verify("--pairs", f"heldout:{spec}", "--primary", "auc")
    for head, result in got["results"]["heads"].items():
        same = usual["results"]["heads"][head]
        assert (result["accuracy"], result["fitted"]) == (same["accuracy"], same["fitted"])
        widths = [found["interval"]["high"] - found["interval"]["low"] for found in (result, same)]
        assert widths[0] > widths[1] if head == "logistic_abs" else widths[0] >= widths[1]
    assert got["results"]["refits"] == 3
    assert got["results"]["primary"] == "auc"
    names = [part["name"] for part in got["slices"]]
    assert names[:3] == ["all", "parity=even", "parity=odd"]
    assert sum(name.startswith("cluster") for name in names) >= 1
    assert 0.5 < got["parity"]["accuracy"] <= 1
    told = capsys.readouterr().out
    assert "points of AUC" in told
    assert "population standard deviation" in told


def test_hard_pairs_by_name(album, verify, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path)
    np.savez(tmp_path / "other.npz", embedding=unit(0, len(photos)), key=photos.keys)
    got = verify("--pairs", f"hard:{tmp_path / 'other.npz'}@heldout:folder:{album}", "--heads", "threshold")
    assert got["fit"] == f"heldout:folder:{album}"
    assert got["results"]["n_genuine"] == got["results"]["n_impostor"]


def test_missing_photos_end_verify_unless_they_may_be_missing(album, verify, capsys, tmp_path):
    lines = ["a,b,same,fold"]
    for i in range(40):
        lines.append(f"{album}/p{i:03d}/0.png,{album}/p{i:03d}/1.png,1,{i % 4}")
        lines.append(f"{album}/p{i:03d}/0.png,{album}/p{(i + 4) % 40:03d}/2.png,0,{i % 4}")
    lines.append(f"{album}/p050/0.png,{album}/p050/7.png,1,0")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(FileNotFoundError, match=r"7\.png.*--allow-missing"):
        verify("--pairs", f"csv:{tmp_path / 'list.csv'}")
    got = verify("--pairs", f"csv:{tmp_path / 'list.csv'}", "--allow-missing")
    assert got["lost"] == [1, 0]
    assert got["results"]["n_genuine"] == 40
    assert "1 genuine and 0 impostor pairs were left out" in capsys.readouterr().out

    # And one that is cut off: it is there, and does not decode.
    broken = tmp_path / "broken.png"
    broken.write_bytes((album / "p051" / "0.png").read_bytes()[:200])
    (tmp_path / "list.csv").write_text("\n".join([*lines, f"{broken},{album}/p052/1.png,0,1"]) + "\n")
    (tmp_path / "whole.csv").write_text("\n".join([*lines[:-1], f"{broken},{album}/p052/1.png,0,1"]) + "\n")
    with pytest.raises(
        ValueError, match=r"(?s)1 photo of .* cannot be decoded:.*broken\.png.*without them.*--allow-missing"
    ):
        verify("--pairs", f"csv:{tmp_path / 'whole.csv'}")
    left = verify("--pairs", f"csv:{tmp_path / 'list.csv'}", "--allow-missing")
    assert left["lost"] == [1, 1]
    assert left["results"]["heads"] == got["results"]["heads"]
    told = capsys.readouterr().out
    assert f"1 photo of csv:{tmp_path / 'list.csv'} that cannot be decoded, left out:\n  {broken}" in told
    assert "1 genuine and 1 impostor pairs were left out" in told


def test_broken_photos_are_left_out_of_all_pairs_and_of_those_heads_are_fitted_on(album, verify, capsys, monkeypatch):
    open_source = sources.open_source
    whole = open_source(f"folder:{album}", data_dir=album.parent)
    part = splits.split_of(whole.people)[whole.identity]
    broken = [str(whole.keys[part == half][at]) for half, at in (("report", 5), ("report", 40), ("calibrate", 3))]

    def with_broken_ones(*arguments, **options):
        photos = open_source(*arguments, **options)

        def read(index):
            if photos.keys[index] in broken:
                raise OSError(f"{photos.keys[index]} is broken")
            return photos.read(index)

        return dataclasses.replace(photos, read=read)

    monkeypatch.setattr(sources, "open_source", with_broken_ones)
    monkeypatch.setattr(evaluate, "CHUNK", 10)  # all are named, whatever is embedded together
    asked = ("--pairs", f"all:heldout:folder:{album}", "--heads", "threshold")
    with pytest.raises(ValueError, match="cannot be decoded") as error:
        verify(*asked)
    assert all(f"  {key} is broken" in str(error.value) for key in broken)
    assert str(error.value).endswith("go on without them and their pairs: --allow-missing.")
    capsys.readouterr()

    got = verify(*asked, "--allow-missing")
    people = int((splits.split_of(whole.people) == "report").sum())
    dense = got["all_pairs"]
    assert (dense["n_people"], dense["n_images"], dense["n_genuine"]) == (people, 3 * people - 2, 3 * people - 4)
    assert got["lost"] == [4, 9 * people * (people - 1) // 2 - dense["n_impostor"]]
    assert got["fit_lost"][0] >= 1
    told = capsys.readouterr().out
    assert f"WARNING: 4 genuine and {got['lost'][1]} impostor pairs were left out" in told
    assert (
        f"WARNING: {got['fit_lost'][0]} genuine and {got['fit_lost'][1]} impostor pairs that heads are fitted on"
        in told
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", "all:lfw:view2"), "none of all:lfw:dev_train, all:lfw:dev_test"),
        (("--pairs", "heldout:folder:x", "--heads", "magic"), "no head 'magic'"),
        (("--pairs", "heldout:folder:x", "--heads", "threshold@"), "no head 'threshold@'"),
        (("--pairs", "all:folder:{album}"), "nothing is left to fit heads on"),
        (("--pairs", "heldout:folder:{album}", "--fit", "all:folder:{album}"), "fitted on lists of pairs"),
        (
            ("--pairs", "heldout:folder:{album}", "--primary", "f1"),
            "primary is 'f1': declare one of accuracy, auc, tar@0.1",
        ),
    ],
)
def test_what_verify_cannot_do_is_told_with_what_to_type(album, verify, arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(*(argument.format(album=album) for argument in arguments))


def test_lfws_people_make_the_pairs_that_are_known(real_data):
    """24,620 genuine and 6.85 million impostor pairs of 1,711 people."""
    _, counts, _ = pairs.read_lfw_people(real_data / "lfw" / "peopleDevTest.txt")
    n = counts.astype(np.int64)
    assert (n * (n - 1) // 2).sum() == 24_620
    assert (n.sum() ** 2 - (n * n).sum()) // 2 == 6_848_158
