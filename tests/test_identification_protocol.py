"""Roles, draws, thresholds for identification, and a whole evaluation of people whose embeddings are known."""

import json

import numpy as np
import pytest

from faceembed import report
from faceembed.identification import openset, policy, pooling, protocol, tails


def embedded(people: int, photos: int | np.ndarray, *, seed: int = 0, noise: float = 0.6, d: int = 16):
    """(unit vectors [n, d], identity [n]) of people with so many photos each."""
    rng = np.random.default_rng(seed)
    count = np.broadcast_to(photos, people)
    identity = np.repeat(np.arange(people), count)
    x = rng.normal(size=(people, d))[identity] + noise * rng.normal(size=(len(identity), d))
    return x / np.linalg.norm(x, axis=1, keepdims=True), identity


def names(people: int) -> list[str]:
    return [f"p{i:04d}" for i in range(people)]


# ---- roles and draws ---------------------------------------------------------------------------------------------------


def test_people_with_one_photo_are_strangers_and_the_others_are_enrolled():
    enrolled, stranger = protocol.roles(names(5), [1, 2, 1, 7, 1])
    assert enrolled.tolist() == [False, True, False, True, False]
    assert stranger.tolist() == [True, False, True, False, True]


def test_where_too_few_have_one_photo_half_of_all_are_strangers_by_their_names():
    enrolled, stranger = protocol.roles(names(100), [1] * 10 + [3] * 90)
    assert stranger.sum() == 50
    assert stranger[:10].all()
    assert not (enrolled & stranger).any()
    assert (enrolled | stranger).all()
    # The name decides, not the place or who else is there.
    back = protocol.roles(names(100)[::-1], [3] * 90 + [1] * 10)[1][::-1]
    np.testing.assert_array_equal(back, stranger)


def test_roles_that_cannot_be_filled_are_refused():
    with pytest.raises(ValueError, match="one must be a stranger"):
        protocol.roles(names(2), [1, 1])
    with pytest.raises(ValueError, match="at least two people must be enrolled"):
        protocol.roles(names(3), [1, 1, 2])


@pytest.mark.parametrize("photos", [1, 2, 3])
def test_draws_never_search_with_an_enrolled_photo(photos):
    emb, identity = embedded(30, np.r_[np.full(10, 1), np.full(20, 4)])
    rng = np.random.default_rng(0)
    mixed = rng.permutation(len(identity))  # photos of a person need not lie together
    emb, identity = emb[mixed], identity[mixed]
    enrolled, stranger = protocol.roles(names(30), np.bincount(identity))
    drawn = protocol.draw(emb, identity, enrolled, stranger, photos=photos, draws=4, seed=1)
    pool = drawn.searches.mated.pool
    probes = drawn.probes.reshape(4, -1)
    for d in range(4):
        np.testing.assert_array_equal(identity[drawn.templates[d]], np.repeat(pool[:, None], photos, axis=1))
        np.testing.assert_array_equal(identity[probes[d]], pool)
        assert not np.isin(probes[d], drawn.templates[d]).any()
        assert len(np.unique(drawn.templates[d])) == drawn.templates[d].size
    assert not np.isin(identity[drawn.visitors], pool).any()
    assert len({tuple(row) for row in probes.tolist()}) == 4  # another photo each time
    # The scores are those of the photos named.
    gallery = pooling.pooled(emb[drawn.templates[2]])
    d2 = np.square(emb[probes[2]][:, None] - gallery).sum(axis=2)
    np.testing.assert_allclose(drawn.searches.mated.scores[2 * len(pool) : 3 * len(pool)], -d2, atol=1e-12)


def test_a_pool_needs_people_with_a_photo_to_search_with():
    emb, identity = embedded(6, np.array([1, 1, 1, 2, 2, 2]))
    enrolled, stranger = protocol.roles(names(6), np.bincount(identity))
    with pytest.raises(ValueError, match="0 people have more than 2 photos"):
        protocol.draw(emb, identity, enrolled, stranger, photos=2)


# ---- templates ---------------------------------------------------------------------------------------------------------


def test_pooled_directions_keep_their_length():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 8))
    w = rng.uniform(0.1, 1, (3, 4))
    for i, found in enumerate(pooling.pooled(x, w)):
        length = np.linalg.norm(x[i], axis=1)
        direction = (w[i][:, None] * x[i] / length[:, None]).sum(axis=0)
        expected = direction / np.linalg.norm(direction) * (w[i] @ length) / w[i].sum()
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(pooling.pooled(x[:, :1]), x[:, 0])  # one photo is itself, bit for bit
    with pytest.raises(ValueError, match="cancel out"):
        pooling.pooled(np.array([[1.0, 0], [-1, 0]]))


