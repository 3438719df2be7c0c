# SPDX-License-Identifier: Apache-2.0
"""`fastrec` and `python -m fastrec`: the command line, or what is missing for it."""

import sys
from pathlib import Path

from fastrec import __version__

# What `fastrec --help` and `fastrec COMMAND --help` print. The parsers read the settings of all
# parts, and so import torch; who asks for help does not wait for it. `python tests/test_help.py`
# writes the files.
HELP = Path(__file__).parent / "help"


def saved_help(arguments: list[str]) -> str | None:
    """The text for arguments that ask for help and nothing else."""
    *command, asked = arguments or [""]
    file = HELP / f"{' '.join(command) or 'fastrec'}.txt"
    if asked not in ("-h", "--help") or len(command) > 1 or not file.is_file():
        return None
    return file.read_text()


def main() -> None:
    if sys.argv[1:] == ["--version"]:  # also where the packages of the command line are missing
        return print(f"fastrec {__version__}")
    if (text := saved_help(sys.argv[1:])) is not None:
        sys.stdout.write(text)
        return
    try:
        from fastrec import cli

        cli.main()
    except ModuleNotFoundError as missing:
        if missing.name is None:  # fastrec's own words
            sys.exit(f"fastrec: error: {missing}")
        if missing.name.startswith("fastrec"):
            raise
        package = missing.name.split(".")[0]
        sys.exit(f"fastrec: error: {package} is missing: pip install 'fastrec[train]'")


if __name__ == "__main__":
    main()
