"""Verification sets as InsightFace distributes them (lfw.bin, cfp_fp.bin, agedb_30.bin), read without unpickling.

Such a file is a pickle of (images, same): encoded images, two a pair in turn, and a boolean a pair. It comes from
strangers, and unpickling a stranger's file runs whatever code it names. So nothing is unpickled here: an interpreter of the
instructions that such files need builds lists, tuples, bytes, numbers and arrays of bytes, calls nothing that the file
names, and refuses the rest by name. (A `pickle.Unpickler` with its own `find_class` would still run the machine that builds
objects and sets their states; here there is none.) What is built is in proportion to the file: a small one cannot fill the
memory.
"""

import hashlib
import io
import math
import pickletools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from faceembed.data import sources
from faceembed.data.sources import Photos

FOLDS = 10
"""As the field's own scripts have; made of consecutive pairs where their number divides."""


_FEW, _BYTES_EACH = 100_000, 16
"""Instructions that any file may have, and bytes that it needs for each beyond: an image is thousands of bytes, and some
twenty instructions at most."""


class Refused(ValueError):
    """The file asks for something that no verification list needs."""


class _Array:
    """A NumPy array in the making: empty when it is named, filled by its state."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


_MARK = object()
_DTYPES = {"u1": np.uint8, "b1": np.bool_, "?": np.bool_, "bool": np.bool_, "uint8": np.uint8}


def read_pickle(data: bytes) -> Any:
    """What a pickle of plain data holds: lists, tuples, bytes, text, numbers, booleans, None, arrays of uint8 or bool.

    Args:
      data: of any protocol, from Python 2 as well (whose strings become bytes).

    Raises:
      Refused: the pickle names anything else to call or to build, which is then NOT called; or it would grow far beyond
        its own size.
      ValueError: it is damaged or cut off.

    >>> import pickle
    >>> read_pickle(pickle.dumps(([b"a", b"b"], [True])))
    ([b'a', b'b'], [True])
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    most, made = _FEW + len(data) // _BYTES_EACH, 0
    try:
        for number, (opcode, arg, _) in enumerate(_instructions(data)):
            name = opcode.name
            if number == most:
                raise Refused(f"it has more than {most:,} instructions in {len(data):,} bytes: no list of images has")
            if name == "STOP":
                [result] = stack
                return _plain(result)
            if name not in _OPCODES:
                raise Refused(f"it holds the instruction {name}, which no verification list needs")
            _OPCODES[name](stack, memo, arg)
            if name in ("REDUCE", "BUILD"):
                # The only ones that copy, and what they copy may be fetched from the memo again and again.
                made += _size(stack[-1])
                if made > len(data):
                    raise Refused(f"it makes more than its own {len(data):,} bytes by copying: no list of images does")
    except Refused:
        raise
    # What a cut-off or mangled stream does to an interpreter: names of opcodes, memo entries and items are not there.
    except (ValueError, IndexError, KeyError, TypeError, UnicodeError, OverflowError, AttributeError) as error:
        raise ValueError(f"it is damaged or cut off: {error}") from error
    raise ValueError("it is cut off: its end is missing")


def _instructions(data: bytes) -> Iterator[tuple[Any, Any, Any]]:
    with warnings.catch_warnings():
        # Of the escapes in a mangled string.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield from pickletools.genops(io.BytesIO(data))


def _size(value: Any) -> int:
    """Bytes that were copied to make it."""
    value = value.value if isinstance(value, _Array) else value
    return len(value) if isinstance(value, bytes) else int(value.nbytes) if isinstance(value, np.ndarray) else 0


def _plain(value: Any) -> Any:
    """A finished array instead of one in the making; something to call is no value."""
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array is named and never filled")
        return value.value
    if isinstance(value, _Callable):
        raise Refused(f"it names {value.name} as a value")
    return value


# ---- instructions ------------------------------------------------------------------------------------------------------

Instruction = Callable[[list[Any], dict[int, Any], Any], None]


class _Callable:
    """Something that the file names; what stands for it here is called with checked arguments, never the thing itself."""

    def __init__(self, name: str, stand_in: Callable[..., Any] | None) -> None:
        self.name, self.stand_in = name, stand_in