# ---- everybody among all others ----------------------------------------------------------------------------------------


def test_nobody_meets_a_photo_of_themself():
    emb, identity = embedded(12, np.r_[np.full(6, 1), np.full(6, 3)])
    found = policy.everybody(emb, identity, photos=2)
    assert len(found.pool) == 6  # who has two photos
    assert found.strangers == 12  # everybody searches
    own = found.who[:, None] == found.pool
    assert (found.scores[own] == -np.inf).all()
    assert np.isfinite(found.scores[~own]).all()
    assert set(found.sizes.tolist()) == {5, 6}
    with pytest.raises(ValueError, match="1 of 3 people have 4 photos or more"):
        policy.everybody(*embedded(3, np.array([1, 1, 4])), photos=4)


def test_of_too_many_people_some_are_taken(monkeypatch):
    monkeypatch.setattr(policy, "MOST_SCORES", 400)
    found = policy.everybody(*embedded(50, 2))
    assert found.scores.shape[0] == found.strangers == len(found.pool) == 20
    assert ((found.who[:, None] == found.pool) == (found.scores == -np.inf)).all()


# ---- thresholds --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated():
    emb, identity = embedded(400, np.r_[np.full(150, 1), np.full(250, 3)], seed=5)
    return policy.thresholds(emb, identity, fpirs=(0.1, 0.05, 0.001), photos=(1, 2, 5)), emb, identity


def test_thresholds_keep_their_fpir_for_every_gallery_of_these_people(calibrated):
    found, emb, identity = calibrated
    assert found["people"] == 400
    assert sorted({cut["photos"] for cut in found["cuts"]}) == [1, 2]  # nobody has five photos
    searches = policy.everybody(emb, identity, photos=2)
    cut = next(cut for cut in found["cuts"] if cut["photos"] == 2 and cut["fpir"] == 0.05)
    assert cut["pool"] == 249
    # 400 · (249 // k) searches, less half of those by the 250 who are the pool: one in twenty needs 600 to be printed, and
    # 200 to be told at all.
    assert (cut["printed_to"], cut["flagged_to"]) == (79, 249)
    for k, distance in zip(cut["k"], cut["distance"], strict=True):
        if k <= cut["flagged_to"]:
            realised = openset.fpir(searches, k, -distance).value
            assert 0.045 < realised <= 0.05 + 1e-4, k


