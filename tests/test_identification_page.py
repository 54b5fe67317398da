"""The page of an identification report, and the command that writes it."""

import dataclasses
import json
import re

import numpy as np
import pytest

from faceembed import cli
from faceembed.identification import openset, page, protocol, rivals
from tests.test_identification_protocol import embedded, names


@pytest.fixture(scope="module")
def shown():
    emb, identity = embedded(400, np.r_[np.full(300, 1), np.full(60, 3), np.full(40, 7)], seed=1)
    others = embedded(600, np.r_[np.full(400, 1), np.full(200, 6)], seed=2)
    results = protocol.evaluate(emb, identity, names(400), others, sizes=(20, 100), draws=2)
    compared = rivals.compare(emb, identity, names(400), (*others, np.array(names(600))), fpir=0.1)
    results = dataclasses.replace(results, rivals=compared, warnings=("mind <this>",))
    pair = results.let_in[0]
    crop = np.full((16, 16, 3), 90, np.uint8)
    keys = [f"p{who:04d}/<{i}>" for i, who in enumerate(identity)]
    return page.IdentificationPage(
        title="<people>", tested="400 people.", results=results, crops={pair.probe: crop, pair.template: crop}, keys=keys,
        facts={"Trained on": {"source": "nothing"}}, commands={"Report again": "python launch.py identification-report"},
    )  # fmt: skip


def test_the_page_has_every_part_and_runs_nothing(shown):
    html = page.render(shown)
    for which in ("planner", "open", "closed", "photos", "growth", "tail", "rivals", "let-in", "provenance"):
        assert f'<section id="{which}">' in html
    for figure in ("planner", "det", "cmc", "learning", "growth-0.1", "tail", "shape", "tail-threshold"):
        assert f'id="figure-{figure}"' in html
    assert "<script" not in html
    assert "mind &lt;this&gt;" in html
    assert "<people>" not in html
    assert page.render(shown) == html


def test_the_headline_is_the_rarest_rate_that_strangers_resolve(shown):
    html = page.render(shown)
    row = next(r for r in shown.results.open_set if (r.k, r.photos, r.cut.fpir) == (100, 1, 0.1))
    assert f'<p class="figure">{100 * row.tpir.value:.1f} %</p>' in html
    assert "lets one stranger in 10 in" in html


def test_what_strangers_do_not_resolve_is_not_printed(shown):
    html = page.render(shown)
    assert "needs\u00a03,000 strangers" in html
    rows = re.findall(r'<tr><th scope="row">100</th><td>1</td><td>1\u00a0%</td><td>(.*?)</td><td>(.*?)</td>', html)
    assert rows == [("-<small>needs\u00a03,000 strangers</small>", "-")]


def test_extrapolated_cells_are_marked(shown):
    html = page.render(shown)
    table = html[html.index('<section id="planner">') : html.index('<section id="open">')]
    assert re.search(r'<th scope="row">1,000</th><td>~\d', table)
    assert re.search(r'<th scope="row">32</th><td>\d', table)


def test_strangers_let_in_are_beside_whom_they_were_taken_for(shown):
    html = page.render(shown)
    pair = shown.results.let_in[0]
    part = html[html.index('<section id="let-in">') :]
    assert part.count("<img ") == 2
    assert f"p{_who(shown, pair.probe)}" in part
    assert f"<b>{pair.distance:.3f}" in part


def _who(shown, photo):
    return shown.keys[photo][1:5]


def test_a_page_of_few_people_leaves_out_what_there_is_not(shown):
    tested = embedded(40, np.r_[np.full(20, 1), np.full(20, 2)])
    results = protocol.evaluate(*tested, names(40), embedded(30, 2, seed=3), draws=1)
    html = page.render(dataclasses.replace(shown, results=results, crops={}))
    for which in ("photos", "tail", "rivals", "growth"):
        assert f'<section id="{which}">' not in html
    assert "30 people are too few" in html
    assert "too few people set thresholds" in str(results)
    assert f"{100 * results.closed_set[-1].ranks[1].value:.1f} %" in html


# ---- rivals ------------------------------------------------------------------------------------------------------------


