"""The report as a reader meets it: opened in a browser, in light and dark, wide and narrow; and what is put into it."""

import dataclasses
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from faceembed import config, evaluate, page, plots
from faceembed.data import pairs as pair_lists
from faceembed.data import sources
from faceembed.verification import compare, compare_all, slice_report

HOSTILE = "<script>alert(1)</script>\"'& ../\u202e"
STEPS = range(10, 210, 10)


def embedded(seed, *, people=12, photos=3, d=6):
    """Photos of people with hostile names, all their genuine pairs and as many impostor pairs, and embeddings."""
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(people, dtype=np.int32), photos)
    names = np.array([f"{HOSTILE}{i:02d}" for i in range(people)])
    found = sources.Photos(
        source=f"folder:/{HOSTILE}",
        keys=np.array([f"{names[who]}/{i % photos}" for i, who in enumerate(identity)]),
        identity=identity,
        people=names,
        # A crop says which photo it is.
        read=lambda index: np.full((40, 40, 3), 5 * index, np.uint8),
        square=None,
        problems=(),
        fingerprint="f" * 64,
    )
    a, b = np.triu_indices(len(identity), 1)
    same = identity[a] == identity[b]
    chosen = np.concatenate([np.flatnonzero(same), rng.permutation(np.flatnonzero(~same))[: same.sum()]])
    listed = pair_lists.Pairs(key_a=found.keys[a[chosen]], key_b=found.keys[b[chosen]], same=same[chosen])
    emb = rng.normal(size=(people, d))[identity] + 0.9 * rng.normal(size=(len(identity), d))
    return found, listed, emb[a[chosen]], emb[b[chosen]], identity[a[chosen]], identity[b[chosen]]


