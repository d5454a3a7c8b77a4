"""What to do where a part's rows fail alike: then the rows are not what is wrong."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.judge.doctor.report import Finding
from teacher_cache.sources import DataSpec

ALIKE = 0.9
"""Share of the rows that one reason takes, from which on it is said aloud."""
OF_IMAGES = ("image_missing", "image_corrupt", "image_too_large", "image_path_unsafe")
"""Reasons that only a row with an image has."""
FIXES = {
    "image_missing": "name the folder in which the paths of images start: --image-root FOLDER (image_root in kd.toml), here {root}",
    "image_path_unsafe": "name the folder above all images: --image-root FOLDER (image_root in kd.toml), here {root}; or give "
    "--follow-links where its links are yours",
    "image_too_large": "raise max_image_pixels of the part in kd.toml, here {pixels:,}",
    "over_length": "raise --max-length, or cut such rows at a turn border with --over-length cut",
    "placeholder_mismatch": "write one <image> for every picture of a row into its user turns",
    "bad_row": "bring the rows into one of the formats of docs/cache.md",
    "reserved_token": "take that text out of the rows, or use another --template",
    "images_unread": "use a teacher that reads images, or a mixture of text",
    "processor_refused": "use another teacher, or another --template",
}


def failing_alike(
    spec: DataSpec, rows: int, with_images: int, defects: Mapping[str, Finding], pictured: Mapping[str, int]
) -> list[str]:
    """A line for each reason for which (nearly) all rows of a part are defects, or all that have an image, however many text-only rows
    stand beside them.

    Args:
        with_images: usable rows that have some. pictured: reason → defective rows that have some.
    """
    said = []
    for reason, finding in defects.items():
        shares = {
            "rows": (finding.count, rows),
            "rows with images": (pictured.get(reason, 0), with_images + sum(pictured.values())),
        }
        for what, (count, of) in shares.items():
            if count and count >= ALIKE * of:
                said.append(_line(spec, reason, finding, f"{count:,} of {of:,} {what}"))
                break
    return said


def _line(spec: DataSpec, reason: str, finding: Finding, how_many: str) -> str:
    first = finding.examples[0] if finding.examples else None
    seen = f" ({first.place}: {first.detail})" if first else ""
    root = repr(spec.image_root) if spec.image_root else "not given"
    fix = FIXES.get(reason, "look at the first rows above").format(root=root, pixels=spec.max_image_pixels)
    return f"part {spec.part!r}: {how_many} fail for one reason, {reason}{seen}: {fix}"
