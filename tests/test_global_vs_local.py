"""What the comparison of global and local mining trains and measures, and how sure it says to be."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from experiments import global_vs_local_mining as experiment
from faceembed import config


def photos(seed=0, people=9):
    """Unit vectors of people with one to four photos, some of them twice the same, so that scores tie."""
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(people), rng.integers(1, 5, people))
    emb = rng.normal(size=(people, 5))[identity] + rng.normal(size=(len(identity), 5))
    emb[3] = emb[-1]
    return (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(np.float32), identity


def weighted_auc(emb, identity, weight):
    """By loops: a person's weight counts once in genuine pairs, and both people's in impostor pairs."""
    score = (emb @ emb.T).astype(np.float64)
    pairs = [(i, j) for i in range(len(emb)) for j in range(i)]
    impostor = [
        (score[i, j], weight[identity[i]] * weight[identity[j]]) for i, j in pairs if identity[i] != identity[j]
    ]
    total = sum(w for _, w in impostor)
    shares = {}
    for i, j in pairs:
        if identity[i] == identity[j]:
            below = sum(w * ((s < score[i, j]) + 0.5 * (s == score[i, j])) for s, w in impostor)
            shares.setdefault(identity[i], []).append(below / total)
    return sum(weight[who] * np.mean(x) for who, x in shares.items()) / sum(weight[who] for who in shares)


def test_auc_and_influence_are_those_of_loops_over_weighted_people():
    emb, identity = photos()
    found = experiment.measure(emb, identity)
    ones = np.ones(identity.max() + 1)
    assert found.auc == pytest.approx(weighted_auc(emb, identity, ones), abs=1e-12)
    step = 1e-5 * np.eye(len(ones))
    slopes = [(weighted_auc(emb, identity, ones + e) - weighted_auc(emb, identity, ones - e)) / 2e-5 for e in step]
    np.testing.assert_allclose(found.influence, slopes, atol=1e-8)


def test_ranks_are_of_float64(monkeypatch):
    """Newer SciPy ranks float32 in float32, where ranks beyond 2²³ and their halves are rounded."""
    seen, rankdata = [], experiment.rankdata
    monkeypatch.setattr(experiment, "rankdata", lambda x: seen.append(x.dtype) or rankdata(x))
    emb, identity = photos()
    assert emb.dtype == np.float32
    experiment.measure(emb, identity)
    assert set(seen) == {np.dtype(np.float64)}


def test_tar_weights_people_alike_at_a_threshold_that_one_impostor_pair_in_a_hundred_reaches():
    emb, identity = photos(1, 30)
    score = emb @ emb.T
    pairs = [(i, j) for i in range(len(emb)) for j in range(i)]
    impostor = sorted((score[i, j] for i, j in pairs if identity[i] != identity[j]), reverse=True)
    at = impostor[len(impostor) // 100]  # the highest that is refused
    accepted = {}
    for i, j in pairs:
        if identity[i] == identity[j]:
            accepted.setdefault(identity[i], []).append(score[i, j] > at)
    expected = np.mean([np.mean(x) for x in accepted.values()])
    assert 0 < expected < 1
    assert experiment.measure(emb, identity).tar == pytest.approx(expected)


def test_the_interval_over_seeds_is_that_of_the_paired_t_test_and_people_widen_it():
    whole, alone = [0.83, 0.85, 0.84, 0.86, 0.85], [0.80, 0.84, 0.82, 0.82, 0.83]
    found = experiment.difference(whole, alone, np.full((5, 4), 0.01))
    expected = ttest_rel(whole, alone).confidence_interval(0.95)
    np.testing.assert_allclose((*found.seeds, found.value), (*expected, 0.024), rtol=1e-12)
    half = (found.seeds[1] - found.seeds[0]) / 2
    quantile = half / (np.std(found.each, ddof=1) / np.sqrt(5))
    assert (found.people[1] - found.people[0]) / 2 == pytest.approx(np.hypot(half, quantile * 0.02))
    # People who help in one seed and harm in the next are the seeds' noise.
    assert experiment.difference(whole, alone, np.outer([1, -1, 1, -1, 0], np.ones(4))).people == found.seeds
    with pytest.raises(ValueError, match="1 and 1 runs.*two at least"):
        experiment.difference([0.8], [0.7])


def test_within_a_pair_of_runs_only_the_groups_differ_and_all_see_as_many_photos():
    runs = experiment.grid((3, 4))
    assert len({run.name for run in runs}) == len(runs) == 4 * len(experiment.BATCHES)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for whole, alone in zip(runs[::2], runs[1::2], strict=True):
        first, second = whole.experiment, alone.experiment
        assert (first.loss.groups, second.loss.groups) == (1, experiment.DEVICES)
        assert dataclasses.replace(first, loss=second.loss) == second
        assert dataclasses.replace(first.loss, groups=experiment.DEVICES) == second.loss
        assert first.batch.people * first.batch.photos == experiment.DEVICES * whole.each
        assert (first.batch.photos, first.batch.singletons) == (2, 0)  # whole people in every group
        assert first.steps * experiment.DEVICES * whole.each == experiment.PHOTOS


def test_the_table_and_the_figure_are_of_the_seeds_of_which_both_runs_are_there():
    runs = experiment.grid((0, 1, 2), (8, 32))
    rng = np.random.default_rng(0)
    found = {
        run.name: {
            "auc": 0.80 + 0.05 * (run.arm == "global") + 0.001 * run.seed * (run.arm == "local"),
            "tar": 0.2,
            "report_auc": 0.9,
            "influence": (1e-4 * rng.normal(size=50)).tolist(),
        }
        for run in runs
    }
    del found["8-local-1"], found["32-global-0"], found["32-global-2"]
    (row,) = rows = experiment.summary(found, runs)  # one seed of 32 is left: no interval
    assert (row["each"], row["batch"], row["seeds"]) == (8, 64, [0, 2])
    assert row["auc"]["value"] == pytest.approx(0.049)
    json.dumps(rows)
    printed = experiment.table(rows)
    assert "80.10 %" in printed
    assert "+4.90 [+3.63, +6.17]" in printed
    assert "8 photos a device" in experiment.figure(rows)


@pytest.fixture
def trainer(monkeypatch, noise_photos):
    """Of a network that compiles in seconds, on photos of noise."""
    from faceembed.data import pairs, sources

    base = dataclasses.replace(
        experiment.BASE,
        preprocess=config.Preprocess(size=16),
        encoder=config.ConvNet(widths=(4,), blocks=(1,), dim=8),
    )
    monkeypatch.setattr(experiment, "BASE", base)
    monkeypatch.setattr(sources, "open_source", lambda *_, **__: noise_photos)
    monkeypatch.setattr(pairs, "load_people", lambda *_, **__: noise_photos)
    return experiment.Trainer(progress=False)


def test_alone_means_that_each_device_mines_its_own_photos_and_the_gradients_are_averaged(trainer, monkeypatch):
    import jax

    from faceembed import losses

    def flat(arm):
        run = experiment.Run(each=8, arm=arm, seed=0, photos=2 * 8 * experiment.DEVICES)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(trainer.variables(run)["params"])])

    whole, alone = flat("global"), flat("local")

    def device_by_device(emb, identity, *, groups, key, axis_name, **options):
        return jax.lax.pmean(losses.triplet_loss(emb, identity, **options), axis_name)

    monkeypatch.setattr(losses, "grouped_triplet_loss", device_by_device)
    trainer.updates.clear()
    expected = flat("local")
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
    assert np.abs(whole - expected).max() > 1e-3


def test_a_finished_run_counts_only_with_the_settings_of_the_one_that_is_wanted(tmp_path, monkeypatch):
    run = experiment.Run(each=8, arm="local", seed=1)
    path = tmp_path / f"{run.name}.json"
    assert experiment.finished(path, run) is None
    path.write_text(json.dumps({**experiment.settings(run), "auc": 0.8}))
    assert experiment.finished(path, run)["auc"] == 0.8
    # Of the same name:
    with pytest.raises(ValueError, match=r"other settings:(?s:.*)\n  photos: 48128 there, 640 now\nMove it away"):
        experiment.finished(path, dataclasses.replace(run, photos=640))
    monkeypatch.setattr(experiment, "BASE", dataclasses.replace(experiment.BASE, augment=config.Augment()))
    with pytest.raises(ValueError, match=r"settings:\n  experiment\.augment\.colour: 0\.2 there"):
        experiment.finished(path, run)
    path.write_text(json.dumps({**dataclasses.asdict(run), "auc": 0.8}))  # which says too little
    with pytest.raises(ValueError, match=r"(?s)colour: None there, .*and \d\d more\nMove"):
        experiment.finished(path, run)
