"""Verification .bin files: what InsightFace writes reads, and what an attacker writes does not run."""

import codecs
import io
import os
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faceembed.data import pairs as pair_lists
from faceembed.data.verification_bin import read_bin, read_pickle


def picture(grey):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


# Two people, "0/1" and "2/3"; photo 0 comes twice.
IMAGES = [picture(20 * i) for i in (0, 1, 2, 3, 0, 2)]
SAME = [True, True, False]


def written(tmp_path, content, protocol=2):
    path = tmp_path / "set.bin"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bytes", "arrays", "numpy labels", "numpy scalars"])
def test_every_protocol_and_form_reads(tmp_path, protocol, kind):
    images, same = IMAGES, SAME
    if kind == "arrays":
        images = [np.frombuffer(image, np.uint8) for image in IMAGES]
    elif kind == "numpy labels":
        same = np.array(SAME)
    elif kind == "numpy scalars":
        same = [np.bool_(value) for value in SAME]
    path = written(tmp_path, (images, same), protocol)
    pairs, photos = pair_lists.load_pairs(f"bin:{path}")
    assert pairs.same.tolist() == SAME
    assert pairs.fold is None
    assert len(photos) == 4
    assert not photos.named
    place = {key: i for i, key in enumerate(photos.keys)}
    keys = zip(pairs.key_a, pairs.key_b, strict=True)
    shown = [(photos.read(place[a])[0, 0, 0], photos.read(place[b])[0, 0, 0]) for a, b in keys]
    assert shown == [(0, 20), (40, 60), (0, 40)]
    first, second = pair_lists.resolve(pairs, photos)
    np.testing.assert_array_equal(photos.identity[first] == photos.identity[second], SAME)


def test_strings_of_python_2_are_bytes():
    # b"(lp0..." as Python 2 writes ([image], [True]) at protocol 0 and 2.
    assert read_pickle(b"((lp0\nS'ab'\np1\na(lp2\nI01\natp3\n.") == ([b"ab"], [1])
    assert read_pickle(b"\x80\x02]q\x00U\x03\xff\x00bq\x01a]q\x02\x88a\x86q\x03.") == ([b"\xff\x00b"], [True])


def test_folds_are_ten_of_consecutive_pairs(tmp_path):
    images = [picture(i) for i in range(80)]
    pairs, _ = pair_lists.load_pairs(f"bin:{written(tmp_path, (images, [True, False] * 20))}")
    np.testing.assert_array_equal(pairs.fold, np.repeat(np.arange(10), 4))


@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.binary(max_size=300) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
        max_leaves=8,
    ),
    protocol=st.integers(0, 5),
)
@settings(deadline=None, max_examples=150)
def test_plain_data_comes_back_as_unpickling_would_give_it(content, protocol):
    assert read_pickle(pickle.dumps(content, protocol=protocol)) == content


# ---- attacks -----------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it runs a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evals(Runs):
    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r})",)


class Nested(Runs):
    def __reduce__(self):
        return codecs.encode, (Runs(self.command), "latin1")


