"""``python -m kdcli``: the program, as the console script runs it."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # -m puts the current folder first, where a user may have a cli.py.
    if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[1]:
        del sys.path[0]
    from cli import main

    main(prog_name="kdcli")
