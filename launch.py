"""The command line: `python launch.py COMMAND …`; `python launch.py --help` lists the commands."""

import sys

from faceembed.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
