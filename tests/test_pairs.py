"""Verification lists: official formats, one's own, and pairs drawn among held-out people."""

import collections
import hashlib
import itertools
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed.data import pairs, sources, splits
from faceembed.preprocess import Preprocess

VIEW2 = """2\t2
Ann_Lee\t1\t12
Bo\t1\t2
Ann_Lee\t3\tBo\t1
Cy\t1\tBo\t2
Dee\t1\t2
Dee\t1\t3
Dee\t1\tEd\t1
Ed\t2\tFay_X\t123
"""


def made_up(counts, prefix="p"):
    people = np.array(sorted(f"{prefix}{person:04d}" for person in range(len(counts))))
    identity = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    keys = np.array([f"{people[i]}/{n:03d}" for i, count in enumerate(counts) for n in range(count)])
    return sources.Photos(
        source="made up", keys=keys, identity=identity, people=people, read=lambda index: None, square=None,
        problems=(), fingerprint="",
    )  # fmt: skip


def test_view_2_comes_in_folds(tmp_path):
    (tmp_path / "pairs.txt").write_text(VIEW2)
    listed = pairs.read_lfw_pairs(tmp_path / "pairs.txt")
    assert listed.same.tolist() == [True, True, False, False] * 2
    assert listed.fold.tolist() == [0] * 4 + [1] * 4
    assert listed.key_a.tolist()[:4] == ["Ann_Lee/Ann_Lee_0001", "Bo/Bo_0001", "Ann_Lee/Ann_Lee_0003", "Cy/Cy_0001"]
    assert listed.key_b.tolist()[:4] == ["Ann_Lee/Ann_Lee_0012", "Bo/Bo_0002", "Bo/Bo_0001", "Bo/Bo_0002"]
    assert listed.key_b[-1] == "Fay_X/Fay_X_0123"


