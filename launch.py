"""The command line: `python launch.py COMMAND …`; `python launch.py --help` lists the commands."""

import sys

from faceembed.cli import main, with_huge_pages

if __name__ == "__main__":
    with_huge_pages()
    sys.exit(main(sys.argv[1:]))
