"""Sources joined to one: every photo is read from its own part, and cut by its own square."""

import dataclasses

import numpy as np
import pytest

from faceembed.data import pipeline, sources
from faceembed.preprocess import Square, crop_square


def part(name, width, square, people):
    """Photos of one width whose pixels say which photo of which part they are."""
    keys, identity, names = [], [], sorted(people)
    for number, person in enumerate(names):
        keys += [f"{name}/{person}/{photo}" for photo in range(people[person])]
        identity += [number] * people[person]
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (len(keys), 60, width, 3), dtype=np.uint8)
    return sources.Photos(
        source=name, keys=np.array(keys), identity=np.array(identity, np.int32), people=np.array(names),
        read=lambda index: pixels[index], square=square, problems=(), fingerprint=name,
    )  # fmt: skip


def test_each_photo_keeps_its_person_its_pixels_and_its_square():
    one = part("one", 50, Square(x=20, y=25, side=30), {"10": 2, "7": 3})
    other = part("other", 80, lambda width: Square(x=width / 2, y=30, side=44), {"Ann": 1, "Bob": 2, "7": 1})
    both = sources.joined("both", [one, other])
    assert sorted(both.keys) == sorted([*one.keys, *other.keys])
    assert both.people.tolist() == ["10", "7", "Ann", "Bob"]
    assert (np.diff(both.identity) >= 0).all()
    crops = pipeline.decode_all(both, 20, progress=False)
    for source in (one, other):
        for index, key in enumerate(source.keys):
            [place] = np.flatnonzero(both.keys == key)
            assert both.people[both.identity[place]] == source.people[source.identity[index]]
            photo = source.read(index)
            square = source.square(80) if callable(source.square) else source.square
            np.testing.assert_array_equal(crops[place], crop_square(photo, square, 20))
    changed = dataclasses.replace(other, fingerprint="changed")
    assert sources.joined("both", [one, changed]).fingerprint != both.fingerprint


def test_parts_that_cannot_be_told_apart_are_refused():
    one, other = (part(name, 50, Square(x=20, y=25, side=30), {"a": 2}) for name in ("one", "other"))
    with pytest.raises(ValueError, match="other: photos 50 px wide need a square of their own"):
        sources.joined("both", [one, other])
    with pytest.raises(ValueError, match="need a square"):
        sources.joined("both", [dataclasses.replace(one, square=None), other])
    with pytest.raises(ValueError, match="photos of one key"):
        sources.joined("both", [one, dataclasses.replace(part("one", 60, one.square, {"a": 1}))])