class Stated(Runs):
    def __reduce__(self):
        return codecs.encode, ("x", "latin1"), {"state": Runs(self.command)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("attack", [Runs, Evals, Nested, Stated])
def test_a_command_is_refused_by_name_and_not_run(tmp_path, attack, protocol):
    touched = tmp_path / "touched"
    payload = pickle.dumps(([attack(f"touch {touched}")], [True]), protocol=protocol)
    with pytest.raises(ValueError, match=r"asks to run (posix\.system|\w+\.eval)|instruction (EMPTY_)?DICT"):
        read_bin(written(tmp_path, payload))
    assert not touched.exists()
    # The attack is one: Python's own unpickler falls for it.
    with pytest.raises(Exception) if attack in (Nested, Stated) else _nothing():  # noqa: PT011
        pickle.loads(payload)
    assert touched.exists()


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return False


def arrays_of_objects():
    return pickle.dumps(([np.array([os.system], object)], [True]), protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks to run os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.", "asks to run builtins.exec"),
        (b"(S'true'\nios\nsystem\n.", "instruction INST"),
        (b"c_codecs\nencode\n(S'true'\nS'rot13'\ntR.", "encodes a bytes"),
        (b"c_codecs\nencode\n(V1\nVrot13\ntR.", "encodes a str as 'rot13'"),
        (b"c_codecs\nencode\n.", "names _codecs.encode as a value"),
        (b"c_codecs\nencode\n}b.", "instruction EMPTY_DICT"),
        (b"c_codecs\nencode\n(V1\ntb.", "sets the state of a _Callable"),
        (b"cnumpy\nndarray\n(tR.", "calls numpy.ndarray"),
        (b"]c_codecs\nencode\na.", "names _codecs.encode as a value"),
        (b"Pid\n.", "instruction PERSID"),
        (b"\x82\x01.", "instruction EXT1"),
        (b"\x80\x02]\x81.", "instruction NEWOBJ"),
        (arrays_of_objects(), "asks to run|an array of 'O8'"),
        (pickle.dumps([np.zeros(3)], protocol=2), "array of 'f8'"),
        (pickle.dumps({"a": 1}), "instruction EMPTY_DICT"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged or cut off"),  # bytes of 8 EiB
        (b"\x8a\xff" + b"\xff" * 100 + b".", "damaged or cut off"),
        (b"", "damaged or cut off"),
        (b"].", "list instead of|damaged"),
        (b"a.", "damaged or cut off"),
        (b"]].", "damaged or cut off"),
        (b"h\x05.", "damaged or cut off"),
        (pickle.dumps((IMAGES, SAME))[:-40], "damaged or cut off"),
        (pickle.dumps((IMAGES[:-1], SAME)), "5 images for 3 pairs"),
        (pickle.dumps((IMAGES, [1, 0, 2])), "not booleans"),
        (pickle.dumps((IMAGES, [])), "not booleans"),
        (pickle.dumps((["text"] * 6, SAME)), "image 0 is a str"),
        (pickle.dumps(([*IMAGES[:5], b""], SAME)), "image 5 is a bytes"),
        (pickle.dumps(([IMAGES[0], IMAGES[1]] * 2, [True, False])), "impostor pairs 1 .*contradict"),
    ],
)
def test_anything_else_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_bin(written(tmp_path, content))


def test_no_prefix_of_a_file_and_no_flipped_byte_ends_otherwise_than_by_a_message(tmp_path):
    whole = pickletools.optimize(pickle.dumps((IMAGES[:2], [True]), protocol=2))
    for cut in range(len(whole) - 1):
        with pytest.raises(ValueError, match="damaged|cut off|holds"):
            read_pickle(whole[:cut])
    rng = np.random.default_rng(0)
    for _ in range(2000):
        mangled = bytearray(whole)
        mangled[rng.integers(len(whole))] = rng.integers(256)
        try:
            read_bin(written(tmp_path, bytes(mangled)))
        except ValueError as error:
            message = str(error)
            assert "was not read" in message or "impostor pairs" in message


def test_a_small_file_cannot_take_time_or_memory_without_end():
    deep = b"(t" + b"q\x00h\x00h\x00\x86" * 60  # a tuple of itself twice, sixty times over
    huge = b"(" + b"\x8a\xff" + b"\x7f" * 255 + b"q\x01" + b"h\x01" * 50_000 + b"t"
    dtype = b"cnumpy\ndtype\n(V%s\ntR"
    frombuffer = b"cnumpy._core.numeric\n_frombuffer\n(C\x01a"
    copies = b"B\x10\x27\x00\x00" + 10_000 * b"a" + b"q\x050cnumpy._core.numeric\n_frombuffer\nq\x060"
    copies += dtype % b"u1" + b"q\x070" + b"(C\x01alq\x080" + b"V" + 10_000 * b"a" + b"\nq\x090"
    copies += b"c_codecs\nencode\nq\x0a0" + b"h\x0ah\x09\x85R0" * 1000 + b"]."
    for content, message in (
        (b"cnumpy\ndtype\n(" + deep + b"tR.", "where a name is due"),
        (frombuffer + dtype % b"u1" + huge + b"VC\ntR.", "a shape that is not theirs"),
        (copies, "by copying"),
        (b"]0" * 200_000 + b"].", "more than .* instructions"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pickle(content)


def test_an_image_that_does_not_decode_is_named_when_it_is_read(tmp_path):
    _, _, _, _, photos = read_bin(written(tmp_path, ([IMAGES[0], b"no image"], [True])))
    with pytest.raises(ValueError, match=r"set\.bin: image 1 \(of pair 0\) does not decode"):
        [photos.read(i) for i in range(2)]
