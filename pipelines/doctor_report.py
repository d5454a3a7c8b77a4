"""What ``kdcli doctor`` found, as values and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_cache.errors import ROW_NOTES, SKIP_REASONS, printable

# What is worth knowing but costs no row: the image decodes and is used.
NOTES = {
    **ROW_NOTES,
    "extension_differs": "the image's content is of another kind than its file name says (GIF renamed .jpg)",
    "duplicate_ids": "rows whose id was seen before in the part (legal: ids are never keys)",
    "duplicate_images": "images whose bytes were seen before in the part (legal: a cache stores them once a shard)",
}


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

    def __post_init__(self) -> None:
        assert self.rows == self.usable + self.defective, f"{self.part}: rows are lost between usable and defective"
        assert self.usable == self.with_images + self.text_only, f"{self.part}: usable rows of no shape"

    @property
    def defective(self) -> int:
        return sum(finding.count for finding in self.defects.values())


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

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        parts = [{**asdict(part), "defective": part.defective} for part in self.parts]
        return {"rows": self.rows, "usable": self.usable, "defective": self.defective, "parts": parts}


def print_report(report: DoctorReport, console: Console) -> None:
    """The report as tables, one a part."""
    for part in report.parts:
        _print_part(part, console)
    share = 100 * report.usable / report.rows if report.rows else 0.0
    verdict = f"{report.rows:,} rows = {report.usable:,} usable ({share:.2f} %) + {report.defective:,} defective"
    console.print(verdict, style="bold green" if not report.defective else "bold yellow")


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
            lines = [f"[dim]{escape(meaning[kind])}[/dim]", *(escape(_example_line(e)) for e in finding.examples)]
            table.add_row(kind, f"{finding.count:,}", "\n".join(lines))
        console.print(table)


def _example_line(example: Example) -> str:
    words = [example.place, f"id {example.source_id[:60]!r}" if example.source_id else "", example.detail]
    return printable("  ".join(word for word in words if word))