def log_row(step):
    rng = np.random.default_rng(step)
    values = {
        "loss": 0.2 - step / 2000,
        "learning_rate": 1e-3,
        "images_per_s": 200 + rng.normal(),
        "skipped": step // 100,
    }
    for name, at in (("d_ap", 0.5), ("d_an", 1.0)):
        values |= {
            f"{name}_{part}": at + shift for part, shift in (("mean", 0), ("q10", -0.2), ("q50", 0), ("q90", 0.3))
        }
    values |= {"active": 0.5, "active_hardest": 0.9, "active_semi_hard": 0.4, "active_all": None, "triplets": 96.0}
    values |= {"effective_rank": 8 + rng.normal(), "device_memory_gb": 1.5, "host_memory_gb": 2.5, HOSTILE: 1.0}
    return {"step": step, **values, **{f"grad_norm{group}": 1 + rng.random() for group in ("", "/stem", "/stage1")}}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page with everything there is, of a run whose people and folders are called what they should not be."""
    run = tmp_path_factory.mktemp("run")
    photos, pairs, a, b, who_a, who_b = embedded(0)
    _, _, *fit = embedded(1)
    same_fit = fit[2] == fit[3]
    results = compare(a, b, pairs.same, who_a, who_b, train=(fit[0], fit[1], same_fit, fit[2] + 100, fit[3] + 100))
    results = dataclasses.replace(results, warnings=(f"beware of {HOSTILE}",))
    rows = [log_row(step) for step in STEPS] + [{"step": step, "select_auc": 0.9} for step in (100, 200)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    event = {"step": 70, "kind": "collapse", "message": f"all embeddings are one {HOSTILE}"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "environment.json").write_text(json.dumps({"jax": "0.10.2", "processor": HOSTILE}))
    embedder = SimpleNamespace(
        data={"source": photos.source, "fingerprint": "a" * 64, "people": 100, "people_hashes": ["secret"]},
        config=config.Experiment(steps=200, encoder=config.MobileFaceNet()),
        size=32,
    )
    heads = {name: result.fitted[0] for name, result in results.heads.items()}
    everyone_emb = np.random.default_rng(2).normal(size=(len(photos.people), 6))[photos.identity]
    everyone_emb = everyone_emb + 0.9 * np.random.default_rng(3).normal(size=everyone_emb.shape)
    everyone = compare_all(
        everyone_emb, photos.people[photos.identity], heads, fmrs=[0.1, 0.02], draws=50,
        thresholds={name: {0.1: head.threshold} for name, head in heads.items()},
    )  # fmt: skip
    slices = slice_report(results[page.headline(results)], pairs.same, {HOSTILE: who_a < 6}, who_a, who_b)
    return evaluate.make_page(
        embedder, photos, results=results, pairs=pairs, everyone=everyone, slices=slices,
        title=HOSTILE + "\udcff\x00", tested=f"tested on {HOSTILE}", run=run,
        commands={"Verify again": f"python launch.py verify {HOSTILE}"}, progress=False,
    )  # fmt: skip


FIGURES = {
    "figure-roc", "figure-det", "figure-reliability", "figure-difference-accuracy", "figure-difference-auc",
    "figure-everyone-roc", "figure-everyone-det", "figure-everyone-difference-0-1", "figure-everyone-difference-0-02",
    "figure-scores-threshold", "figure-scores-logistic-distance", "figure-scores-logistic-abs",
    "figure-loss", "figure-select-auc", "figure-distances", "figure-active", "figure-effective-rank", "figure-triplets",
    "figure-grad-norm", "figure-learning-rate", "figure-skipped", "figure-images-per-s", "figure-memory",
    "figure-metric-script-alert-1-script",
}  # fmt: skip


# ---- in a browser ------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

# Chromium's debugging pipe is its file descriptors 3 and 4.
_ON_3_AND_4 = (
    "import fcntl, os, sys\n"
    "ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]\n"
    "os.dup2(ends[0], 3), os.dup2(ends[1], 4), os.execv(sys.argv[3], sys.argv[3:])\n"
)


class Browser:
    """Headless Chromium, driven by its DevTools protocol over a pipe."""

    def __init__(self, profile):
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-quic "
        flags += "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
        flags += "--remote-debugging-pipe"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ON_3_AND_4, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in), os.close(theirs_out)
        self._number, self._buffer, self._session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self):
        os.close(self._to)
        self._process.kill()
        self._process.wait()
        os.close(self._from)

    def _message(self):
        deadline = time.monotonic() + 60
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            part = os.read(self._from, 1 << 16)
            assert part, "Chromium has ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._to, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, look, *, scheme="light", width=1200):
        """What a script says of a file that is opened, and "problems": what it requests, logs and fails at."""
        url = path.as_uri()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        seen = self.call("Runtime.evaluate", expression=f"({look})", returnByValue=True)["result"]["value"]
        time.sleep(0.2)  # a request that was only just made
        self.call("Runtime.evaluate", expression="0")
        return {**seen, "problems": [text for event in self.events for text in _problem(event, url)]}


def _problem(event, url):
    """What a clean page gives no reason to say."""
    parameters = event.get("params", {})
    match event.get("method"):
        case "Network.requestWillBeSent":
            to = parameters["request"]["url"]
            return [] if to == url or to.startswith("data:") else [f"request: {to}"]
        case "Network.loadingFailed":
            return [f"failed: {parameters['errorText']}"]
        case "Log.entryAdded":
            return [f"log: {parameters['entry']['text']}"]
        case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Page.javascriptDialogOpening":
            return [f"script: {json.dumps(parameters)[:200]}"]
    return []


LOOK = """{
  figures: Object.fromEntries([...document.querySelectorAll("figure[id]")].map(f => {
    const drawn = [...f.querySelectorAll(".fe-line, .fe-band")].filter(x => !x.matches(".fe-swatch"));
    const boxes = drawn.map(x => x.getBoundingClientRect()).filter(b => b.width + b.height > 1);
    const svg = f.querySelector("svg").getBoundingClientRect();
    const inside = boxes.every(b => b.left >= svg.left - 1 && b.right <= svg.right + 1 && b.bottom <= svg.bottom + 1);
    return [f.id, inside ? boxes.length : "outside its frame"];
  })),
  images: [...document.images].filter(i => i.complete && i.naturalWidth).length,
  broken: [...document.images].filter(i => !i.naturalWidth).length,
  scripts: document.scripts.length,
  across: document.documentElement.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  text: getComputedStyle(document.body).color,
  stroke: (x => x && getComputedStyle(x).stroke)(document.querySelector(".fe-line")),
  small: [...document.querySelectorAll("svg text, p, td, figcaption")].filter(x => x.textContent.trim() &&
    parseFloat(getComputedStyle(x).fontSize) * (x.getCTM ? x.getCTM().a : 1) < 8).length,
}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@needs_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_a_browser_shows_every_figure_and_has_nothing_to_complain_of(full, browser, tmp_path, scheme, width):
    page.write_page(tmp_path / "report.html", full)
    seen = browser.open(tmp_path / "report.html", LOOK, scheme=scheme, width=width)
    assert seen["problems"] == []
    assert seen["figures"].keys() == FIGURES
    empty = {name: lines for name, lines in seen["figures"].items() if not isinstance(lines, int) or lines < 1}
    assert empty == {}
    assert (seen["images"], seen["broken"], seen["scripts"]) == (2 * len(full.hardest), 0, 0)
    assert seen["across"] == width, "the page is wider than the window"
    assert seen["small"] == 0, "letters below 8 px"
    # Dark on light or light on dark, curves included.
    light = {name: sum(map(int, re.findall(r"\d+", seen[name])[:3])) / 765 for name in ("ground", "text", "stroke")}
    if scheme == "light":
        assert light["ground"] > 0.9 > 0.5 > max(light["text"], light["stroke"])
    else:
        assert light["ground"] < 0.1 < 0.5 < min(light["text"], light["stroke"])


