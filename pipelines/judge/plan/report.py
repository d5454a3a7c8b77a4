"""An estimate as Markdown tables, for a terminal or a proposal."""

from __future__ import annotations

from pipelines.judge.plan.assumed import assumed_line
from pipelines.judge.plan.lengths import Lengths
from pipelines.judge.plan.run import Estimate
from pipelines.terminal.tables import human_bytes, table

BARS = " ▁▂▃▄▅▆▇█"


def estimate_tables(one: Estimate) -> str:
    """Rows and tokens by part; lengths; bytes by column; totals, shards, hours; notes. What is wrong with the labels stands last, where
    a terminal ends."""
    return "\n\n".join([part_table(one), length_table(one), column_table(one), "\n".join(closing_lines(one))])


def part_table(one: Estimate) -> str:
    body = []
    for part in one.parts:
        skipped = ", ".join(f"{share:.1%} {reason}" for reason, share in part["skipped_share"].items()) or "none"
        usable, prepared = part["usable_rows"], f"{part['rows_prepared']:,}"
        pictures = human_bytes(part["image_bytes"] / usable) if usable else "–"
        body.append(
            [part["part"], f"{part['rows']:,}", prepared, f"{usable:,}", skipped, f"{part['tokens']:,}", pictures]
        )
    return table(["part", "rows", "looked at", "usable", "skipped", "tokens", "images a row"], body)


def length_table(one: Estimate) -> str:
    body = [
        [f"{x.part}: {x.kind}", f"{x.mean:.1f}", f"{x.p50:,}", f"{x.p95:,}", f"{x.largest:,}", bars(x)]
        for x in one.lengths
    ]
    return table(["tokens a row", "mean", "p50", "p95", "max", "rows from 0 to max"], body)


def bars(lengths: Lengths) -> str:
    """The histogram as one line; a bin that has any rows shows."""
    most = max(lengths.histogram)
    return "".join(BARS[max(1, round(8 * share / most))] if share else "·" for share in lengths.histogram)


def column_table(one: Estimate) -> str:
    body = []
    for column in one.columns:
        a_row = f"{column.bytes / column.token_rows:,.1f}" if column.token_rows else "–"
        a_sample = human_bytes(column.bytes / column.samples) if column.samples else "–"
        body.append([column.name, column.basis, a_row, a_sample, human_bytes(column.bytes)])
    body.append(["once for all shards", "", "", "", human_bytes(sum(one.once.values()))])
    samples = one.columns[0].samples
    body.append(["**all**", "", "", human_bytes(one.bytes / max(1, samples)), f"**{human_bytes(one.bytes)}**"])
    return table(["column", "basis", "B a token row", "a sample", "bytes"], body)


def closing_lines(one: Estimate) -> list[str]:
    largest = max(one.columns, key=lambda column: column.tar_bytes / max(1, column.tars))
    tar = human_bytes(largest.tar_bytes / max(1, largest.tars))
    rows = one.columns[0].samples / one.shards
    hours = one.hours
    return [
        f"- Teacher {one.teacher}: {one.tokens:,} tokens to read; {short(hours['gpu_hours'])} GPU-hours, {short(hours['wall_hours'])} h on "
        f"{hours['gpus']} GPUs ({hours['basis']}).",
        f"- Preparing rows, as fast as here and now: {short(hours['preparation_process_hours'])} process-hours, "
        f"{short(hours['preparation_wall_hours'])} h with one process a GPU"
        + (": slower than the teacher." if hours["preparation_wall_hours"] > hours["wall_hours"] else "."),
        f"- {one.shards} shards of about {rows:,.0f} rows; the largest tars ({largest.name}) {tar} each.",
        f"- Once for all shards: {', '.join(f'{name} {human_bytes(size)}' for name, size in one.once.items())}.",
        f"- Bytes ±{one.uncertainty:.1%} from the sampled rows alone (95 %); the basis of a column may add its own error.",
        f"- {assumed_line(one.assumes, one.bytes)}",
        *(f"- {line}" for line in one.chosen),
        *(f"- Note: {note}." for note in one.notes),
        *(f"- **WARNING**: {warning}." for warning in one.warnings),
    ]


def short(number: float) -> str:
    """Three significant digits, no exponent in sight."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else "< 0.001"
