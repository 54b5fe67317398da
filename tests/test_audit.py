"""The audit's likelihoods against Gaussians written out, its searches against loops, and errors planted for it to find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from faceembed.audit import copies, labels


def drawn(seed, counts, *, d=32, rho=0.6):
    """Photos of people under the audit's own model, of unit length, and whose they are."""
    rng = np.random.default_rng(seed)
    identity = np.repeat(np.arange(len(counts)), counts)
    people = rng.normal(size=(len(counts), d)) * np.sqrt(rho)
    x = people[identity] + rng.normal(size=(len(identity), d)) * np.sqrt(1 - rho)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), identity


def log_density(photos, rho):
    """Of one person's photos [k, d], whose dimensions have variance 1/d: one Gaussian of k numbers a dimension."""
    k, d = photos.shape
    if k == 0:
        return 0.0
    covariance = (rho * np.ones((k, k)) + (1 - rho) * np.eye(k)) / d
    return stats.multivariate_normal(np.zeros(k), covariance).logpdf(photos.T.astype(np.float64)).sum()


# ---- likelihoods ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), rho=st.floats(0.1, 0.9))
def test_own_fit_orders_as_the_predictive_density_does(seed, rho):
    rng = np.random.default_rng(seed)
    x, identity = drawn(seed, rng.integers(1, 6, 7), d=8)
    fit, cosine = labels.own_fit(x, identity, rho=rho)
    for i in range(len(x)):
        others = np.delete(x[identity == identity[i]], np.flatnonzero(np.flatnonzero(identity == identity[i]) == i), 0)
        if not len(others):
            assert np.isnan(fit[i])
            assert np.isnan(cosine[i])
            continue
        predictive = log_density(np.vstack([others, x[i]]), rho) - log_density(others, rho)
        # fit drops what is equal for all photos: the density of a photo whose person is known exactly.
        constant = -0.5 * 8 * np.log(2 * np.pi * (1 - rho) / 8)
        assert fit[i] == pytest.approx((predictive - constant) / 8 * (1 - rho), abs=1e-5)
        centroid = others.sum(axis=0)
        assert cosine[i] == pytest.approx(x[i] @ centroid / np.linalg.norm(centroid), abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), rho=st.floats(0.1, 0.9))
def test_the_ratio_is_one_person_against_two(seed, rho):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 6)
    x, identity = drawn(seed, counts, d=8)
    sums = np.stack([x[identity == person].sum(axis=0) for person in range(6)]).astype(np.float64)
    table = labels.ratios(sums, counts, sums, counts, rho)
    for one in range(6):
        for other in range(6):
            a, b = x[identity == one], x[identity == other]
            if one == other:
                continue  # the same photos twice are no two sets of photos
            want = (log_density(np.vstack([a, b]), rho) - log_density(a, rho) - log_density(b, rho)) / 8
            assert table[one, other] == pytest.approx(want, abs=1e-4)
    pairs = labels._ratio(sums[:3], counts[:3], sums[3:], counts[3:], rho)
    np.testing.assert_allclose(pairs, table[np.arange(3), np.arange(3, 6)], atol=1e-4)


def test_pair_cosine_is_the_mean_over_people_of_the_mean_over_pairs():
    x, identity = drawn(3, [5, 1, 2, 9])
    means = []
    for person in (0, 2, 3):
        own = x[identity == person].astype(np.float64)
        product = own @ own.T
        means.append(product[np.triu_indices(len(own), 1)].mean())
    assert labels.pair_cosine(x, identity) == pytest.approx(np.mean(means), abs=1e-6)


# ---- searches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (7, 5), (1024, 8192)])
def test_the_nearest_people_are_those_of_a_loop_whatever_the_tiles(rows, columns):
    rng = np.random.default_rng(0)
    x, identity = drawn(1, rng.integers(1, 5, 11))
    people, fits = labels.nearest_people(x, identity, rho=0.5, rows=rows, columns=columns)
    for i in range(len(x)):
        of = {}
        for person in range(11):
            photos = x[identity == person].astype(np.float64)
            if person != identity[i]:
                lam = 1.0  # (1-ρ)/ρ
                r = 1 + 1 / (len(photos) + lam)
                mean = photos.sum(axis=0) / (len(photos) + lam)
                of[person] = -0.5 * (((x[i] - mean) ** 2).sum() / r + 0.5 * np.log(r))
        best = sorted(of, key=lambda person: (-round(of[person] * 2**16), person))[:3]
        assert people[i].tolist() == best
        np.testing.assert_allclose(fits[i], [of[person] for person in best], atol=2e-5)