def test_rivals_agree_where_they_must_and_cost_what_they_do(shown):
    rows = {(row["method"], row["photos"]): row for row in shown.results.rivals}
    assert {photos for _, photos in rows} == {1, 5}
    one = [rows[name, 1] for name in ("mean template", "nearest template")]
    assert one[0]["tpir"] == one[1]["tpir"]  # of one photo mean and nearest are the same
    assert one[0]["rank1"] == one[1]["rank1"]
    assert all(row["rank1"].value > 0.3 for row in rows.values())


def test_a_rivals_threshold_is_set_by_the_others_and_its_rates_are_at_it():
    """Tested people who all look alike are let in by a threshold of people who do not, and found whatever it is."""
    emb, identity = embedded(260, np.r_[np.full(200, 1), np.full(60, 2)], seed=1)
    others = embedded(260, np.r_[np.full(200, 1), np.full(60, 2)], seed=2)
    near = emb + 1.5
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    called = (*others, np.array(names(260)))
    usual = {row["method"]: row for row in rivals.compare(emb, identity, names(260), called, fpir=0.1, photos=(1,))}
    moved = {row["method"]: row for row in rivals.compare(near, identity, names(260), called, fpir=0.1, photos=(1,))}
    for method in ("mean template", "nearest template"):
        assert usual[method]["fpir"].low <= 0.1 <= usual[method]["fpir"].high
        assert moved[method]["fpir"].value > 0.9
    for row in usual.values():
        assert row["tpir"].value < row["rank1"].value
    # The threshold is that of the others' strangers in a gallery of the others.
    sides = [
        protocol.draw(*some, *protocol.roles(names(260), np.bincount(some[1])), draws=1).searches
        for some in ((emb, identity), others)
    ]
    cut = openset.threshold_at_fpir(openset.ranked(sides[1].non_mated, share=0.1), 60, 0.1)
    assert usual["mean template"]["tpir"] == openset.tpir(sides[0].mated, 60, cut)
    assert rivals.compare(emb, identity, names(260), called, fpir=0.01) == []  # 200 strangers do not resolve it


def test_one_more_person_costs_a_row_a_classifier_or_all_of_them(monkeypatch):
    templates = np.random.default_rng(0).normal(size=(9, 2, 4))
    fitted = []
    usual = rivals._classifier
    monkeypatch.setattr(rivals, "_classifier", lambda x, y: fitted.append(len(np.unique(y))) or usual(x, y))
    for name, classes in (
        ("mean template", []),
        ("nearest template", []),
        ("k-NN", []),
        ("logistic", [2]),
        ("softmax", [9]),
    ):
        fitted.clear()
        rivals.RIVALS[name].one_more(templates)()
        assert fitted == classes, name


def test_each_rival_finds_people_who_lie_apart():
    rng = np.random.default_rng(0)
    centres = np.eye(12)
    templates = centres[:, None] + 0.05 * rng.normal(size=(12, 3, 12))
    probes = centres + 0.05 * rng.normal(size=(12, 12))
    for name, rival in rivals.RIVALS.items():
        scores = rival.fit(templates)(probes)
        assert scores.shape == (12, 12), name
        np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(12), err_msg=name)


def test_neighbours_count_votes_before_distances():
    # Two photos of person 1 are near, one of person 0 is nearest.
    templates = np.array([[[0.0], [9.0]], [[0.2], [0.3]], [[5.0], [6.0]]])
    scores = rivals.RIVALS["k-NN"].fit(templates)(np.array([[0.05]]))
    assert scores[0].argmax() == 1
    assert rivals.RIVALS["nearest template"].fit(templates)(np.array([[0.05]]))[0].argmax() == 0


# ---- the command -------------------------------------------------------------------------------------------------------


