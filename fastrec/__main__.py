# SPDX-License-Identifier: Apache-2.0
"""`fastrec` and `python -m fastrec`: the command line, or what is missing for it."""

import sys


def main() -> None:
    try:
        from fastrec import cli

        cli.main()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("fastrec"):
            raise
        sys.exit(f"fastrec: error: {missing.name} is missing: pip install 'fastrec[train]'")


if __name__ == "__main__":
    main()
