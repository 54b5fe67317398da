"""Fair comparison: contestants by turns in both orders, equal threads, memory by itself, and a table with its JSON.

A benchmark is a module of this package with `run(*, quick=False)`, which returns rows for `faceembed.report.table`
(rows with different values of "table" make tables of their own), and ends with `harness.main(run)`. Its docstring is
its notes: what is compared, and the bars.

Times are seconds of the wall clock. A ratio is that of two times of the same round, so that a busy machine slows both
alike; printed are its median and the 10 % and 90 % quantiles over the rounds.
"""

import argparse
import concurrent.futures
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from faceembed import report
from faceembed.cli import HUGE_PAGES

PAUSE = 0.02
"""Seconds of rest before each turn. Threads of OpenMP and of XLA spin for a while when their work is done, on the very
processors that the next contestant needs."""
TURN = 0.02
"""Seconds that a turn lasts at least: a quick call is made as often as that takes, and its mean counts."""
M_MMAP_THRESHOLD = -3
"""mallopt's name for the size from which on a block is memory of its own (malloc.h of the GNU C library)."""
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "torch", "pytorch-metric-learning")


class Spread(NamedTuple):
    """Quantiles of a measurement over the rounds."""

    q10: float
    median: float
    q90: float


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    rest: Callable[[float], object] = time.sleep,
) -> dict[str, list[float]]:
    """Times contestants by turns: A B, B A, A B, …

    Args:
      contestants: name → call. A call returns when its work is done: `jax.block_until_ready`, `torch.cuda.synchronize`.
      repeats: rounds.
      clock: seconds.
      rest: is given the seconds to wait before a turn.

    Returns:
      name → [repeats] seconds of one call. What does not count: two calls of each beforehand, which compile and warm up,
      and one at the start of each turn. Memory that a contestant gave back is given away while others run, and a virtual
      machine even returns it to its host: after 2 seconds of rest a training step of 0.4 s has taken 1.4 to 1.8 s.

    Raises:
      ValueError: there is no round.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: nothing would be measured. Give 1 or more.")
    calls = {}
    for name, call in contestants.items():
        call()
        began = clock()
        call()
        calls[name] = max(1, math.ceil(TURN / max(clock() - began, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for r in range(repeats):
        for name in list(contestants)[:: -1 if r % 2 else 1]:
            rest(PAUSE)
            contestants[name]()
            began = clock()
            for _ in range(calls[name]):
                contestants[name]()
            times[name].append((clock() - began) / calls[name])
    return times


def summary(times: Sequence[float]) -> Spread:
    """Median and 10 % and 90 % quantiles, interpolated linearly, in the unit of `times`."""
    return Spread(*np.quantile(times, [0.1, 0.5, 0.9]).tolist())


def ratio(times: dict[str, list[float]], slow: str, quick: str) -> Spread:
    """How many times as long one contestant takes as another, round by round."""
    return summary([a / b for a, b in zip(times[slow], times[quick], strict=True)])


def versus(
    times: dict[str, list[float]], peer: str, ours: str = "faceembed", *, images: int | None = None
) -> dict[str, float | None]:
    """Columns of a row: medians of both sides, and how many times as fast as the peer we are.

    Args:
      times: of `interleave`; a peer that is missing there leaves its columns empty.
      peer: name of the peer.
      ours: name of our contestant.
      images: in a call; the medians are then images a second, else milliseconds a call.

    Returns:
      {"<ours> ms": , "<peer> ms": , "ratio": , "q10": , "q90": }, or "img/s" for "ms".
    """
    unit = "ms" if images is None else "img/s"

    def middle(name: str) -> float | None:
        if name not in times:
            return None
        seconds = summary(times[name]).median
        return 1e3 * seconds if images is None else images / seconds

    spread = dict.fromkeys(("ratio", "q10", "q90"))
    if peer in times:
        q10, median, q90 = ratio(times, peer, ours)
        spread = {"ratio": median, "q10": q10, "q90": q90}
    return {f"{ours} {unit}": middle(ours), f"{peer} {unit}": middle(peer), **spread}


# --- Equal conditions


def available(*modules: str) -> bool:
    """Whether peers can be imported; where not, one line says what to install."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if lacking:
        packages = " ".join(name.replace("_", "-") for name in lacking)
        hint = " (CPU build: --index-url https://download.pytorch.org/whl/cpu)" if "torch" in lacking else ""
        print(f"note: {packages} not installed, so that peer is left out: pip install {packages}{hint}", flush=True)
    return not lacking