def test_equal_people_go_to_the_lowest_number_and_missing_ones_are_marked():
    x, _ = drawn(5, [1, 1])
    twice = np.concatenate([x[:1], x[1:], x[1:]])
    people, fits = labels.nearest_people(twice, np.arange(3), rho=0.5, columns=1)
    assert people[0].tolist() == [1, 2, -1]
    assert people[1].tolist() == [2, 0, -1]
    assert np.isneginf(fits[:, 2]).all()


@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (16, 3), (5, 64)])
def test_people_of_equal_photos_stay_in_their_order_whatever_the_noise_of_a_product(rows, columns):
    """Three people have the same photos in other orders: their sums differ by rounding, their ranks must not."""
    x, identity = drawn(6, [7, 7, 7, 9, 9], d=64)
    x[7:14], x[14:21] = x[:7][::-1], x[[3, 1, 4, 0, 6, 2, 5]]
    people, fits = labels.nearest_people(x, identity, rho=0.5, rows=rows, columns=columns)
    last = identity >= 3
    place = np.argsort(people[last] == 0, axis=1)[:, -1]
    np.testing.assert_array_equal(fits % labels.GRAIN, 0)
    for row, at in zip(people[last], place, strict=True):
        assert row[at : at + 3].tolist() == [0, 1, 2][: 3 - at]


@pytest.mark.parametrize("tile", [1, 4, 1024])
def test_near_duplicates_are_those_of_a_loop(tile):
    rng = np.random.default_rng(2)
    x, identity = drawn(2, rng.integers(1, 6, 9), rho=0.3)
    # A copy in the own folder, and one in another's.
    x[np.flatnonzero(identity == 3)[0]] = x[np.flatnonzero(identity == 3)[-1]] if (identity == 3).sum() > 1 else x[0]
    x[0] = x[-1]
    near, _ = labels.nearest_people(x, identity, rho=0.3, k=8)
    first, second = copies.near_duplicates(x, identity, near, cosine=0.9, tile=tile)
    got = list(zip(first.tolist(), second.tolist(), strict=True))
    product = (x.astype(np.float64) @ x.T.astype(np.float64)).round(5)
    a, b = np.nonzero(np.triu(product >= 0.9, 1))
    assert (0, len(x) - 1) in got
    assert sorted(got) == list(zip(a.tolist(), b.tolist(), strict=True))
    assert (np.diff(product[first, second]) <= 0).all()


# ---- planted errors ------------------------------------------------------------------------------------------------------


