"""`launch.py data audit` on photos that can be told by their pixels, and `train --data.exclude` that uses what it wrote."""

import csv
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    assert "300 photos of 60 people, by the embeddings of dlib" in printed
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shown", "0"), "--shown is 0"),
        (("--batch", "0"), "--batch is 0"),
        (("--out", "/dev/null"), "is a file"),
        (("--out", "/dev/null/audit"), "cannot be written"),
    ],
)
def test_flags_that_cannot_be_are_told_at_once(audit, flags, message):
    with pytest.raises(ValueError, match=message):
        audit(*flags)


def test_synthetic_photos_have_no_label_errors(tmp_path):
    with pytest.raises(ValueError, match="its photos are drawn"):
        cli.run(["audit", "synthetic", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- what a training leaves out ------------------------------------------------------------------------------------------


def test_a_file_of_keys_is_read_and_faults_are_told(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path)
    file = tmp_path / "exclude.txt"
    file.write_text("p03/1\n\np01/4\r\np03/1\n")
    named = sources.read_keys(file, photos)
    assert photos.keys[named].tolist() == ["p01/4", "p03/1"]
    file.write_text("p03/1\np03/9\nelse\n")
    with pytest.raises(ValueError, match="2 lines are no photos of folder:.*first line 2: 'p03/9'"):
        sources.read_keys(file, photos)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="does not read as text"):
        sources.read_keys(file, photos)
    with pytest.raises(FileNotFoundError, match="data audit folder:"):
        sources.read_keys(tmp_path / "none", photos)


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
    # Another list is another training: the run does not go on with it.
    file.write_text(f"{photos.keys[chosen[0]]}\n")
    with pytest.raises(ValueError, match="is not what .* was trained on"):
        loop.train(experiment, tmp_path / "run", devices=1, progress=False)