class Encoder:
    """Reads a person's number and a take out of a photo's pixels."""

    def __init__(self, path):
        from faceembed.preprocess import Preprocess

        self.path, self.preprocess, self.size, self.policy = path, Preprocess(size=16), 16, None
        self.fingerprint, self.data = "c" * 64, {"source": "none", "people": 3, "people_hashes": []}

    def __call__(self, images, batch=256):
        emb = []
        for image in images:
            person = int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])
            take = int(image[0, 0, 2])
            x = np.random.default_rng(person).normal(size=16) + 0.6 * np.random.default_rng([person, take]).normal(
                size=16
            )
            emb.append(x / np.linalg.norm(x))
        return np.array(emb, np.float32)


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    from faceembed.cli import identification_report
    from faceembed.data import pairs, sources

    def people(spec, **options):
        count = np.r_[np.full(400, 1), np.full(100, 3)]
        identity = np.repeat(np.arange(500, dtype=np.int32), count)
        called = np.array([f"n{i:03d}" for i in range(500)])
        take = np.concatenate([np.arange(n) for n in count])

        def read(index):
            image = np.zeros((16, 16, 3), np.uint8)
            image[...] = (identity[index] % 256, identity[index] // 256, take[index])
            return image

        keys = np.array([f"{called[w]}/{t}" for w, t in zip(identity, take, strict=True)])
        return sources.Photos(
            source=spec, keys=keys, identity=identity, people=called, read=read, square=None, problems=(),
            fingerprint="f" * 64,
        )  # fmt: skip

    monkeypatch.setattr(pairs, "load_people", people)
    step = tmp_path / "run" / "checkpoints" / "5"
    step.mkdir(parents=True)
    monkeypatch.setattr(identification_report, "load", lambda checkpoint: Encoder(step))

    def run(*arguments):
        status = cli.main(["identification-report", "run", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_writes_a_page_results_and_a_policy(launch, tmp_path):
    status, out, _ = launch(
        "--source", "folder:x", "--out", tmp_path / "out", "--set-policy", "--draws", 2, "--sizes", 10
    )
    assert status == 0
    assert "turned away at FPIR 10 %" in out
    assert "softmax" in out
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["results"]["open_set"][0]["k"] == 10
    assert 0 < content["results"]["calibrated_on"] < 500  # half of the people set thresholds, and are not tested
    assert content["results"]["people"] + content["results"]["strangers"] + content["results"]["calibrated_on"] == 500
    assert '<section id="let-in">' in (tmp_path / "out" / "report.html").read_text()
    policy = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert policy["fingerprint"] == "c" * 64
    assert policy["identification"]["people"] == content["results"]["calibrated_on"]
    assert policy["identification"]["source"] == "half of the people of folder:x, who are not tested"
    assert content["calibrate"]["source"] == policy["identification"]["source"]


def test_thresholds_never_come_from_those_tested(launch):
    status, _, err = launch("--source", "folder:x", "--calibrate", "folder:y")
    assert status == 1
    assert "500 people of folder:y are also among those tested, such as 'n000'" in err


@pytest.mark.parametrize(
    ("source", "asked_for", "words"),
    [
        ("lfw:dev_test", [("all:lfw:dev_test", "report"), ("all:lfw:dev_train", "calibrate")], "lfw:dev_train"),
        ("heldout:celeba", [("all:heldout:celeba", "report"), ("all:heldout:celeba", "calibrate")],
         "calibrate people of celeba"),
    ],
)  # fmt: skip
def test_thresholds_come_from_the_training_half_or_the_calibrate_people(monkeypatch, source, asked_for, words):
    from faceembed.cli import identification_report as command
    from faceembed.data import pairs

    seen = []
    monkeypatch.setattr(pairs, "load_people", lambda spec, **options: seen.append((spec, options["split"])) or spec)
    test, calibrate, set_by = command._photos(command.Options(checkpoint="run", source=source), None)
    assert seen == asked_for
    assert (test, calibrate, set_by) == (asked_for[0][0], asked_for[1][0], words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", 0], "Try --draws 5"),
        (["--fpirs", 0.9], "at most 0.5"),
        (["--sizes", 100_000], "Give smaller ones"),
        (["--embeddings", "nothing.npz"], "there is no nothing.npz"),
        (["--out", "run"], "such as --out reports/run"),  # the folder would hide a network of that name
    ],
)
def test_what_cannot_be_is_said(launch, arguments, message):
    status, _, err = launch("--source", "folder:x", *arguments)
    assert status == 1
    assert message in err


def test_what_is_extrapolated_has_the_colour_of_its_curve(shown):
    lines = page.planner_lines(shown.results.planned, first=2)
    by_hue = {}
    for line in lines:
        by_hue.setdefault(line.hue, []).append(line)
    assert set(by_hue) == {2, 3, 4}
    exact, beyond = by_hue[2]
    assert exact.name == "FPIR 10 %"
    assert beyond.name == ""
    assert max(exact.x) < min(beyond.x)
