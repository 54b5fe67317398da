"""The command line, one file a command; each is imported when it is called, so that help and errors come at once."""

import difflib
import importlib
import io
import os
import sys
import traceback
from pathlib import Path

COMMANDS = {
    "train": "trains an experiment; the same command goes on where it was stopped",
    "verify": "compares verification heads on pairs of photos",
    "align": "finds the face in each photo of a source and writes crops",
    "enroll": "people into a gallery, from one photo each or several",
    "claim": "is this the person they say?  yes, no, or cannot tell",
    "identify": "who is this, of the people enrolled?  or not recognized",
    "gallery": "list, delete, rename, export and import the people of a gallery",
    "identification-report": "how many people can be enrolled, who of them is found, and which strangers are let in",
    "embed": "embeddings of a whole source, as .npz",
    "import-weights": "another project's pretrained network → a checkpoint of ours",
    "export": "a checkpoint → a file that runs without this code",
    "data": "prepare: builds a set once; info: what is in it; preview: a contact sheet; audit: doubtful labels, copies",
    "doctor": "devices, versions, mesh; what is missing and how to get it",
}

HELP = (
    "usage: python launch.py COMMAND …\n\n"
    + "\n".join(f"  {name:22}{text}" for name, text in COMMANDS.items())
    + "\n\npython launch.py COMMAND --help documents each.\n"
    "A first run, without any download:  python launch.py train quickstart"
)


HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""For GLIBC_TUNABLES: large arrays are to lie in pages of 2 MB (glibc 2.35 and later; nothing else reads it)."""

HUGE_PAGES_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Where Linux says who gets them: [always], those who ask by [madvise], or [never] anyone."""


def with_huge_pages(setting: Path = HUGE_PAGES_SETTING) -> None:
    """Starts this process anew with large arrays in huge pages, where Linux gives them to those who ask; else returns.

    On a CPU each update takes its temporary memory anew, a gigabyte or more, and the system then hands out every 4 kB
    of it at its first use: up to half of the time of a training step (`experiments/benchmarks/step.py`). The C library
    asks for pages of 2 MB if it is told to before the process starts.

    A GLIBC_TUNABLES that is set already, be it to nothing, stays as it is.
    """
    try:
        asked_for = "[madvise]" in setting.read_text()
    except OSError:
        return
    if asked_for and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(arguments: list[str]) -> int:
    """Runs one command.

    Args:
      arguments: what stands after `launch.py`.

    Returns:
      Exit status: 0, or 1 after an error, 2 after a command line that cannot be read, 130 after Ctrl-C. `claim` has 0
      for yes, 3 for no and 4 for cannot tell.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # `nohup … > log &` shows each line when it is printed
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        print(
            f"there is no command {name!r}; " + (f"did you mean {near[0]!r}?" if near else "see below."),
            file=sys.stderr,
        )
        print(HELP, file=sys.stderr)
        return 2
    try:
        status = importlib.import_module(f"faceembed.cli.{name.replace('-', '_')}").run(rest)
    except KeyboardInterrupt:
        again = " The same command goes on from the last checkpoint." if name == "train" else ""
        print(f"\nstopped.{again}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        # A message of ours says what to do, and a stack trace above it would only hide it. Anything raised elsewhere
        # is a fault of ours, and then the trace is what helps.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        of_a_file = isinstance(error, FileNotFoundError | FileExistsError | PermissionError)
        ours = of_a_file or Path(__file__).parents[1] in raised_in.parents
        if not ours or os.environ.get("FACEEMBED_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status or 0