def test_view_1_has_none(tmp_path):
    (tmp_path / "dev.txt").write_text("1\nAnn_Lee\t1\t2\nAnn_Lee\t2\tBo\t1\n\n")
    listed = pairs.read_lfw_pairs(tmp_path / "dev.txt")
    assert listed.fold is None
    assert listed.same.tolist() == [True, False]
    assert (listed.key_a[1], listed.key_b[1]) == ("Ann_Lee/Ann_Lee_0002", "Bo/Bo_0001")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: '' is no count"),
        ("Ann 1 2\n", "line 1: 'Ann 1 2' is no count"),
        ("1\nAnn\t1\t2\n", "has 1 pairs where line 1 promises 2"),
        ("1\nAnn\t1\tBo\t2\nAnn\t1\tBo\t1\n", "line 2: 'Ann 1 Bo 2' is not of the form name i j"),
        ("1\nAnn\t1\t2\nAnn\tx\tBo\t1\n", "line 3: 'Ann x Bo 1' is not of the form name1 i name2 j"),
    ],
)
def test_malformed_lfw_pairs_name_the_line(text, message, tmp_path):
    (tmp_path / "dev.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        pairs.read_lfw_pairs(tmp_path / "dev.txt")


def test_people_lists(tmp_path):
    (tmp_path / "people.txt").write_text("2\n2\nAnn_Lee\t4\nBo\t1\n1\nCy\t2\n")
    people, photos, fold = pairs.read_lfw_people(tmp_path / "people.txt")
    assert (people.tolist(), photos.tolist(), fold.tolist()) == (["Ann_Lee", "Bo", "Cy"], [4, 1, 2], [0, 0, 1])
    (tmp_path / "dev.txt").write_text("2\nAnn_Lee\t4\nBo\t1\n")
    people, photos, fold = pairs.read_lfw_people(tmp_path / "dev.txt")
    assert (people.tolist(), photos.tolist(), fold) == (["Ann_Lee", "Bo"], [4, 1], None)
    bad = {"2\nAnn\t1\n": "line 3: found 'the end", "1\nAnn\n": "line 2", "1\nA\t1\nB\t1\n": "line 3"}
    for text, message in bad.items():
        (tmp_path / "dev.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            pairs.read_lfw_people(tmp_path / "dev.txt")


def test_resolve_finds_photos_and_names_what_is_missing():
    photos = made_up([3, 2, 1])
    same = np.array([True, False])
    key_a, key_b = np.array(["p0000/002", "p0001/001"]), np.array(["p0000/000", "p0002/000"])
    listed = pairs.Pairs(key_a=key_a, key_b=key_b, same=same)
    a, b = pairs.resolve(listed, photos)
    assert (a.tolist(), b.tolist(), a.dtype) == ([2, 4], [0, 5], np.int32)
    gone = pairs.Pairs(key_a=np.array(["p0000/002", "x/1"]), key_b=np.array(["y/2", "x/1"]), same=same)
    with pytest.raises(ValueError, match="2 photos of the pairs are not in made up: x/1, y/2"):
        pairs.resolve(gone, photos)
    swapped = pairs.Pairs(key_a=listed.key_a, key_b=listed.key_b, same=~same)
    with pytest.raises(ValueError, match=r"2 pairs contradict made up, first p0000/002 and p0000/000.*two people"):
        pairs.resolve(swapped, photos)
    with pytest.raises(ValueError, match="different lengths"):
        pairs.Pairs(key_a=np.array(["a"]), key_b=np.array(["b"]), same=same)


@pytest.mark.parametrize("split", list(splits.SHARES))
def test_heldout_pairs_are_balanced_true_and_of_the_split_alone(split):
    photos = made_up(np.random.default_rng(0).integers(1, 6, 600))
    drawn = pairs.heldout(photos, split, n=60)
    a, b = pairs.resolve(drawn, photos)
    assert drawn.same.sum() == 30
    assert len(drawn) == 60
    part = splits.split_of(photos.people)
    assert set(part[photos.identity[np.concatenate([a, b])]]) == {split}
    assert len({tuple(sorted(pair)) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == 60
    assert np.all(a != b)


def test_heldout_weighs_people_not_pairs():
    counts = np.full(2000, 2)
    photos = made_up(counts)
    held = np.flatnonzero(splits.split_of(photos.people) == "report")
    counts[held[0]] = 200  # a person with 19,900 genuine pairs
    counts[held[1:6]] = 6
    photos = made_up(counts)
    drawn = pairs.heldout(photos, "report", n=10_000, cap=10)
    a, b = pairs.resolve(drawn, photos)
    genuine = collections.Counter(photos.identity[a[drawn.same]].tolist())
    assert set(genuine) == set(held.tolist())
    assert genuine[held[0]] == 10
    assert genuine[held[1]] == 10
    assert genuine[held[7]] == 1
    impostor = collections.Counter(photos.identity[np.concatenate([a[~drawn.same], b[~drawn.same]])].tolist())
    assert impostor[held[0]] <= 3 * np.median(list(impostor.values()))

    # Where fewer are asked for than people have, nobody gives a second before everybody has given one.
    fewer = pairs.heldout(photos, "report", n=2 * len(held))
    a, _ = pairs.resolve(fewer, photos)
    assert set(collections.Counter(photos.identity[a[fewer.same]].tolist()).values()) == {1}


def test_heldout_depends_on_the_seed_alone():
    photos = made_up([3] * 800)
    first, again, other = (pairs.heldout(photos, "select", seed=seed, n=50) for seed in (1, 1, 2))
    assert first.key_a.tolist() == again.key_a.tolist()
    assert first.key_b.tolist() == again.key_b.tolist()
    assert first.key_a.tolist() != other.key_a.tolist()


@pytest.mark.parametrize("split", ["select", "report"])
def test_heldout_of_a_part_is_heldout_of_the_whole(split):
    photos = sources.open_source("synthetic", people=300, photos=5)
    part = sources.select(photos, (splits.split_of(photos.people) == split)[photos.identity])
    whole, alone = pairs.heldout(photos, split, n=200), pairs.heldout(part, split, n=200)
    np.testing.assert_array_equal(whole.key_a, alone.key_a)
    np.testing.assert_array_equal(whole.key_b, alone.key_b)


@pytest.mark.parametrize(
    ("split", "n", "cap", "digest"),
    [
        ("select", 20, 10, "1f82b2ebdbad"),  # fewer than there are people
        ("train", 4000, 2, "b12483659b29"),
        ("report", 4000, 10, "a17564b8402f"),  # everybody's, again and again
        ("report", 100_000, 1000, "96b00211dba8"),
    ],
)
def test_heldout_never_changes(split, n, cap, digest):
    """Written down once: the best checkpoint of a run, and every table, is of these pairs."""
    drawn = pairs.heldout(made_up((np.arange(3000) * 7919 % 1000) ** 3 * 30 // 999**3 + 1), split, n=n, cap=cap)
    text = "|".join([*drawn.key_a.tolist(), *drawn.key_b.tolist()])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest


def test_pairs_of_people_who_give_none_are_not_listed(monkeypatch):
    asked, triu = [], np.triu_indices
    monkeypatch.setattr(np, "triu_indices", lambda n, k: asked.append(n) or triu(n, k))
    pairs.heldout(made_up([3] * 1000), "train", n=40)
    assert len(asked) == 20


def test_heldout_of_a_small_set_finds_its_few_pairs_or_says_why_not():
    names = [name for name in (f"p{i:04d}" for i in range(200)) if splits.split_of([name])[0] == "report"][:2]
    photos = made_up([2] * 200)
    small = sources.select(photos, np.isin(photos.people, names)[photos.identity])
    drawn = pairs.heldout(small, "report", n=100)
    assert len(drawn) == 4
    # Six genuine pairs, but only four photos to make impostor pairs with one other photo.
    counts = np.where(photos.people == names[0], 4, 1)
    lopsided = made_up(counts)
    lopsided = sources.select(lopsided, np.isin(lopsided.people, names)[lopsided.identity])
    drawn = pairs.heldout(lopsided, "report", n=100)
    assert (drawn.same.sum(), len(drawn)) == (4, 8)
    with pytest.raises(ValueError, match="calibrate people of made up make no balanced pairs: 0 people"):
        pairs.heldout(small, "calibrate")
    with pytest.raises(ValueError, match="split is 'test'"):
        pairs.heldout(small, "test")


@pytest.fixture
def album(tmp_path):
    for number, name in enumerate(("anna1", "anna2", "anna3", "bob1", "bob2", "cy")):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_list_of_ones_own(album):
    (album / "list.csv").write_text(
        "\ufeffa,b,same,fold\nanna1.png,anna2.png,1,0\nanna3.png,anna2.png,TRUE,1\nbob2.png,bob1.png,1,0\n"
        "anna1.png,bob1.png,0,1\ncy.png,anna3.png,false,0\n"
    )
    listed, photos = pairs.load_pairs(f"csv:{album / 'list.csv'}")
    assert listed.same.tolist() == [True, True, True, False, False]
    assert listed.fold.tolist() == [0, 1, 0, 1, 0]
    a, b = pairs.resolve(listed, photos)
    # Genuine pairs join anna1, anna2 and anna3.
    assert sorted(np.bincount(photos.identity).tolist()) == [1, 2, 3]
    assert [photos.read(index)[0, 0, 0] // 20 for index in itertools.chain(*zip(a, b, strict=True))] == [
        0, 1, 2, 1, 4, 3, 0, 3, 5, 2,
    ]  # fmt: skip


def test_a_list_may_name_its_people(album):
    (album / "list.csv").write_text(
        "a,b,same,person_a,person_b\nanna1.png,anna2.png,1,Anna,Anna\nanna3.png,bob1.png,0,Anna,Bob\n"
    )
    listed, photos = pairs.read_csv(album / "list.csv")
    a, b = pairs.resolve(listed, photos)
    assert photos.named
    assert photos.people[photos.identity[a]].tolist() == ["Anna", "Anna"]
    assert photos.people[photos.identity[b]].tolist() == ["Anna", "Bob"]
    assert sources.select(photos, photos.identity == 1).named
    (album / "list.csv").write_text("a,b,same\nanna1.png,anna2.png,1\n")
    _, photos = pairs.read_csv(album / "list.csv")
    assert not photos.named
    assert not sources.select(photos, photos.identity == 0).named


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a,b,same,person_a\n", ValueError, "person_a and person_b come together"),
        (
            "a,b,same,person_a,person_b\nanna1.png,anna2.png,1,Anna,Bob\n",
            ValueError,
            "line 2: same is '1', but the people are 'Anna' and 'Bob'",
        ),
        ("a,b,same,person_a,person_b\nanna1.png,anna2.png,0,A,A\n", ValueError, "line 2: same is '0'"),
        (
            "a,b,same,person_a,person_b\nanna1.png,anna2.png,0,A,\n",
            ValueError,
            "line 2: person_b is '': expected a name",
        ),
        (
            "a,b,same,person_a,person_b\nanna1.png,anna2.png,1,A,A\nbob1.png,anna1.png,1,B,B\n",
            ValueError,
            "line 3: person_b is 'B': anna1.png is A in line 2",
        ),
        ("x,y,same\n", ValueError, "line 1: columns are x, y, same; expected a,b,same"),
        ("a,b,same\n", ValueError, "has no pair"),
        ("a,b,same\nanna1.png,anna2.png,yes\n", ValueError, "line 2: same is 'yes'"),
        ("a,b,same\nanna1.png\n", ValueError, "line 2"),
        ("a,b,same,fold\nanna1.png,anna2.png,1,first\n", ValueError, "line 2: fold is 'first'"),
        ("a,b,same\nanna1.png,gone.png,1\n", FileNotFoundError, "gone.png"),
        (
            "a,b,same\nanna1.png,anna2.png,1\nanna2.png,anna3.png,1\nanna3.png,anna1.png,0\n",
            ValueError,
            "line 4: anna3.png and anna1.png are two people here, but genuine pairs join them",
        ),
    ],
)
def test_malformed_lists_name_the_line(album, text, error, message):
    (album / "list.csv").write_text(text)
    with pytest.raises(error, match=message):
        pairs.read_csv(album / "list.csv")


@pytest.mark.parametrize("spec", ["lfw", "lfw:view3", "csv:", "view1_test", "heldout:"])
def test_unknown_lists_are_answered_with_the_known(spec, tmp_path):
    with pytest.raises(
        ValueError, match="none of lfw:view1_train, lfw:view1_test, lfw:view2, csv:FILE, bin:FILE, heldout:"
    ):
        pairs.load_pairs(spec, data_dir=tmp_path)


def test_heldout_synthetic_takes_the_renderers_options_and_draws_the_list_of_the_final_table(tmp_path):
    drawn = {"people": 150, "photos": 3, "seed": 5, "size": 32}
    listed, photos = pairs.load_pairs("heldout:synthetic", split="report", n=8, **drawn)
    own = sources.open_source("synthetic", **drawn)
    assert photos.fingerprint == own.fingerprint
    part = sources.select(own, (splits.split_of(own.people) == "report")[own.identity])
    expected = pairs.heldout(part, "report", seed=0, n=8)
    assert listed.key_a.tolist() == expected.key_a.tolist()
    assert listed.key_b.tolist() == expected.key_b.tolist()
    with pytest.raises(ValueError, match="pairs 'csv:list.csv' take no options, got seed"):
        pairs.load_pairs("csv:list.csv", seed=3)


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """`launch.py verify` with a fake checkpoint whose embeddings are pixels: arguments → what was written."""
    from faceembed import config
    from faceembed.cli import verify
    from faceembed.evaluate import person_hash

    class Embedder:
        path, size = Path("runs/fake/checkpoints/000001"), 16
        data: typing.ClassVar = {"source": "synthetic", "people_hashes": [person_hash("Anna")]}
        config: typing.Any = None
        preprocess = Preprocess(size=16)

        def __call__(self, images, batch=256):
            vectors = images.reshape(len(images), -1) - np.float32(127.5)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    Embedder.config = config.Experiment(seed=7, data=config.Data(source="synthetic", people=150, photos=3))
    embedder = Embedder()
    monkeypatch.setattr(verify, "load", lambda checkpoint: embedder)

    def run(*arguments):
        verify.run(
            ["runs/fake", "--heads", "threshold", "--json", str(tmp_path / "results.json"), "--no-progress",
             "--data-dir", str(tmp_path / "cache"), *arguments]
        )  # fmt: skip
        return json.loads((tmp_path / "results.json").read_text())

    run.embedder = embedder
    return run


@pytest.fixture
def opened(monkeypatch):
    """The photos that verify embeds, tested ones first."""
    from faceembed import evaluate

    seen, real = [], evaluate.embed_pairs

    def embed_pairs(embedder, photos, listed, **options):
        seen.append(photos)
        return real(embedder, photos, listed, **options)

    monkeypatch.setattr(evaluate, "embed_pairs", embed_pairs)
    return seen


@pytest.fixture
def named_list(tmp_path):
    """Pairs in two folds, of photos of two sizes, with columns that name the people."""
    rng = np.random.default_rng(0)
    lines = ["a,b,same,fold,person_a,person_b"]
    for fold, (one, other) in enumerate((("Anna", "Bob"), ("Cy", "Dee"))):
        for name in (one, other):
            base = rng.integers(0, 255, (5, 5, 3), np.uint8)
            for photo, size in enumerate(((89, 109), (178, 218))):
                Image.fromarray(base).resize(size).save(tmp_path / f"{name}{photo}.png")
        lines += [f"{name}0.png,{name}1.png,1,{fold},{name},{name}" for name in (one, other)]
        lines += [f"{one}{i}.png,{other}{j}.png,0,{fold},{one},{other}" for i, j in ((0, 0), (1, 1))]
    (tmp_path / "named.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "unnamed.csv").write_text("\n".join(line.rsplit(",", 2)[0] for line in lines) + "\n")
    return tmp_path


def test_verify_tells_who_was_trained_on_or_that_nobody_could_check(named_list, verify, capsys):
    nobody = "the list names no people: nobody could check that none was trained on"
    warnings = " ".join(verify("--pairs", f"csv:{named_list / 'unnamed.csv'}")["results"]["warnings"])
    assert nobody in warnings
    assert nobody in capsys.readouterr().out
    warnings = " ".join(verify("--pairs", f"csv:{named_list / 'named.csv'}")["results"]["warnings"])
    assert nobody not in warnings
    assert "1 of 4 tested people" in warnings
    assert "Anna" in warnings


def test_verify_frames_each_photo_by_its_width(named_list, verify, opened):
    assert verify("--pairs", f"csv:{named_list / 'named.csv'}", "--framing", "celeba")["framing"] == "celeba"
    assert [opened[0].square(width).side for width in (89, 178)] == [64, 128]
    with pytest.raises(ValueError, match="synthetic brings its own square"):
        verify("--pairs", "heldout:synthetic", "--framing", "celeba")


def test_verify_counts_faces_of_tested_photos_and_of_those_heads_are_fitted_on_each_by_itself(
    named_list, verify, monkeypatch, capsys
):
    from faceembed.data import align, crops

    def detect(photo, **_):
        landmarks = crops.LANDMARKS["centerface"]["dlib"] * 60 + [8, 12]
        return [align.Face(box=np.array([5.0, 5, 70, 80]), landmarks=landmarks, score=0.9)] * (photo.shape[1] == 89)

    monkeypatch.setattr(align, "detect", detect)
    monkeypatch.setitem(crops.DETECTORS, "centerface", detect)
    monkeypatch.setattr(verify.embedder, "preprocess", Preprocess(template="dlib", size=16))
    header, *lines = (named_list / "named.csv").read_text().splitlines()
    (named_list / "test.csv").write_text(
        "\n".join([header, *(line for line in lines if ",0,A" in line or ",0,B" in line)])
    )
    found = verify("--pairs", f"csv:{named_list / 'test.csv'}", "--fit", f"csv:{named_list / 'named.csv'}",
                   "--allow-shared")["alignment"]  # fmt: skip
    assert {name: (tally["photos"], tally["missed"]) for name, tally in found.items()} == {
        "tested": (4, 2), "fitted on": (8, 4)
    }  # fmt: skip
    assert "tested: a face was looked for in 4 photos by centerface; none in 2 (first " in capsys.readouterr().out


def test_verify_draws_the_checkpoints_own_synthetic_people(verify, opened):
    verify("--pairs", "heldout:synthetic")
    own = sources.open_source("synthetic", people=150, photos=3, seed=7, size=16)
    assert [photos.fingerprint for photos in opened] == [own.fingerprint] * 2


def test_verify_tells_what_was_odd_once(tmp_path, verify, capsys):
    for person in range(120):
        (tmp_path / "album" / f"p{person:03d}").mkdir(parents=True)
        for photo in range(2):
            colours = np.random.default_rng(2 * person + photo).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(colours).save(tmp_path / "album" / f"p{person:03d}" / f"{photo}.png")
    (tmp_path / "album" / "p000" / "bad.png").write_text("not an image")
    verify("--pairs", f"heldout:folder:{tmp_path / 'album'}")
    assert capsys.readouterr().out.count("1 × corrupt image, first ") == 1


def test_heldout_by_name_comes_with_its_photos(tmp_path):
    for person in range(120):
        (tmp_path / "album" / f"p{person:03d}").mkdir(parents=True)
        for photo in range(2):
            colour = (person, 100 * photo, 7)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "album" / f"p{person:03d}" / f"{photo}.png")
    drawn, photos = pairs.load_pairs(f"heldout:folder:{tmp_path / 'album'}", data_dir=tmp_path, split="calibrate", n=6)
    a, _ = pairs.resolve(drawn, photos)
    assert set(splits.split_of(photos.people[photos.identity[a]])) == {"calibrate"}
    assert len(drawn) == 6


def test_the_official_lists(real_data):
    train = pairs.read_lfw_pairs(real_data / "lfw" / "pairsDevTrain.txt")
    test = pairs.read_lfw_pairs(real_data / "lfw" / "pairsDevTest.txt")
    assert (len(train), train.same.sum(), len(test), test.same.sum()) == (2200, 1100, 1000, 500)

    def people(listed):
        return {key.split("/")[0] for key in (*listed.key_a, *listed.key_b)}

    assert not people(train) & people(test)
    for name, expected in (("peopleDevTrain.txt", (4038, 9525)), ("peopleDevTest.txt", (1711, 3708))):
        names, photos, _ = pairs.read_lfw_people(real_data / "lfw" / name)
        assert (len(names), photos.sum()) == expected