def processors() -> int:
    """CPUs that this process may run on; XLA's CPU back end starts as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def confine(count: int | None) -> None:
    """Keeps this process on so many CPUs from now on; None leaves it where it is. To be called before XLA starts.

    Raises:
      ValueError: there are fewer, or the system cannot confine a process.
    """
    if count is None or count == processors():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"--threads {count}: {platform.system()} cannot keep a process on some CPUs. Leave it out.")
    present = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(present):
        raise ValueError(
            f"--threads is {count}, and this process may use {len(present)} CPUs. Give 1 to {len(present)}."
        )
    os.sched_setaffinity(0, present[:count])


def on_cpu() -> bool:
    """Whether `prepare` chose the CPU; it is known before XLA starts, and in new processes."""
    return os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"


def pytorch() -> Any:
    """The torch module, with one thread a CPU of this process, as XLA has, and its defaults for TF32 switched off.

    Convolutions in float32 would otherwise be rounded to TF32 on a GPU, which XLA does too unless told: benchmarks set
    `jax.default_matmul_precision("highest")` beside this.
    """
    import torch

    torch.set_num_threads(processors())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch


def torch_device() -> str:
    """Where the peer computes: "cuda" or "cpu", as `prepare` chose.

    Raises:
      ValueError: torch sees no GPU.
    """
    import torch

    if on_cpu():
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(f"--device gpu: this torch ({torch.__version__}) sees no GPU; install a build that does.")
    return "cuda"


def threads() -> dict[str, int]:
    """{"XLA": , "PyTorch": }: threads on each side; PyTorch's where it is imported."""
    count = {"XLA": processors()}
    if "torch" in sys.modules:
        count["PyTorch"] = sys.modules["torch"].get_num_threads()
    return count


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, CPUs, load, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cpus": processors(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def others_seconds() -> float:
    """Processor seconds that all but this process and its finished children have used since the machine started.

    NaN where there is no /proc/stat. What a virtual machine's host took away counts as used by others.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return math.nan
    user, nice, system, _idle, _waiting, *rest = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    return user + nice + system + sum(rest) - sum(os.times()[:4])


# --- A process of its own


def fresh(function: Callable[..., Any], /, *args: Any, cpus: int | None = None, huge_pages: bool = True) -> Any:
    """`function(*args)` in a new process.

    Args:
      function: named at the top of a module.
      args: can be pickled, as the result.
      cpus: how many it runs on; None for all of this process's.
      huge_pages: whether the C library asks for pages of 2 MB for large arrays, as under `launch.py`.
    """
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {"GLIBC_TUNABLES": HUGE_PAGES if huge_pages else ""}),
        concurrent.futures.ProcessPoolExecutor(1, context, initializer=confine, initargs=(cpus,)) as pool,
    ):
        return pool.submit(function, *args).result()


def peak_bytes(
    make: Callable[..., Callable[[], object]], /, *args: Any, cpus: int | None = None, in_torch: bool = False
) -> int | None:
    """The most memory that one call of `make(*args)` holds at once beyond what its process held before it.

    Measured in a new process, at the second call: imports, inputs and compilation are in neither figure. On a CPU it is
    the high-water mark of the resident set, which Linux can reset: `getrusage`'s ru_maxrss cannot be, and a new process
    even inherits its parent's. On a GPU it is what the allocator reports.

    Args:
      make: named at the top of a module; its calls return when their work is done.
      *args: of `make`.
      cpus: as for `fresh`.
      in_torch: on a GPU, ask PyTorch's allocator and not JAX's.

    Returns:
      Bytes, or None where the system does not tell.
    """
    # Memory in pages of 2 MB would be counted in steps of 2 MB.
    return fresh(_peak, make, args, in_torch, cpus=cpus, huge_pages=False)


def _peak(make: Callable[..., Callable[[], object]], args: tuple[Any, ...], in_torch: bool) -> int | None:
    if not on_cpu():
        return _peak_on_gpu(make(*args), in_torch)
    try:
        # Freed memory that the C library keeps would hide the next call's need of it: large blocks go straight back to
        # the system from now on. It costs time, which is why nothing is timed in this process.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
        call = make(*args)
        call()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _peak_on_gpu(call: Callable[[], object], in_torch: bool) -> int:
    call()
    if in_torch:
        cuda = sys.modules["torch"].cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        return cuda.max_memory_allocated() - before
    import jax

    # JAX's peak cannot be reset: it is that of all its calls in this process, with what compilation tried out.
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] - statistics["bytes_in_use"]


# --- Command line


def main(run: Callable[..., list[dict[str, Any]]], arguments: Sequence[str] | None = None) -> None:
    """The command of one benchmark: measures, prints tables, writes JSON.

    Args:
      run: of the benchmark's module.
      arguments: of the command line; those given to the program by default.
    """
    about = sys.modules[run.__module__].__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        prepare(options.device, options.threads)
        result = measure(run, quick=options.quick)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if options.json:
        report.write_json(options.json, result | {"notes": about})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark and the command for all of them take."""
    parser.add_argument("--json", metavar="FILE", help="write the figures, too")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: whether it works at all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPUs for each side; all by default")


def prepare(device: str, count: int | None) -> None:
    """Settles device and CPUs of this process and of those it starts, before XLA starts.

    Raises:
      ValueError: there is no such device, or there are not so many CPUs.
    """
    confine(count)
    os.environ["JAX_PLATFORMS"] = "cuda" if device == "gpu" else "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    if device == "gpu":
        import jax

        try:
            jax.devices()
        except RuntimeError as error:
            raise ValueError(f"--device gpu: JAX sees no GPU ({error}). pip install -e '.[cuda13]'") from error


def measure(run: Callable[..., list[dict[str, Any]]], *, quick: bool) -> dict[str, Any]:
    """Runs a benchmark and prints its tables.

    Returns:
      {"machine": , "others": , "seconds": , "quick": , "rows": }; "others" is how many CPUs other programs kept busy
      meanwhile, on average.
    """
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    began, used = time.perf_counter(), others_seconds()
    rows = fresh(functools.partial(run, quick=quick))
    seconds = time.perf_counter() - began
    others = (others_seconds() - used) / seconds
    for title in dict.fromkeys(row.get("table", "") for row in rows):
        part = [{k: v for k, v in row.items() if k != "table"} for row in rows if row.get("table", "") == title]
        print(f"\n{title}\n{report.table(part)}" if title else f"\n{report.table(part)}")
    advice = ": measure again on a quiet machine" if others > 0.2 else ""
    print(
        f"\n{seconds:.0f} s; load at the start {about['load']:.1f}; other programs kept {others:.1f} CPUs busy{advice}."
    )
    return {"machine": about, "others": others, "seconds": seconds, "quick": quick, "rows": rows}