def planted(seed=0, people=300, wrong=20):
    """Folders of 3 to 8 photos, of which some photos are moved into another folder. (x, identity, [n] whether moved)."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(3, 9, people)
    x, true = drawn(seed, counts)
    moved = rng.permutation(len(x))[:wrong]
    label = true.copy()
    label[moved] = (label[moved] + rng.integers(1, people, wrong)) % people
    order = np.argsort(label, kind="stable")
    return x[order], label[order], np.isin(order, moved), true[order]


def test_photos_moved_to_other_folders_are_found_first_with_whose_they_are():
    x, identity, moved, true = planted()
    x, _ = labels.centred(x, identity)
    found = labels.audit(x, identity)
    errors = found.label_errors
    first = errors.photo[:20]
    assert moved[first].sum() >= 19
    right = errors.somebody & moved[errors.photo]
    assert right.sum() >= 18
    np.testing.assert_array_equal(errors.looks_like[right], true[errors.photo[right]])
    np.testing.assert_array_equal(errors.person, identity[errors.photo])
    assert (np.diff(errors.margin) <= 0).all()
    # Few of those beyond are listed.
    assert (~moved[errors.photo]).sum() <= 0.01 * len(x)
    assert len(found.splits) <= 2


def test_a_set_without_errors_has_few_listed():
    x, identity, _, _ = planted(seed=4, wrong=0)
    x, _ = labels.centred(x, identity)
    found = labels.audit(x, identity)
    assert len(found.label_errors) <= 0.005 * len(x)
    assert len(found.splits) == 0
    assert len(found.merges) <= 1


def test_one_person_in_two_folders_and_two_in_one():
    rng = np.random.default_rng(7)
    counts = rng.integers(4, 9, 200)
    halved = np.arange(10, 22)
    counts[[*halved, 150, 199]] = 8
    x, true = drawn(7, counts)
    label = true.copy()
    for person in halved:  # half of the photos under a name of their own
        label[np.flatnonzero(true == person)[:4]] = 1000 + person
    label[true == 199] = 150  # and 150's folder holds 199's photos, too
    order = np.argsort(label, kind="stable")
    names, identity = np.unique(label[order], return_inverse=True)
    x, _ = labels.centred(x[order], identity)
    found = labels.audit(x, identity)
    pairs = np.stack([names[found.splits.first], names[found.splits.second]], axis=1)
    # The level is what half of such pairs reach, and nobody else does.
    np.testing.assert_array_equal(pairs[:, 1], 1000 + pairs[:, 0])
    assert 3 <= len(pairs) <= 12
    assert (np.diff(found.splits.score) <= 0).all()
    merged = found.merges
    assert names[merged.person[0]] == 150
    assert merged.size[0].tolist() == [8, 8]
    inside = names[identity] == 150
    side = merged.side[inside]
    np.testing.assert_array_equal(side == side[0], true[order][inside] == true[order][inside][0])
    assert (merged.side[~np.isin(identity, merged.person)] == -1).all()
    assert len(merged) <= 2


def test_photos_of_many_strangers_in_a_folder_are_no_second_person():
    """Half of a folder shows its person, half shows somebody else each time: two clusters, of which one is nobody's."""
    x, true = drawn(11, np.full(150, 8), rho=0.7)
    strangers = drawn(77, np.ones(80, int))[0].reshape(20, 4, -1)
    for person in range(20):
        x[true == person] = np.concatenate([x[true == person][:4], strangers[person]])
    together = np.where(true >= 130, true // 2 * 2, true)  # and here are ten folders of two people
    names, identity = np.unique(together, return_inverse=True)
    x, _ = labels.centred(x, identity)
    listed = names[labels.audit(x, identity).merges.person]
    assert len(listed) >= 4
    assert listed.min() >= 130


def test_the_clusters_of_one_person_are_no_two_people():
    """Poses divide anybody's photos in two: what counts is how far apart clusters of different people are."""
    rng = np.random.default_rng(4)
    counts = np.full(150, 10)
    people = rng.normal(size=(150, 48)) * np.sqrt(0.6)
    pose = rng.normal(size=(150, 48)) * np.sqrt(0.25)
    identity = np.repeat(np.arange(150), counts)
    x = people[identity] + np.where(np.arange(1500) % 2, 1, -1)[:, None] * pose[identity]
    x += rng.normal(size=x.shape) * np.sqrt(0.15)
    label = identity.copy()
    label[(identity >= 140) & (identity % 2 == 1)] -= 1  # five folders of two people
    _, who = np.unique(label, return_inverse=True)
    directions, _ = labels.centred(x, who)
    listed = labels.audit(directions, who).merges.person
    assert sorted(listed[:5].tolist()) == [140, 141, 142, 143, 144]
    assert len(listed) <= 15


@pytest.mark.parametrize("moved", [1, 3])
def test_a_few_photos_split_off_a_large_folder_are_found(moved):
    """How high a ratio can be depends on how many photos there are: the level does, too."""
    counts = np.full(120, 20)
    x, true = drawn(3, counts, d=64, rho=0.5)
    label = true.copy()
    for person in range(10, 40):
        label[np.flatnonzero(true == person)[:moved]] = 1000 + person
    order = np.argsort(label, kind="stable")
    names, identity = np.unique(label[order], return_inverse=True)
    x, _ = labels.centred(x[order], identity)
    splits = labels.audit(x, identity).splits
    np.testing.assert_array_equal(names[splits.second], 1000 + names[splits.first])
    assert 6 <= len(splits) <= 30


def test_what_photos_of_one_day_share_does_not_count_a_hundred_times():
    """Sessions that differ, in folders of 400 photos, are no two people, and a folder of two people comes before them."""
    rng = np.random.default_rng(0)
    counts = np.concatenate([np.full(4, 400), np.full(60, 8)])
    people = rng.normal(size=(len(counts), 64)) * np.sqrt(0.6)
    identity = np.repeat(np.arange(len(counts)), counts)
    session = np.where(np.arange(len(identity)) % 2, 1.0, -1.0)[:, None] * rng.normal(size=(len(counts), 64))[identity]
    x = people[identity] + 0.25 * session + rng.normal(size=(len(identity), 64)) * np.sqrt(0.35)
    label = identity.copy()
    mixed = np.flatnonzero(identity == 63)
    label[mixed] = 62  # two people of 8 in one folder
    order = np.argsort(label, kind="stable")
    names, who = np.unique(label[order], return_inverse=True)
    directions, _ = labels.centred(x[order], who)
    found = labels.audit(directions, who)
    assert names[found.merges.person].tolist()[:1] == [62]
    assert not {0, 1, 2, 3} & set(names[found.merges.person].tolist())


def test_many_wrong_labels_are_still_said_to_look_like_somebody():
    x, identity, moved, true = planted(seed=1, people=300, wrong=330)  # a fifth of all photos
    x, _ = labels.centred(x, identity)
    errors = labels.audit(x, identity).label_errors
    hit = moved[errors.photo]
    assert hit.sum() > 0.8 * moved.sum()
    assert hit.mean() > 0.9
    assert errors.somebody[hit].mean() > 0.6
    right = errors.somebody & hit
    assert (errors.looks_like[right] == true[errors.photo[right]]).mean() > 0.95


def test_a_photo_of_nobody_at_hand_is_listed_and_is_not_said_to_be_somebody():
    x, identity, _, _ = planted(seed=2, wrong=0)
    strangers, _ = drawn(99, np.ones(12, int))
    places = np.flatnonzero(np.bincount(identity)[identity] >= 5)[::40][:12]
    x[places] = strangers[: len(places)]
    x, _ = labels.centred(x, identity)
    errors = labels.audit(x, identity).label_errors
    listed = np.isin(places, errors.photo)
    assert listed.mean() > 0.8  # nine tenths, by the level
    assert not errors.somebody[np.isin(errors.photo, places)].any()
    assert np.isin(errors.photo, places).mean() > 0.7


def test_the_level_of_strangers_is_measured_on_strangers():
    """Two people, close together each: a photo of the own folder among the strangers would raise the level to 1."""
    x, identity = drawn(2, [6, 6], rho=0.98)
    x, _ = labels.centred(x, identity)
    assert labels.audit(x, identity).thresholds.stranger < 0


def test_folders_of_two_are_judged_and_said_to_be_unsure():
    x, true = drawn(1, [3, *[2] * 118, 4])
    label = true.copy()
    label[-1] = 60  # person 119's fourth photo lies in a folder of two …
    keep = np.arange(len(x)) != np.flatnonzero(true == 60)[0]  # … instead of one of its own
    order = np.argsort(label[keep], kind="stable")
    x, identity = x[keep][order], label[keep][order]
    wrong = np.flatnonzero(identity == 60)[-1]
    x, _ = labels.centred(x, identity)
    errors = labels.audit(x, identity).label_errors
    assert errors.photo[0] == wrong
    assert errors.looks_like[0] == 119
    assert errors.somebody[0]
    assert not errors.sure[0]
    np.testing.assert_array_equal(errors.sure, np.bincount(identity)[errors.person] > 2)


def test_two_people_are_enough_and_every_stranger_is_another():
    x, identity = drawn(2, [2, 2], rho=0.9)
    x, _ = labels.centred(x, identity)
    found = labels.audit(x, identity)
    assert np.isfinite(found.thresholds.stranger)
    assert np.isnan(found.thresholds.halves)
    assert len(found.splits) == 0


@pytest.mark.parametrize(
    ("emb", "identity", "message"),
    [
        (np.ones((4, 3)), [0, 0, 1], r"expected \[n, d\] and \[n\]"),
        (np.ones((4, 3)), [0, 1, 0, 1], "ascending order"),
        (np.ones((4, 3)), [1, 1, 2, 2], "ascending order"),
        (np.ones((4, 3)), [0, 0, 2, 2], "ascending order"),
        (np.ones((3, 3)), [0, 0, 1], "fewer than 2 have two photos"),
        (np.zeros((4, 3)), [0, 0, 1, 1], "the embedding 0 has no direction"),
        (np.ones((4, 3)), [0, 0, 1, 1], "the embedding 0 has no direction"),
        (np.array([[1, 0], [0, 1], [np.nan, 1], [1, 1]]), [0, 0, 1, 1], "the embedding 2 has no direction"),
    ],
)
def test_what_cannot_be_judged_is_refused(emb, identity, message):
    with pytest.raises(ValueError, match=message):
        labels.centred(emb, np.array(identity))


def test_centred_embeddings_lie_around_their_middle():
    x, identity = drawn(0, [3] * 40)
    moved, _ = labels.centred(7 * (x + 0.8), identity)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-6)
    means = np.stack([moved[identity == person].mean(axis=0) for person in range(40)])
    assert np.linalg.norm(means.mean(axis=0)) < 0.1
    shifted = x + np.float32(0.8)
    raw = np.stack([shifted[identity == person].mean(axis=0) for person in range(40)])
    assert np.linalg.norm(raw.mean(axis=0)) > 1


