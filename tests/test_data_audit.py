"""`launch.py data audit` on photos that can be told by their pixels, and `train --data.exclude` that uses what it wrote."""

import csv
import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed.audit import copies as twins
from faceembed.audit import findings as rules
from faceembed.audit import labels as maths
from faceembed.cli import data as cli
from faceembed.data import sources
from faceembed.preprocess import Preprocess

HOSTILE = "<img src=x onerror=alert(1)>"


def smooth(rng, size=64):
    """A picture with edges at many scales, float [s, s, 3] in 0..1."""
    picture = np.zeros((size, size, 3))
    for cells in (3, 5, 9, 17):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        picture += np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), float) / 255 / np.sqrt(cells)
    return (picture - picture.min()) / (picture.max() - picture.min())


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """60 people of 5 photos, each a picture of theirs mixed with one of its own; some things are wrong.

    p07/4 shows p30. p10/4 is p10/0 again, smaller and compressed. p20/0 is p40/0 mirrored. One name is hostile.
    """
    root = tmp_path_factory.mktemp("audit") / "album"
    rng = np.random.default_rng(0)
    faces = [smooth(rng) for _ in range(60)]
    names = [f"p{i:02d}" if i != 55 else HOSTILE.replace("/", "") for i in range(60)]

    def photo(person):
        return Image.fromarray((255 * (0.7 * faces[person] + 0.3 * smooth(rng))).astype(np.uint8))

    made = {(person, number): photo(person) for person in range(60) for number in range(5)}
    made[7, 4] = photo(30)
    made[10, 4] = made[10, 0].resize((44, 44))
    made[20, 0] = made[40, 0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for (person, number), picture in made.items():
        (root / names[person]).mkdir(parents=True, exist_ok=True)
        suffix = "jpg" if (person, number) == (10, 4) else "png"
        picture.save(root / names[person] / f"{number}.{suffix}")
    return root


class Pixels:
    """A checkpoint whose embeddings are coarse pixels; mirror images have one embedding, as with flip fusion."""

    path, size, fingerprint = Path("runs/pixels/checkpoints/000001"), 64, "a" * 64
    data: typing.ClassVar = {"source": "elsewhere", "people_hashes": []}
    preprocess = Preprocess(size=64)

    def __call__(self, images, batch=256):
        coarse = images.reshape(len(images), 8, 8, 8, 8, 3).mean(axis=(2, 4))
        both = (coarse + coarse[:, :, ::-1]).reshape(len(images), -1)
        return (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def audit(album, tmp_path, monkeypatch):
    """The command: flags → the report."""
    monkeypatch.setattr("faceembed.cli.embed.load", lambda checkpoint: Pixels())

    def run(*flags):
        cli.run(["audit", f"folder:{album}", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json"),
                 "--data-dir", str(tmp_path / "cache"), "--no-progress", *flags])  # fmt: skip
        return json.loads((tmp_path / "found.json").read_text())

    return run


def of_kind(report, kind):
    return [row for row in report["findings"] if row["kind"] == kind]


def test_what_was_planted_is_found_and_written(audit, album, tmp_path, capsys):
    report = audit()
    first = of_kind(report, "looks like somebody else")[0]
    assert (first["photo"], first["person"], first["other_person"]) == ("p07/4", "p07", "p30")
    assert [(row["photo"], row["other_photo"]) for row in of_kind(report, "copy in one folder")] == [("p10/0", "p10/4")]
    assert [(row["photo"], row["other_photo"]) for row in of_kind(report, "copy in two folders")] == [
        ("p20/0", "p40/0")
    ]
    assert not of_kind(report, "one person in two folders")
    assert not of_kind(report, "two people in one folder")
    assert report["found"]["copies-in-two-folders"] == 1

    out = tmp_path / "out"
    left_out = (out / "exclude.txt").read_text().splitlines()
    assert left_out == report["exclude"]
    assert {"p07/4", "p10/4"} <= set(left_out)
    assert not {"p10/0", "p40/0"} & set(left_out)
    with open(out / "audit.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["photo"], row["rank"]) for row in rows] == [
        (row["kind"], row["photo"], str(row["rank"])) for row in report["findings"]
    ]
    printed = capsys.readouterr().out
    assert "300 photos of 60 people, by the embeddings of runs/pixels/checkpoints/000001" in printed
    assert f"{len(left_out)} photos to train without" in printed


def test_the_page_shows_each_finding_escaped_and_marked(audit, tmp_path):
    report = audit("--shown", "3")
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    for text in ("p07/4", "p20/0 and p40/0", "mirrored", "to p30 "):
        assert text in page
    suspects = page.split('<figure class="suspect">')[1:]
    assert 'alt="p07/4"' in suspects[0].split("</figure>")[0]
    cases = page.split('<section id="looks-like-somebody-else">')[1].split("</section>")[0].count("<article")
    assert cases == min(3, report["found"]["looks-like-somebody-else"])
    # The folder beside the doubted photo does not hold that photo again.
    case = page.split("<article")[1]
    assert case.count('alt="p07/4"') == 1
    assert all(f'alt="p07/{number}"' in case for number in range(4))
    assert "the other 4 photos" in case
    assert "p30: 4 of 5 photos" in case


def test_embeddings_of_a_file_are_those_of_the_checkpoint(audit, album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    emb = Pixels()(np.stack([np.asarray(Image.fromarray(photos.read(i)).resize((64, 64))) for i in range(len(photos))]))
    shuffled = np.random.default_rng(0).permutation(len(photos))
    file = tmp_path / "e.npz"
    np.savez(file, embedding=emb[shuffled], key=photos.keys[shuffled], checkpoint="a" * 64)
    kinds = ("looks like somebody else", "copy in one folder", "copy in two folders")
    with_file, without = audit("--embeddings", str(file)), audit()
    for kind in kinds:
        assert [row["photo"] for row in of_kind(with_file, kind)] == [row["photo"] for row in of_kind(without, kind)]
    np.savez(file, embedding=emb, key=photos.keys, checkpoint="b" * 64)
    with pytest.raises(ValueError, match="was made by another checkpoint"):
        audit("--embeddings", str(file))


def test_a_network_that_learned_from_these_labels_is_told(audit, monkeypatch):
    from faceembed import evaluate

    monkeypatch.setattr(Pixels, "data", {"people_hashes": [evaluate.person_hash(f"p{i:02d}") for i in range(9)]})
    report = audit()
    assert len(report["warnings"]) == 1
    assert "was trained on 9 of these 60 people" in report["warnings"][0]


def test_embeddings_alone_make_no_copies(audit, album, tmp_path):
    """Two photos with one embedding and other pixels are no copies; more pairs than are looked at are counted."""
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    emb = Pixels()(np.stack([np.asarray(Image.fromarray(photos.read(i)).resize((64, 64))) for i in range(len(photos))]))
    emb[photos.keys == "p33/1"] = emb[photos.keys == "p44/0"]
    np.savez(tmp_path / "e.npz", embedding=emb, key=photos.keys)
    report = audit("--embeddings", str(tmp_path / "e.npz"))
    assert report["measured"]["copy_candidates"] >= 3
    assert [row["photo"] for row in of_kind(report, "copy in one folder")] == ["p10/0"]
    assert [row["photo"] for row in of_kind(report, "copy in two folders")] == ["p20/0"]
    report = audit("--embeddings", str(tmp_path / "e.npz"), "--pairs", "1")
    assert "more pairs have nearly equal embeddings" in report["warnings"][0]
    emb[7] = np.nan
    np.savez(tmp_path / "e.npz", embedding=emb, key=photos.keys)
    with pytest.raises(ValueError, match=f"the embedding of {photos.keys[7]} has no direction: it is 0, not finite"):
        audit("--embeddings", str(tmp_path / "e.npz"))


def test_a_list_that_was_edited_stays(audit, tmp_path, capsys):
    report = audit()
    file = tmp_path / "out" / "exclude.txt"
    audit()
    assert not (tmp_path / "out" / "exclude.new.txt").exists()
    file.write_text("p07/4\n")
    assert "is left as it is" in audit()["warnings"][0]
    assert file.read_text() == "p07/4\n"
    assert (tmp_path / "out" / "exclude.new.txt").read_text().splitlines() == report["exclude"]


def made_up(keys, identity, people, **found):
    """An audit with the findings given and no others."""
    none, numbers = np.zeros(0, np.int64), np.zeros(0, np.float32)
    fields = {
        "label_errors": maths.LabelErrors(
            photo=none, person=none, looks_like=none, own=numbers, other=numbers, margin=numbers,
            somebody=none.astype(bool), sure=none.astype(bool),
        ),
        "splits": maths.SplitPeople(first=none, second=none, cosine=numbers, score=numbers),
        "merges": maths.MergedPeople(person=none, size=np.zeros((0, 2), np.int64), cosine=numbers, score=numbers,
                                     side=np.full(len(keys), -1, np.int8)),
        "thresholds": None,
        "near": np.zeros((len(keys), 0), np.int64),
    }  # fmt: skip
    photos = sources.Photos(
        source="folder:/x", keys=np.array(keys), identity=np.array(identity, np.int32), people=np.array(people),
        read=lambda index: np.zeros((8, 8, 3), np.uint8), square=None, problems=(), fingerprint="f",
    )  # fmt: skip
    return maths.Labels(**(fields | found)), photos


def copies_of(*pairs, identity):
    first, second = np.array(pairs, np.int64).T
    return twins.Copies(
        first=first, second=second, alike=np.ones(len(first), np.float32), mirrored=np.zeros(len(first), bool),
        across=np.array(identity)[first] != np.array(identity)[second], candidates=len(first), unseen=0, cosine=1.0,
        pixels=1.0,
    )  # fmt: skip


def test_of_copies_all_but_one_are_left_out_however_they_are_linked():
    identity = [0] * 8 + [1] * 2
    found, _ = made_up([f"k{i}" for i in range(10)], identity, ["a", "b"])
    # A star around photo 3, a chain 5-6-7, and one copy in another folder, which a person has to decide about.
    copies = copies_of((0, 3), (1, 3), (2, 3), (6, 7), (5, 6), (4, 8), identity=identity)
    assert rules.excluded(found, copies).tolist() == [1, 2, 3, 6, 7]


def test_folders_of_two_are_shown_once_share_a_rank_and_stay():
    identity = [0, 0, 1, 1, 1, 2, 2]
    errors = maths.LabelErrors(
        photo=np.array([0, 3, 5, 1]), person=np.array([0, 1, 2, 0]), looks_like=np.array([1, 2, 0, 1]),
        own=np.zeros(4, np.float32), other=np.ones(4, np.float32), margin=np.array([4, 3, 2, 1], np.float32),
        somebody=np.array([True, True, False, True]), sure=np.array([False, True, False, False]),
    )  # fmt: skip
    found, photos = made_up([f"k{i}" for i in range(7)], identity, ["a", "b", "c"], label_errors=errors)
    nothing = copies_of((0, 1), identity=identity)
    nothing = dataclasses.replace(
        nothing, first=nothing.first[:0], second=nothing.second[:0], alike=nothing.alike[:0],
        mirrored=nothing.mirrored[:0], across=nothing.across[:0],
    )  # fmt: skip
    rows = list(rules.findings(found, nothing, photos))
    assert [(row["kind"], row["rank"], row["photo"]) for row in rows] == [
        ("looks like somebody else", 1, "k3"), (rules.PAIRS, 1, "k0"), (rules.PAIRS, 2, "k5"), (rules.PAIRS, 1, "k1"),
    ]  # fmt: skip
    part = next(part for part in rules.parts_of(found, nothing, photos, 9) if part.which == "two-photos-not-one-person")
    assert (part.total, [case.title for case in part.cases]) == (2, ["k0", "k5"])
    assert rules.excluded(found, nothing).tolist() == [3]


def test_of_a_folder_of_two_people_the_smaller_cluster_is_named():
    identity = [0] * 6
    side = np.array([0, 0, 1, 1, 1, 1], np.int8)
    merges = maths.MergedPeople(person=np.array([0]), size=np.array([[2, 4]]), cosine=np.zeros(1, np.float32),
                                score=np.zeros(1, np.float32), side=side)  # fmt: skip
    found, _ = made_up([f"k{i}" for i in range(6)], identity, ["a"], merges=merges)
    assert rules.smaller_cluster(found.merges, np.array(identity), 0).tolist() == [0, 1]
    swapped = dataclasses.replace(merges, size=np.array([[4, 2]]), side=1 - side)
    assert rules.smaller_cluster(swapped, np.array(identity), 0).tolist() == [0, 1]
    even = dataclasses.replace(merges, size=np.array([[3, 3]]), side=np.array([0, 0, 0, 1, 1, 1], np.int8))
    assert rules.smaller_cluster(even, np.array(identity), 0).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shown", "0"), "--shown is 0"),
        (("--pairs", "-1"), "--pairs is -1"),
        (("--batch", "0"), "--batch is 0"),
        (("--out", "/dev/null"), "--out is /dev/null: files cannot be written there"),
        (("--out", "/dev/null/audit"), "files cannot be written there"),
    ],
)
def test_flags_that_cannot_be_are_told_at_once(audit, flags, message):
    with pytest.raises(ValueError, match=message):
        audit(*flags)


def test_its_folder_is_not_among_the_photos(album, tmp_path):
    with pytest.raises(ValueError, match="it would be taken for a person's photos"):
        cli.run(["audit", f"folder:{album}", "--out", str(album / "audit")])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cli.run(["audit", "folder:/nowhere", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_synthetic_photos_have_no_label_errors(tmp_path):
    with pytest.raises(ValueError, match="its photos are drawn"):
        cli.run(["audit", "synthetic", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- what a training leaves out ------------------------------------------------------------------------------------------


def test_a_file_of_keys_is_read_and_faults_are_told(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path)
    file = tmp_path / "exclude.txt"
    file.write_text("p03/1\n\np01/4\r\np03/1\n")
    named = sources.named(sources.read_keys(file), photos, file)
    assert photos.keys[named].tolist() == ["p01/4", "p03/1"]
    file.write_bytes("\ufeffp02/2\n".encode())  # as editors on Windows begin a file
    assert photos.keys[sources.named(sources.read_keys(file), photos, file)].tolist() == ["p02/2"]
    odd = dataclasses.replace(photos, keys=np.array(["a\rb", *photos.keys[1:]]))
    file.write_bytes(b"a\rb\r\n")
    assert sources.named(sources.read_keys(file), odd, file)[0]
    file.write_text("p03/1\np03/9\nelse\n")
    with pytest.raises(ValueError, match="2 lines are no photos of folder:.*first line 2: 'p03/9'"):
        sources.named(sources.read_keys(file), photos, file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="does not read as text"):
        sources.read_keys(file)
    with pytest.raises(FileNotFoundError, match="data audit SOURCE"):
        sources.read_keys(tmp_path / "none")


def test_photos_left_out_are_not_trained_on_and_held_out_people_keep_theirs(noise_photos, tmp_path, monkeypatch):
    from faceembed import config, embed
    from faceembed.data import splits
    from faceembed.training import loop

    photos = noise_photos
    sampled, make_sampler = [], loop.sampling.make_sampler
    monkeypatch.setattr(loop, "open_data", lambda *_, **__: photos)
    monkeypatch.setattr(
        loop.sampling,
        "make_sampler",
        lambda who, **options: (sampled.append(len(who)), make_sampler(who, **options))[1],
    )
    part = splits.split_of(photos.people)[photos.identity]
    file = tmp_path / "exclude.txt"
    chosen = np.concatenate([np.flatnonzero(part == name)[:3] for name in ("train", "select", "report")])
    file.write_text("".join(f"{key}\n" for key in photos.keys[chosen]))
    experiment = config.Experiment(
        steps=2, data=config.Data(exclude=str(file)), preprocess=Preprocess(size=16),
        encoder=config.ConvNet(widths=(4, 8), blocks=(1, 1), dim=8), batch=config.Batch(people=8, photos=2),
        checkpoint=config.Checkpoint(every=2, log=2),
    )  # fmt: skip
    results = loop.train(experiment, tmp_path / "run", devices=1, progress=False)
    assert sampled == [(part == "train").sum() - 3]
    assert embed.load(tmp_path / "run").data["photos"] == (part == "train").sum() - 3
    assert results["all_pairs"]["n_images"] == (part == "report").sum()
    # Another list, or none, is another training: the run does not go on with it, and its record stays.
    record = (tmp_path / "run" / "config.json").read_bytes()
    file.write_text(f"{photos.keys[chosen[0]]}\n")
    for other in (experiment, dataclasses.replace(experiment, data=config.Data())):
        with pytest.raises(ValueError, match=r"with 3 left out, and now .* Give --data\.exclude the file"):
            loop.train(other, tmp_path / "run", devices=1, progress=False)
    assert (tmp_path / "run" / "config.json").read_bytes() == record
    # A list that names nobody who is trained on changes nothing.
    held_out = part != "train"
    assert loop.leave_out(held_out, photos, sources.select(photos, ~held_out))[1] == photos.fingerprint
    # A file that is not there is told before photos are read.
    file.unlink()
    monkeypatch.setattr(loop, "open_data", lambda *_, **__: pytest.fail("photos were read"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        loop.train(experiment, tmp_path / "other", devices=1, progress=False)