def test_thresholds_grow_stricter_with_the_gallery_and_the_rate(calibrated):
    found = calibrated[0]
    for photos in (1, 2):
        rows = [np.array(cut["distance"]) for cut in found["cuts"] if cut["photos"] == photos]
        assert len(rows) == 3
        for row in rows:
            assert (np.diff(row) <= 0).all()
            assert (row >= 0).all()
        assert len(rows[0]) >= len(rows[1]) >= len(rows[2])  # rarer rates have thresholds for smaller galleries
        assert (rows[0][: len(rows[1])] >= rows[1]).all()
        assert (rows[1][: len(rows[2])] >= rows[2]).all()
    rare = next(cut for cut in found["cuts"] if cut["fpir"] == 0.001)
    for k in rare["k"]:
        # 400 people search in 399 // k galleries that share nobody, each two of them twice: one in a thousand needs 10,000
        # searches, or 30,000.
        searches = 200 * max(1, 399 // k)
        expected = "extrapolated" if k > 399 or searches < 10_000 else "flagged" if searches < 30_000 else "printed"
        assert policy.cut_for({"identification": found}, fpir=0.001, k=k).status == expected, k


def test_beyond_the_people_the_bound_of_the_union_holds(calibrated):
    """FPIR(K) <= K/M · FPIR(M): the threshold for a fivefold gallery is that of a fifth of the rate."""
    _, emb, identity = calibrated
    best = openset.ranked(policy.everybody(emb, identity))
    five = policy.set_cut(best, 0.1, 5 * best.pool)
    assert five.status == "extrapolated"
    assert five.distance == policy.set_cut(best, 0.1 * best.pool / (5 * best.pool), best.pool).distance
    more = policy.set_cut(best, 0.1, 6 * best.pool)
    drawn = [tail.threshold(0.1 / 6) for tail in tails.resampled(best, best.pool)]
    assert -more.distance == pytest.approx(np.quantile(drawn, 0.9))
    assert policy.set_cut(best, 0.1, 7 * best.pool) is None  # less than three of 200 searches


def test_a_few_people_set_few_thresholds_and_none_that_they_cannot():
    emb, identity = embedded(16, 2)
    found = policy.thresholds(emb, identity, fpirs=(0.1, 0.01))
    assert [(cut["photos"], cut["fpir"]) for cut in found["cuts"]] == [(1, 0.1)]
    assert found["cuts"][0]["k"] == [1]  # 16 · 15 / 2 searches of one; already of two they are too few for one in ten
    assert policy.thresholds(*embedded(2, 1), fpirs=(0.1,)) == {"people": 2, "cuts": []}
    assert policy.thresholds(*embedded(1, 3), fpirs=(0.1,)) == {"people": 1, "cuts": []}
    with pytest.raises(ValueError, match=r"it has them for none\. .* 2 set these"):
        policy.cut_for({"identification": {"people": 2, "cuts": []}}, fpir=0.1, k=5)
    with pytest.raises(ValueError, match=r"2 people are enrolled, .* for 1 at most: 16 people set them"):
        policy.cut_for({"identification": found}, fpir=0.1, k=2)


def test_a_tail_reaches_to_three_strangers_in_expectation(calibrated):
    _, emb, identity = calibrated
    best = openset.ranked(policy.everybody(emb, identity))
    assert best.searches(100) == 600
    least = 3 / 600
    assert policy.set_cut(best, least * 1.01, 100).status == "extrapolated"
    assert policy.set_cut(best, least * 0.99, 100) is None


def test_a_policy_is_read_strictly(calibrated):
    whole = {"identification": calibrated[0]}
    cut = policy.cut_for(whole, fpir=0.1, k=101)
    assert cut.k == 126  # the next larger size that has one
    listed = next(c for c in calibrated[0]["cuts"] if (c["photos"], c["fpir"]) == (1, 0.1))
    assert cut.distance == listed["distance"][listed["k"].index(126)]
    # People with more photos have thresholds of their own; of several the strictest counts.
    two = policy.cut_for(whole, fpir=0.1, k=50, photos=[2])
    one = policy.cut_for(whole, fpir=0.1, k=50)
    assert (one.photos, two.photos) == (1, 2)
    assert policy.cut_for(whole, fpir=0.1, k=50, photos=[1, 2]).distance == min(one.distance, two.distance)
    # Of more photos than thresholds were set for, the last is only an extrapolation: the mean moves on.
    assert policy.cut_for(whole, fpir=0.1, k=50, photos=[4]).status == "extrapolated"
    for nothing in (None, {}, {"heads": {}}):
        with pytest.raises(ValueError, match="--set-policy"):
            policy.cut_for(nothing, fpir=0.1, k=5)
    with pytest.raises(ValueError, match=r"rate of 0.02 of strangers; it has them for 0.1, 0.05, 0.001"):
        policy.cut_for(whole, fpir=0.02, k=5)
    with pytest.raises(ValueError, match=r"2,000,000 people are enrolled, .* for \d+,\d+ at most"):
        policy.cut_for(whole, fpir=0.1, k=2_000_000)


def test_between_two_numbers_of_photos_the_stricter_threshold_holds():
    cuts = [
        {"photos": n, "fpir": 0.1, "pool": 9, "k": [10], "distance": [d], "printed_to": 10, "flagged_to": 10}
        for n, d in ((1, 0.5), (2, 0.4), (5, 0.3))
    ]
    whole = {"identification": {"people": 9, "cuts": cuts}}
    distance = {n: policy.cut_for(whole, fpir=0.1, k=3, photos=[n]).distance for n in (1, 2, 3, 4, 5, 9)}
    assert distance == {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.3, 5: 0.3, 9: 0.3}
    cuts[2]["fpir"] = 0.2
    with pytest.raises(ValueError, match="no threshold for templates of 5 photos"):
        policy.cut_for(whole, fpir=0.1, k=3, photos=[4])


def test_distances_are_rounded_to_the_stricter_side_whatever_their_size():
    for distance in (1.0, 0.123456789, 0.2, 3.21e-7):
        rounded = policy._rounded_down(distance)
        assert distance * (1 - 2e-5) < rounded <= distance


def test_a_policy_survives_json(calibrated, tmp_path):
    report.write_json(tmp_path / "policy.json", {"identification": calibrated[0]})
    again = json.loads((tmp_path / "policy.json").read_text())
    assert policy.cut_for(again, fpir=0.05, k=30) == policy.cut_for({"identification": calibrated[0]}, fpir=0.05, k=30)


# ---- a whole evaluation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    count = np.r_[np.full(300, 1), np.full(60, 3), np.full(40, 7)]
    tested = embedded(400, count, seed=1)
    others = embedded(600, np.r_[np.full(400, 1), np.full(200, 6)], seed=2)
    return protocol.evaluate(*tested, names(400), others, sizes=(20, 100), draws=3), tested


def test_realised_rates_are_those_asked_for(results):
    found, _ = results
    assert (found.people, found.strangers, found.calibrated_on) == (100, 300, 600)
    for row in found.open_set:
        if row.status != "unresolvable":
            assert row.fpir.low <= row.cut.fpir <= row.fpir.high, row
        assert row.tpir.low <= row.tpir.value <= row.tpir.high
    assert {(row.k, row.photos) for row in found.open_set} == {(20, 1), (100, 1), (20, 2), (100, 2), (20, 5), (40, 5)}
    rates = {row.cut.fpir: row.status for row in found.open_set}
    assert (rates[0.1], rates[0.01]) == ("printed", "unresolvable")  # 300 strangers, whatever the gallery
    assert "not resolvable (needs 3,000)" in str(found)


def test_each_number_of_photos_has_a_threshold_of_its_own(results):
    found, _ = results
    others = embedded(600, np.r_[np.full(400, 1), np.full(200, 6)], seed=2)
    for row in found.open_set:
        best = openset.ranked(policy.everybody(*others, photos=row.photos))
        assert row.cut == policy.set_cut(best, row.cut.fpir, row.k, photos=row.photos)


def test_the_planner_turns_the_interval_around(results):
    found, (emb, identity) = results
    enrolled, stranger = protocol.roles(names(400), np.bincount(identity))
    mated = protocol.draw(emb, identity, enrolled, stranger, draws=3).searches.mated
    for row in found.planned[0.1]:
        rate = openset.tpir(mated, row.k, -row.cut.distance)
        assert (row.fnir.value, row.fnir.low, row.fnir.high) == (1 - rate.value, 1 - rate.high, 1 - rate.low)
    status = {row.k: row.cut.status for row in found.planned[0.1]}
    assert status[56] == "printed"
    rare = found.planned[0.01]
    assert [row.extrapolated for row in rare] == [row.k > 100 or row.cut.status == "extrapolated" for row in rare]


def test_backtests_hide_strangers_who_are_not_in_the_pool():
    emb, identity = embedded(900, 1, seed=4)
    found = protocol._backtests(emb, identity, 50, seed=0)
    assert found == []  # of 450 strangers 300 would be shown, and 150 cannot judge one in a hundred
    found = protocol._backtests(*embedded(3000, 1, seed=4), 50, seed=0)
    assert [(b.k, b.target, b.fitted_on, b.others) for b in found] == [(50, 0.01, 300, 1200)]


def test_galleries_are_those_that_people_fill():
    assert protocol._galleries((100, 250, 496), 496) == [100, 250, 496]
    assert protocol._galleries((100, 250, 496), 272) == [100, 250]  # 272 would say the same as 250
    assert protocol._galleries((100, 250, 496), 200) == [100, 200]
    assert protocol._galleries((100, 250), 93) == [93]


def test_more_photos_find_more_and_larger_galleries_fewer(results):
    found, _ = results
    at = {(row.k, row.photos): row.tpir.value for row in found.open_set if row.cut.fpir == 0.1}
    assert at[20, 1] < at[20, 2] < at[20, 5]
    assert at[20, 1] > at[100, 1]
    learnt = [row["open"].tpir.value for row in found.learning]
    assert len(learnt) == 5
    assert learnt[-1] > learnt[0]
    turned_away = [row.fnir.value for row in found.planned[0.1]]
    assert (np.diff(turned_away) >= -1e-12).all()
    assert [row.extrapolated for row in found.planned[0.1]] == [row.k > 100 for row in found.planned[0.1]]


def test_a_closed_set_names_somebody_always(results):
    found, _ = results
    row = next(row for row in found.closed_set if (row.k, row.photos) == (20, 5))
    assert row.cmc[-1] == pytest.approx(1)
    assert row.ranks[1].value == row.cmc[0]
    assert row.ranks[20].value == pytest.approx(1)


def test_strangers_let_in_are_really_strangers_and_near(results):
    found, (emb, identity) = results
    assert found.let_in
    who = [identity[row.probe] for row in found.let_in]
    assert len(set(who)) == len(who)
    assert max(who) < 300
    for row in found.let_in:
        assert identity[row.template] >= 300
        assert row.distance == pytest.approx(np.square(emb[row.probe] - emb[row.template]).sum())
    cut = next(r.cut.distance for r in found.open_set if (r.k, r.photos, r.cut.fpir) == (100, 1, 0.1))
    assert all(row.distance <= cut for row in found.let_in)
    assert [row.distance for row in found.let_in] == sorted(row.distance for row in found.let_in)


def test_results_are_json_and_the_same_again(results, tmp_path):
    found, tested = results
    report.write_json(tmp_path / "results.json", found.to_dict())
    others = embedded(600, np.r_[np.full(400, 1), np.full(200, 6)], seed=2)
    again = protocol.evaluate(*tested, names(400), others, sizes=(20, 100), draws=3)
    assert report.jsonable(again.to_dict()) == report.jsonable(found.to_dict())


def test_thresholds_know_nothing_of_the_tested_people(results):
    found, (emb, identity) = results
    others = embedded(600, np.r_[np.full(400, 1), np.full(200, 6)], seed=2)
    near = emb + 0.3  # all tested people look alike now
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    moved = protocol.evaluate(near, identity, names(400), others, sizes=(20, 100), draws=3)
    assert [row.cut for row in moved.open_set] == [row.cut for row in found.open_set]
    assert moved.open_set[0].fpir.low > found.open_set[0].fpir.high  # and so the realised rate tells


def test_galleries_larger_than_the_pool_are_refused():
    tested = embedded(40, np.r_[np.full(20, 1), np.full(20, 2)])
    with pytest.raises(ValueError, match="20 can be enrolled"):
        protocol.evaluate(*tested, names(40), embedded(40, 2, seed=9), sizes=(21,))


# ---- real photographs --------------------------------------------------------------------------------------------------


def test_realised_rates_are_those_asked_for_on_real_photographs(real_data):
    """LFW by its principal components, a weak encoder that needs no training: thresholds of View 1's training people,
    strangers of its test people, and the rates asked for lie in the intervals of those realised."""
    import io
    import tarfile

    from PIL import Image

    from faceembed.data import pairs

    lists = [pairs.read_lfw_people(real_data / "lfw" / f"peopleDev{part}.txt")[0] for part in ("Train", "Test")]
    # Everybody's first two photos of a third of the people: seconds instead of a minute.
    wanted = {str(name): part for part, people in enumerate(lists) for name in people[::3]}
    pixels, owner = [], []
    with tarfile.open(real_data / "lfw" / "lfw-deepfunneled.tgz") as archive:
        for member in archive:
            name, _, file = member.name.removeprefix("lfw-deepfunneled/").partition("/")
            if name in wanted and file.endswith(("_0001.jpg", "_0002.jpg")):
                photo = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("L")
                photo = photo.crop((55, 57, 196, 198)).resize((24, 24), Image.Resampling.BOX)
                pixels.append(np.asarray(photo, np.float64).ravel())
                owner.append(name)
    owner = np.array(owner)
    x = np.array(pixels)
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    train = np.array([wanted[name] == 0 for name in owner])
    middle = x[train].mean(axis=0)
    _, scale, axes = np.linalg.svd(x[train] - middle, full_matrices=False)
    emb = (x - middle) @ (axes[:40].T / scale[:40])
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    sides = []
    for chosen in (~train, train):
        people, identity = np.unique(owner[chosen], return_inverse=True)
        sides.append((emb[chosen], identity, people))
    found = protocol.evaluate(*sides[0], sides[1][:2], sizes=(20, 100), photos=(1,), fpirs=(0.1, 0.03), draws=2)
    assert found.strangers > 300
    assert found.calibrated_on > 1000
    assert len(found.open_set) == 4
    for row in found.open_set:
        assert row.cut.status == "printed"
        assert row.fpir.low <= row.cut.fpir <= row.fpir.high, row
    assert found.closed_set[0].ranks[1].value > 3 / 20  # better than chance: it is an encoder of a kind
