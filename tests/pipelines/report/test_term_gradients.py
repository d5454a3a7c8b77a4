"""The table of the terms' gradients, from lines as training logs them."""

from __future__ import annotations

import json

from pipelines.report.charts import stage_charts
from pipelines.report.runs import read_runs
from pipelines.report.term_gradients import term_gradients


def test_medians_by_term_and_pair(make_run):
    folder = make_run("kd", terms=("reg", "res"), steps=4)
    log = folder / "01-DFT" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for number in (0, 2, 3):
        norms = {"gradient_norm/reg": 1.0 + number, "gradient_norm/res": 0.0 if number == 3 else 2.0}
        lines[number] |= norms | ({} if number == 3 else {"gradient_cosine/reg:res": 0.5 - number / 4})
        lines[number] |= {"weight/res": 0.5, "kept/reg": 0.25 * number}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs([folder])
    (found,) = term_gradients(runs)
    assert (found.run, found.stage, found.steps) == ("kd", "DFT", 3)
    reg, res = found.rows
    assert (reg.norm, reg.first, reg.last, reg.cosines) == ("3", "1", "4", ["", "0.25"])
    assert (res.norm, res.last, res.cosines) == ("2", "0", ["0.25", ""])
    assert {"weight/res", "kept/reg"} <= {chart.term for _, charts in stage_charts(runs) for chart in charts}
    assert not term_gradients(read_runs([make_run("other")]))
