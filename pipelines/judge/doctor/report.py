"""What ``kdcli doctor`` found, as values and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.terminal.tables import table
from teacher_cache.errors import ROW_NOTES, SKIP_REASONS, printable
from teacher_cache.teachers.label_ends import END_KINDS

# What is worth knowing but costs no row: the image decodes and is used.
NOTES = {
    **ROW_NOTES,
    **END_KINDS,
    "cut": "rows over the length limit, cut at a turn border: their last turns are not used",
    "cut_images": "images that go with the turns that are cut",
    "extension_differs": "the image's content is of another kind than its file name says (GIF renamed .jpg)",
    "duplicate_ids": "rows whose id was seen before in the part (legal: ids are never keys)",
    "duplicate_images": "images whose bytes were seen before in the part (legal: a cache stores them once a shard)",
}


TABLE_ROWS = 5
"""Rows that a table names of a kind."""


@dataclass(frozen=True)
class Example:
    """One row where something was found."""

    place: str
    source_id: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """How often one kind was found, and its first rows in file order."""

    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class PartReport:
    """One part. Counts of row shapes are over the *usable* rows: ``with_images + text_only = usable``.

    Attributes:
        defects: by ``errors.SKIP_REASONS``; a row counts once, under the first defect found.
        notes: by ``NOTES``.
        warnings: what is wrong with the part as a whole, and its fix. shown: the first usable rows' last tokens (``doctor_rows.tail_of``).
    """

    part: str
    path: str
    rows: int
    usable: int
    with_images: int
    text_only: int
    multi_turn: int
    multi_image: int
    defects: dict[str, Finding]
    notes: dict[str, Finding]
    warnings: tuple[str, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        assert self.rows == self.usable + self.defective, f"{self.part}: rows are lost between usable and defective"
        assert self.usable == self.with_images + self.text_only, f"{self.part}: usable rows of no shape"

    @property
    def defective(self) -> int:
        return sum(finding.count for finding in self.defects.values())

    @property
    def defective_share(self) -> float:
        return self.defective / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class DoctorReport:
    """All parts of a mixture."""

    parts: tuple[PartReport, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def usable(self) -> int:
        return sum(part.usable for part in self.parts)

    @property
    def defective(self) -> int:
        return sum(part.defective for part in self.parts)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(warning for part in self.parts for warning in part.warnings)

    def worst(self) -> PartReport:
        """The part with the largest share of defective rows."""
        return max(self.parts, key=lambda part: part.defective_share)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        parts = [{**asdict(part), "defective": part.defective} for part in self.parts]
        counts = {"rows": self.rows, "usable": self.usable, "defective": self.defective}
        return {**counts, "warnings": list(self.warnings), "parts": parts}


def print_report(report: DoctorReport, console: Console, every_row: bool = False) -> None:
    """The report as tables, one a part; then what is wrong with whole parts, loud. every_row: with a line for each defect, under the
    tables, which name the first few."""
    for part in report.parts:
        _print_part(part, console)
        for row in part.shown:
            _line(console, shown_row(part.part, row))
    for line in every_line(report) if every_row else ():
        _line(console, line)
    for warning in report.warnings:
        _line(console, f"WARNING: {warning}", style="bold red")
    share = 100 * report.usable / report.rows if report.rows else 0.0
    verdict = f"{report.rows:,} rows = {report.usable:,} usable ({share:.2f} %) + {report.defective:,} defective"
    console.print(verdict, style="bold green" if not report.defective else "bold yellow")


def _line(console: Console, text: str, style: str | None = None) -> None:
    """Text as it is, wrapped by the terminal alone: it can be searched, and pasted."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def every_line(report: DoctorReport) -> Iterator[str]:
    """``part  defect  place  id  detail`` of every defect that is named."""
    for part in report.parts:
        for kind, finding in part.defects.items():
            yield from (f"{part.part}  {kind}  {_example_line(example)}" for example in finding.examples)


def shown_row(part: str, row: Mapping[str, Any]) -> str:
    """The last tokens of one row as a table."""
    head = (
        f"part {part!r}, {row['place']}: {row['tokens']:,} tokens, {row['image_tokens']:,} of them of images, "
        f"{row['labels']:,} labels; the last {len(row['tail'])} of the text:"
    )
    body = [
        [
            repr(one["token"]),
            str(one["id"]),
            one["role"],
            ("label, ends" if one["end"] else "label") if one["label"] else "–",
        ]
        for one in row["tail"]
    ]
    return f"{head}\n{table(['token', 'id', 'role', 'label'], body)}"


def _print_part(part: PartReport, console: Console) -> None:
    console.print(printable(f"part {part.part!r}: {part.path}"), style="bold", markup=False, highlight=False)
    console.print(
        f"  {part.rows:,} rows, {part.usable:,} usable: {part.with_images:,} with images "
        f"({part.multi_image:,} with several), {part.text_only:,} text only; {part.multi_turn:,} multi-turn",
        highlight=False,
    )
    for title, findings, meaning in (("defect", part.defects, SKIP_REASONS), ("note", part.notes, NOTES)):
        if not findings:
            continue
        table = Table(title, "rows", "first rows")
        table.columns[1].justify = "right"
        for kind, finding in findings.items():
            lines = [
                f"[dim]{escape(meaning[kind])}[/dim]",
                *(escape(_example_line(e)) for e in finding.examples[:TABLE_ROWS]),
            ]
            table.add_row(kind, f"{finding.count:,}", "\n".join(lines))
        console.print(table)


def _example_line(example: Example) -> str:
    words = [example.place, f"id {example.source_id[:60]!r}" if example.source_id else "", example.detail]
    return printable("  ".join(word for word in words if word))