def scenes(rng, count):
    """Pictures with edges at several scales, uint8 [count, 64, 64, 3]."""
    made = np.zeros((count, 64, 64, 3))
    for cells in (4, 8, 16, 32):
        made += np.kron(rng.uniform(0, 64, (count, cells, cells, 3)), np.ones((1, 64 // cells, 64 // cells, 1)))
    return made.astype(np.uint8)


@pytest.mark.parametrize("planted_copies", [2, 20])
def test_copies_are_found_however_many_of_a_small_set_they_are(planted_copies):
    """60 folders of two photos: where both are one photograph, they must not raise the level that they are told by."""
    rng = np.random.default_rng(0)
    identity = np.repeat(np.arange(60), 2)
    photos = scenes(rng, 120)
    for person in range(planted_copies):
        photos[2 * person + 1] = copies.degraded(photos[2 * person])

    def embed(images):
        return images.reshape(len(images), 16, 4, 16, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)

    x, middle = labels.centred(embed(photos), identity)
    near, _ = labels.nearest_people(x, identity, rho=0.5)
    found = copies.find(x, identity, near, read=lambda chosen: photos[chosen], embed=embed, middle=middle, most=1000)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs <= {(2 * person, 2 * person + 1) for person in range(planted_copies)}
    assert len(pairs) >= 0.8 * planted_copies  # 19 of 20 pass each of two levels, on average
    assert not found.across.any()
    assert copies.all_but_one(found).tolist() == sorted(second for _, second in pairs)


# ---- pixels --------------------------------------------------------------------------------------------------------------


def test_copies_are_alike_in_their_edges_and_others_are_not():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(8, 40, 40, 1)), axis=1), axis=2)
    low, high = smooth.min(axis=(1, 2, 3), keepdims=True), smooth.max(axis=(1, 2, 3), keepdims=True)
    photos = np.repeat(((smooth - low) / (high - low) * 180 + 20), 3, axis=3).astype(np.uint8)[:, 4:36, 4:36]
    brighter = (photos * 0.7 + 60).astype(np.uint8)
    value, mirrored = copies.correlation(photos, brighter)
    assert value.min() > 0.95
    assert not mirrored.any()
    value, mirrored = copies.correlation(photos, brighter[:, :, ::-1])
    assert value.min() > 0.95
    assert mirrored.all()
    value, _ = copies.correlation(photos, np.roll(brighter, 1, axis=0))
    assert value.max() < 0.6
    flat = np.full((1, 32, 32, 3), 99, np.uint8)
    assert copies.correlation(flat, flat)[0] == 0
