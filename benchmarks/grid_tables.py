"""The tables of docs/results.md from finished grids: scores of every row and evaluation, and differences to the baseline, seed by seed.

    kdcli ablate benchmarks/grids/em_kd.toml --out runs/grids/em_kd --workers 2
    python -m benchmarks.grid_tables runs/grids/em_kd runs/grids/epic [--save]

``--save`` keeps what the tables are made of (means, spreads and every seed's scores) as ``benchmarks/results/grid-NAME.json``; saved
files may be given in place of folders.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipelines.terminal.tables import table

RESULTS = Path(__file__).parent / "results"
MEAN, NLL = "mean of families, %", "nll, nats a token"


def read(path: Path) -> dict[str, Any]:
    """A grid's results: of its folder, or as ``--save`` wrote them."""
    if path.is_file():
        return json.loads(path.read_text())
    body = json.loads((path / "results.json").read_text())
    cells = [
        {
            "row": cell["row"],
            "seed": cell["seed"],
            "losses": cell.get("losses"),
            "scores": {label: one["scores"] for label, one in cell.get("results", {}).items()},
        }
        for cell in body["cells"]
        if cell["state"] == "done"
    ]
    return {"grid": Path(body["grid"]).name, "tables": body["tables"], "cells": cells}


def spread(one: dict[str, Any] | None, digits: int, signed: bool = False) -> str:
    if not one:
        return "–"
    sign = "+" if signed else ""
    return f"{one['mean']:{sign}.{digits}f}" + (f" ± {one['std']:.{digits}f}" if one["std"] is not None else "")


def tables(body: dict[str, Any]) -> str:
    """One table a grid: a line a row, per evaluation exact match, nll and the paired difference of nll to the baseline."""
    baseline = next((one["less"] for one in body["tables"] if one.get("less")), None)
    rows = list(body["tables"][0]["rows"])
    several = len(body["tables"]) > 1
    parts = []
    for one in body["tables"]:
        against = one.get("differences", {})
        header = [one["evaluation"] if several else body["grid"].removesuffix(".toml"), "exact match, %", "nll"]
        header += [f"nll less {baseline}", "seeds"] if baseline else ["seeds"]
        lines = []
        for row in rows:
            values = one["rows"].get(row, {})
            cells = [row, spread(values.get(MEAN), 1), spread(values.get(NLL), 3)]
            if baseline:
                cells.append("" if row == baseline else spread(against.get(row, {}).get(NLL), 3, signed=True))
            lines.append([*cells, str(values[MEAN]["n"]) if values.get(MEAN) else "0"])
        parts.append(table(header, lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path, help="folders of `kdcli ablate`, or saved results")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    for path in options.grids:
        body = read(path)
        print(f"### {body['grid']}\n\n{tables(body)}\n")
        if options.save:
            target = RESULTS / f"grid-{body['grid'].removesuffix('.toml')}.json"
            target.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({"grids": [str(path) for path in options.grids]}))


if __name__ == "__main__":
    main()