@needs_chromium
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda text: text.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'), "violates"),
        (lambda text: text.replace("<main>", "<main><script>1</script>"), "violates"),
        (
            lambda text: re.sub("<meta http-equiv[^>]*>", "", text).replace(
                "<main>", '<main><img src="http://127.0.0.1:9/x.png">'
            ),
            "request: http://127.0.0.1:9/x.png",
        ),
        (
            lambda text: re.sub("<meta http-equiv[^>]*>", "", text).replace(
                "<main>", "<main><script>console.error('found')</script>"
            ),
            "found",
        ),
    ],
    ids=["image", "script", "image-allowed", "script-allowed"],
)
def test_the_browser_would_tell(full, browser, tmp_path, harm, told):
    path = tmp_path / "report.html"
    path.write_text(harm(page.render(full)), encoding="utf-8")
    assert told in " ".join(browser.open(path, "{}")["problems"])


@needs_chromium
def test_plots_stand_alone_in_light_and_dark(browser, tmp_path):
    steps = np.arange(100)
    wave = plots.Line(name="a", x=steps, y=np.sin(steps / 9))
    one = plots.lines([wave], title="one", marks=[plots.Mark(at=50, label="x")])
    two = plots.histogram({"genuine": steps, "impostor": steps - 50}, title="<two> & more\x00")
    both = plots.grid([one, two])
    (tmp_path / "plot.svg").write_text(both, encoding="utf-8")
    look = """{
      curves: document.querySelectorAll(".fe-line:not(.fe-swatch)").length,
      ground: getComputedStyle(document.querySelector(".fe-ground")).fill,
      words: [...document.querySelectorAll("text.fe-title")].map(x => x.textContent).join(),
    }"""
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 29)")):
        seen = browser.open(tmp_path / "plot.svg", look, scheme=scheme)
        assert seen == {"curves": 3, "ground": ground, "words": "one,<two> & more\ufffd", "problems": []}


# ---- what is put into it -----------------------------------------------------------------------------------------------