def _push(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    stack.append(arg)


def _push_bytes(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    # pickletools decodes the strings of Python 2 as Latin-1, which undoes exactly.
    stack.append(arg.encode("latin-1") if isinstance(arg, str) else bytes(arg))


def _since_mark(stack: list[Any]) -> list[Any]:
    at = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), None)
    if at is None:
        raise ValueError("the beginning of a group is missing")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _take(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count or any(item is _MARK for item in stack[len(stack) - count :]):
        raise ValueError("too few items for an instruction")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def _append(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    [item] = _take(stack, 1)
    _list_of(stack).append(_plain(item))


def _appends(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    items = _since_mark(stack)
    _list_of(stack).extend(map(_plain, items))


def _list_of(stack: list[Any]) -> list[Any]:
    if not isinstance(stack[-1], list):
        raise Refused(f"it appends to a {type(stack[-1]).__name__}")
    return stack[-1]


def _tuple(count: int | None) -> Instruction:
    def make(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
        items = _since_mark(stack) if count is None else _take(stack, count)
        # Arguments of a call are tuples, too, and hold what has no value of its own.
        stack.append(
            tuple(item.value if isinstance(item, _Array) and item.value is not None else item for item in items)
        )

    return make


def _put(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    memo[len(memo) if arg is None else int(arg)] = stack[-1]


def _named(stack: list[Any], name: str) -> None:
    if name not in _CALLABLES:
        raise Refused(
            f"it asks to run {name[:100]}, which no verification list needs: it may be an attack. Nothing of it was run"
        )
    stack.append(_Callable(name, _CALLABLES[name]))


def _stack_global(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    _named(stack, ".".join(map(_text, _take(stack, 2))))


def _reduce(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    function, arguments = _take(stack, 2)
    if not isinstance(function, _Callable) or function.stand_in is None or not isinstance(arguments, tuple):
        raise Refused(f"it calls {getattr(function, 'name', type(function).__name__)} with {type(arguments).__name__}")
    stack.append(function.stand_in(*arguments))


def _build(stack: list[Any], memo: dict[int, Any], arg: Any) -> None:
    [state] = _take(stack, 1)
    target = stack[-1]
    if isinstance(target, np.dtype):  # its byte order, of which one byte has none
        return
    if not isinstance(target, _Array) or not isinstance(state, tuple) or len(state) != 5:
        raise Refused(f"it sets the state of a {type(target).__name__}")
    _, shape, dtype, fortran, content = state
    if fortran:
        raise Refused("it holds an array in Fortran's order")
    target.value = _filled(content, dtype, shape)


def _filled(content: Any, dtype: Any, shape: Any) -> np.ndarray:
    content = content.encode("latin-1") if isinstance(content, str) else content
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes) or not isinstance(shape, tuple):
        raise Refused(f"it holds an array of {type(content).__name__} and {type(dtype).__name__}")
    # Bounded before they are multiplied: a product of a million huge numbers would never end.
    if len(shape) > 4 or not all(isinstance(size, int) and 0 <= size <= len(content) for size in shape):
        raise ValueError(f"an array of {len(content)} bytes has a shape that is not theirs")
    if math.prod(shape) != len(content):
        raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
    if dtype.kind == "b" and content.strip(b"\0\1"):
        raise ValueError("a boolean is neither 0 nor 1")
    return np.frombuffer(content, dtype).reshape(shape)


def _text(value: Any) -> str:
    # Never str() of anything else: a tuple of tuples of one tuple, 40 deep, is a small file and a text without end.
    if not isinstance(value, str | bytes):
        raise Refused(f"it has a {type(value).__name__} where a name is due")
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _dtype(name: Any, *_: Any) -> np.dtype:
    if _text(name) not in _DTYPES:
        raise Refused(f"it holds an array of {_text(name)[:20]!r}: expected bytes or booleans")
    return np.dtype(_DTYPES[_text(name)])


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    # How Python 3 writes bytes for Python 2 to read.
    if not isinstance(text, str) or _text(codec) not in ("latin1", "latin-1"):
        raise Refused(f"it encodes a {type(text).__name__} as {_text(codec)[:20]!r}")
    return text.encode("latin-1")


def _scalar(dtype: Any, content: Any) -> Any:
    return _filled(content, dtype, ()).item()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if _text(order) != "C":
        raise Refused(f"it holds an array in the order {_text(order)[:20]!r}")
    return _filled(content, dtype, shape)


_CALLABLES: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    # How Python 3 writes no bytes at all for Python 2.
    **dict.fromkeys(("__builtin__.bytes", "builtins.bytes"), lambda: b""),
    "numpy.ndarray": None,  # an argument of _reconstruct
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
}
"""What a file may name → what is done here instead."""

_OPCODES: dict[str, Instruction] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda stack, memo, arg: None),
    "MARK": lambda stack, memo, arg: stack.append(_MARK),
    "POP": lambda stack, memo, arg: stack.pop() and None,
    "NONE": lambda stack, memo, arg: stack.append(None),
    "NEWTRUE": lambda stack, memo, arg: stack.append(True),
    "NEWFALSE": lambda stack, memo, arg: stack.append(False),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"), _push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push_bytes),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push_bytes),
    "EMPTY_LIST": lambda stack, memo, arg: stack.append([]),
    "LIST": lambda stack, memo, arg: stack.append([_plain(item) for item in _since_mark(stack)]),
    "APPEND": _append,
    "APPENDS": _appends,
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": _tuple(None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda stack, memo, arg: stack.append(memo[int(arg)])),
    "GLOBAL": lambda stack, memo, arg: _named(stack, arg.replace(" ", ".")),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
}


# ---- lists ---------------------------------------------------------------------------------------------------------------


def read_bin(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, Photos]:
    """A verification set of InsightFace's.

    The file names no people. Who is who follows from the pairs: photos joined by genuine pairs, directly or through others,
    show one person. The same bytes in several pairs are one photo, so that pairs that share it are known to.

    Returns:
      (key_a, key_b [n] str, same [n] bool, fold [n] int32 or None, photos): ten folds of consecutive pairs, as the field's
      scripts make them, where the number of pairs divides by ten.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it asks for anything but images and booleans, is damaged, or does not fit together. Images are decoded
        when they are read, and one that does not decode is named then.
    """
    data = path.read_bytes()
    try:
        content = read_pickle(data)
        images, same = _checked(content)
    except ValueError as error:
        raise ValueError(f"{path} was not read: {error}.") from error
    # A list may hold one image many times; it is hashed once.
    digest = {
        id(image): hashlib.sha256(image).hexdigest()[:16] for image in {id(image): image for image in images}.values()
    }
    digests = [digest[id(image)] for image in images]
    unique, first, place = np.unique(digests, return_index=True, return_inverse=True)
    a, b = place[0::2], place[1::2]
    joined = coo_matrix((np.ones(int(same.sum()), bool), (a[same], b[same])), (len(unique), len(unique)))
    _, person = connected_components(joined, directed=False)
    wrong = np.flatnonzero(~same & (person[a] == person[b]))
    if len(wrong):
        shown = ", ".join(map(str, wrong[:10])) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise ValueError(
            f"{path}: impostor pairs {shown} (counted from 0) are of one photo, or of photos that genuine pairs join into "
            "one person. The labels contradict each other: get the file again."
        )
    # A person is called after one of their photos.
    leader = np.full(person.max() + 1, len(unique))
    np.minimum.at(leader, person, np.arange(len(unique)))
    order, keys, identity, people = sources.arrange(unique.tolist(), unique[leader[person]].tolist())
    where = first[order]

    def read(index: int) -> np.ndarray:
        at = int(where[index])
        try:
            return sources.decode(images[at], most=sources.MOST_IN_RECORD)
        except ValueError as error:
            raise ValueError(f"{path}: image {at} (of pair {at // 2}) does not decode: {error}.") from error

    photos = Photos(
        source=f"bin:{path}",
        keys=keys,
        identity=identity,
        people=people,
        read=read,
        square=None,
        problems=(),
        fingerprint=hashlib.sha256(data).hexdigest(),
        named=False,
    )
    fold = None
    if len(same) % FOLDS == 0:
        fold = np.repeat(np.arange(FOLDS, dtype=np.int32), len(same) // FOLDS)
    return unique[a], unique[b], same, fold, photos


def _checked(content: Any) -> tuple[list[bytes], np.ndarray]:
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise ValueError(f"it holds a {type(content).__name__} instead of (images, same)")
    if not isinstance(content[0], list | tuple) or not isinstance(content[1], list | tuple | np.ndarray):
        kinds = " and ".join(type(part).__name__ for part in content)
        raise ValueError(f"it holds {kinds} instead of a list of images and a list of labels")
    if isinstance(content[1], np.ndarray) and content[1].ndim != 1:
        raise ValueError(f"its labels have shape {content[1].shape}")
    found = [_plain(image) for image in content[0]]
    odd = next((i for i, image in enumerate(found) if not _is_encoded(image)), None)
    if odd is not None:
        form = f" {found[odd].dtype} {found[odd].shape}" if isinstance(found[odd], np.ndarray) else ""
        raise ValueError(f"image {odd} is a {type(found[odd]).__name__}{form}, not an encoded image")
    # Each array is copied once, however often the list holds it.
    copies = {
        id(image): image.tobytes()
        for image in {id(image): image for image in found}.values()
        if isinstance(image, np.ndarray)
    }
    images = [copies.get(id(image), image) for image in found]
    same = [_plain(value) for value in (content[1].tolist() if isinstance(content[1], np.ndarray) else content[1])]
    if not all(isinstance(value, int) and value in (0, 1) for value in same) or not same:
        raise ValueError("its labels are not booleans")
    if len(images) != 2 * len(same):
        raise ValueError(f"it has {len(images)} images for {len(same)} pairs: expected two a pair")
    return images, np.array(same, bool)


def _is_encoded(image: Any) -> bool:
    """Whether it may be a file's bytes, as such or as the uint8 row that MXNet made of them."""
    if isinstance(image, np.ndarray):
        return image.ndim == 1 and image.dtype == np.uint8 and image.size > 0
    return isinstance(image, bytes) and len(image) > 0