def test_hostile_names_stay_text_and_the_same_data_give_the_same_bytes(full):
    text = page.render(full)
    assert page.render(full) == text
    text.encode("utf-8")
    assert "<script" not in text
    assert "alert(1)&lt;/script&gt;&quot;&#x27;&amp;" in text
    assert "secret" not in text
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)\w""", text.replace("xmlns=", ""))


def test_a_page_of_a_verification_alone_leaves_out_what_it_has_not(full):
    bare = page.Page(title="t", tested="x", results=full.results, scores={}, same=full.same)
    text = page.render(bare)
    assert re.findall(r'<section id="(\w+)"', text) == ["results", "differences"]
    assert set(re.findall(r'<figure id="([\w-]+)"', text)) == {"figure-difference-accuracy", "figure-difference-auc"}
    assert re.findall(r'<section id="(\w+)"', page.render(full)) == [
        "results", "differences", "everyone", "scores", "slices", "hardest", "training", "provenance",
    ]  # fmt: skip


def test_the_headline_is_of_the_usual_head_in_words(full):
    assert page.headline(["threshold", "logistic_abs", "logistic_distance"]) == "logistic_distance"
    assert page.headline(["threshold", "logistic_abs"]) == "threshold"
    head = full.results["heads"]["logistic_distance"]
    text = re.sub(r"<[^>]*>", "", page.render(full).split("<h1>")[1].split("</header>")[0])
    assert f"{100 * head['accuracy']:.2f} %of {len(full.same)} pairs" in text
    assert f"interval {100 * head['interval']['low']:.2f} % to {100 * head['interval']['high']:.2f} %" in text
    assert "beware of" in text
    assert "Step 70. all embeddings are one" in text
    # 36 impostor pairs support no FAR of 10 %: no tile, and the table says what it would take.
    assert "TAR @" not in text
    assert "needs\u00a0300 pairs" in page.render(full)


def drawn(monkeypatch, which, full):
    """The lines of a figure, and how they were drawn."""
    calls = {}
    lines = plots.lines
    monkeypatch.setattr(plots, "lines", lambda series, **options: (
        calls.setdefault(options["title"], (series, options)), lines(series, **options))[1])  # fmt: skip
    page.render(full)
    return calls[which]


@pytest.mark.parametrize("digits", [9, 0])
def test_the_roc_is_the_counts_and_no_more_than_they_resolve(full, monkeypatch, digits):
    # Rounded scores are tied: the least FAR above 0 is then that of several impostor pairs.
    full = dataclasses.replace(full, scores={name: scores.round(digits) for name, scores in full.scores.items()})
    series, options = drawn(monkeypatch, "ROC", full)
    n = int((~full.same).sum())
    assert options["x_range"] == (100 / n, 100)
    assert options["shade"][:2] == (0, 1000 / n)
    if digits:  # two heads order the pairs alike and share a curve
        assert sorted(line.name for line in series) == ["logistic_abs", "logistic_distance, threshold"]
    for line in series:
        scores = full.scores[line.name.split(", ")[0]]
        genuine, impostor = scores[full.same], scores[~full.same]
        assert line.steps
        for false_accepts in range(1, n + 1):
            far = 100 * false_accepts / n
            shown = line.y[np.flatnonzero(line.x <= far * (1 + 1e-9))[-1]]
            cuts = [cut for cut in [*scores, np.inf] if (impostor >= cut).sum() <= false_accepts]
            assert shown == pytest.approx(100 * max((genuine >= cut).mean() for cut in cuts))


def test_curves_come_from_the_log(full, monkeypatch):
    (positive, negative), _ = drawn(monkeypatch, "Distances of the mined triplets", full)
    np.testing.assert_allclose(positive.x, list(STEPS))
    np.testing.assert_allclose([positive.y[0], positive.low[0], positive.high[0]], [0.5, 0.3, 0.8])
    np.testing.assert_allclose([negative.y[-1], negative.low[-1], negative.high[-1]], [1.0, 0.8, 1.3])
    active, options = drawn(monkeypatch, "Active triplets", full)
    assert [line.y[0] for line in active[:3]] == [50, 90, 40]
    assert np.isnan(active[3].y).all()  # null in the log
    assert options["y_range"] == (0, 100)
    assert [(mark.at, mark.label) for mark in options["marks"]] == [(70, "collapse")]
    _, options = drawn(monkeypatch, "Loss", full)
    assert [mark.at for mark in options["marks"] if mark.axis == "y"] == [0.2]
    norms, options = drawn(monkeypatch, "Gradient norm", full)
    assert [line.name for line in norms] == ["all", "stem", "stage1"]
    assert options["y_log"]


def test_runs_of_other_losses_and_of_older_versions_have_their_curves(full):
    rows = [
        {"step": 5, "loss": 0.7, "loss_genuine": 1.0, "loss_impostor": 0.4, "accuracy": 0.8, "d_ap_mean": 0.5, "odd": 3}
    ]
    text = page.render(dataclasses.replace(full, rows=rows, events=(), settings=()))
    training = re.findall(r'<figure id="figure-([\w-]+)"', text.split('id="training"')[1])
    assert training == ["loss", "accuracy", "distances", "metric-odd"]


def test_the_threshold_of_its_own_fold_decides_a_pair():
    _, pairs, a, b, who_a, who_b = embedded(2)
    result = compare(a, b, pairs.same, who_a, who_b, folds=np.arange(len(a)) % 3, allow_shared=True)["threshold"]
    np.testing.assert_array_equal(result.cuts, np.array(result.threshold)[np.arange(len(a)) % 3])
    assert len(set(result.threshold)) == 3
    assert "cuts" not in result.to_dict()


def test_errors_among_the_hardest_pairs_are_marked(full):
    wrong = sum(pair.accepted != pair.same for pair in full.hardest)
    assert page.render(full).count('<figure class="wrong">') == wrong > 0


def test_a_setting_is_held_against_the_default_of_its_own_class():
    experiment = config.Experiment(
        encoder=config.IResNet(depth=18), batch=config.Batch(people=7), loss=config.Triplet(margin=0.2)
    )
    found = {setting.name: setting for setting in page.settings(experiment)}
    changed = {name: (setting.value, setting.default) for name, setting in found.items() if setting.changed}
    assert changed == {"encoder": ("IResNet", "ConvNet"), "encoder.depth": (18, 50), "batch.people": (7, 32)}
    assert found["encoder.dim"].value == 512


# ---- the hardest pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_hardest_pairs_show_nobody_twice_and_leave_out_nothing_harder(seed):
    rng = np.random.default_rng(seed)
    n, most = 300, 4
    people_a = rng.integers(0, 15, n)
    same = rng.random(n) < 0.5
    people_b = np.where(same, people_a, (people_a + rng.integers(1, 15, n)) % 15)
    margin = rng.normal(size=n)
    chosen = evaluate.hardest(margin, same, people_a, people_b, most=most)
    assert same[chosen].tolist() == [True] * most + [False] * most
    for genuine in (True, False):
        mine = [i for i in chosen if same[i] == genuine]
        hard = margin * (-1 if genuine else 1)
        assert [hard[i] for i in mine] == sorted((hard[i] for i in mine), reverse=True)
        everybody = [person for i in mine for person in {people_a[i], people_b[i]}]
        assert len(everybody) == len(set(everybody))
        for i in np.flatnonzero(same == genuine):
            harder = {person for j in mine if hard[j] > hard[i] for person in (people_a[j], people_b[j])}
            assert i in mine or {people_a[i], people_b[i]} & harder or hard[i] < hard[mine[-1]]


def test_the_hardest_pairs_carry_their_own_photos(full):
    photos, _, *_ = embedded(0)
    place = {str(key): index for index, key in enumerate(photos.keys)}
    assert {pair.same for pair in full.hardest} == {True, False}
    for pair in full.hardest:
        for crop, photo, person in zip(pair.crops, pair.photos, pair.people, strict=True):
            assert crop.shape == (32, 32, 3)
            assert (crop == 5 * place[photo]).all()
            assert photo.startswith(person)
        assert (pair.people[0] == pair.people[1]) == pair.same


def test_all_with_all_is_bounded_by_photos_of_a_person_and_in_all():
    photos, *_ = embedded(0, people=12, photos=3)
    assert len(evaluate.bounded(photos)) == 36
    few = evaluate.bounded(photos, each=2)
    assert np.bincount(few.identity).tolist() == [2] * 12
    assert [few.read(i)[0, 0, 0] for i in range(4)] == [0, 5, 15, 20]
    some = evaluate.bounded(photos, most=10)
    assert np.bincount(some.identity).tolist() == [3] * 3
    by_hash = sorted(photos.people.tolist(), key=evaluate.person_hash)
    assert sorted(some.people.tolist()) == sorted(by_hash[:3])
