"""Results as text tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from teacher_cache.errors import ROW_NOTES
from teacher_cache.reading.verify import Problem
from teacher_cache.records import View


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right; Markdown, so that it can be pasted."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def export_lines(result: Mapping[str, Any]) -> str:
    """What ``kdcli export`` wrote, and what its check saw."""
    has = result["compressor"]
    kind = f"compressor {has['name']}, {has['vision_tokens']} vision tokens an image" if has else "a stock student"
    lines = [f"{result['folder']}: {result['model']} as {result['dtype']}, {kind}, {human_bytes(result['bytes'])}"]
    if has:
        lines.append("its classes are in the folder: load it with trust_remote_code=True")
    if check := result.get("check"):
        lines.append(
            f"check: a fresh process with plain transformers gives the same tokens on {check['rows']} rows, logits within "
            f"{check['difference']:.1e} (bound {check['bound']:.1e}, float32 arithmetic), and generates"
        )
        if result["dtype"] != "float32":
            lines.append(f"rounding the weights to {result['dtype']} moved logits by up to {check['rounding']:.2g}")
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def cache_table(columns: Mapping[str, Mapping[str, Any]], rows: int) -> str:
    """Columns of a cache: shards, rows, bytes in all and a row, and the skips below."""
    body = []
    for name, one in columns.items():
        shards = f"{one['done']}/{one['shards']}"
        per_row = human_bytes(one["bytes"] / one["written"]) if one["written"] else "–"
        body.append([name, shards, str(one["written"]), human_bytes(one["bytes"]), per_row])
    text = table(["column", "shards", "rows", "bytes", "a row"], body)
    skipped = columns["samples"]["skipped"]
    total = sum(skipped.values())
    for name, one in columns.items():
        if "tail" in one:
            text += f"\n{name}: {one['tail']} tails, 1 − Σp of its entries (vLLM's log-probs)"
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    written, counts = columns["samples"]["written"], columns["samples"].get("counts", {})
    text += f"\n{rows} rows in the plan: {written} written, {total} skipped" + (f" ({listed})" if listed else "")
    text += cut_words(counts.get("cut_rows", 0), counts.get("cut_images", 0))
    noted = ((counts.get(kind, 0), words) for kind, words in ROW_NOTES.items())
    return text + "".join(
        f"\nnote: {count} rows: {words}; `kdcli doctor` names them" for count, words in noted if count
    )


def cut_words(rows: int, images: int) -> str:
    """What ``over_length = "cut"`` did, to be put behind a count of rows; empty where it did nothing."""
    lost = f", {images:,} image{'s' * (images != 1)} lost" if images else ""
    return f"; {rows:,} cut at a turn border to fit max_length{lost}" if rows else ""


def work_lines(work: Mapping[str, Any]) -> str:
    """What the workers of a capture say (``heartbeat.summary``): how fast, how long still, and who fell silent or failed."""
    running = len(work["running"])
    head = f"{running} worker{'s' * (running != 1)} running, {work['rows_per_second']:.1f} rows/s"
    if work["seconds_left"] is not None:
        head += f", {human_time(work['seconds_left'])} left"
    lines = [head]
    for word in work["running"]:
        if word["shard"] is not None:
            share = word["waited"] / max(1.0, word["updated"] - word["started"])
            waits = f"; its teacher waited {share:.0%} of the time for encoding (--encode-workers)" * (share >= 0.05)
            lines.append(f"  {word['host']}: shard {word['shard']:06d}, {word['shard_rows']} rows of it{waits}")
    lines += [
        f"  lost, its process gone or without a word for a minute: {w['host']}{_with_shard(w)}" for w in work["lost"]
    ]
    lines += [f"  failed: {w['host']}{_with_shard(w)}: {w['error']}" for w in work["failed"]]
    return "\n".join(lines)


def _with_shard(word: Mapping[str, Any]) -> str:
    return "" if word["shard"] is None else f", shard {word['shard']:06d}"


def repair_lines(result: Mapping[str, Any], dry_run: bool) -> str:
    """What ``kdcli cache repair`` found and did; its first words say how it ended."""
    found, left = result["problems"], result["left"]
    if not found:
        return "every checksum holds: nothing to repair"
    if dry_run:
        lines = [f"{_problem(one)}\n  {one['how']}" for one in left]
        return "\n".join([*lines, f"{len(found)} problems; nothing was changed"])
    still = [_place(one) for one in left]
    done = [f"{_problem(one)}: repaired" for one in found if _place(one) not in still]
    lines = [*done, *(f"{_problem(one)}: left as it was: {one['why']}" for one in left)]
    lines += [f"note: {note}" for note in result["notes"]]
    lines.append(f"{len(done)} repaired, {len(left)} left" if left else "repaired: every checksum holds again")
    return "\n".join(lines)


def _place(problem: Mapping[str, Any]) -> tuple[str, int | None]:
    return problem["column"], problem["shard"]


def _problem(problem: Mapping[str, Any]) -> str:
    return str(Problem(problem["column"], problem["shard"], problem["what"]))


def human_time(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{hours:.1f} h"


def score_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Exact match and further metrics in percent, then nats a token of the expected answers: a column a model, a row a family, the number
    of questions last; below, the rows that are not among them."""
    families = sorted({family for one in results.values() for family in one["families"]})

    def line(name: str, values: Iterable[float | None], questions: str = "") -> list[str]:
        return [name, *("–" if value is None else f"{100 * value:.1f}" for value in values), questions]

    def by_family(column: str, title: str = "{}") -> list[list[str]]:
        lines = []
        for name in families:
            found = [one["families"].get(name, {}) for one in results.values()]
            values = [one.get(column) for one in found]
            if set(values) != {None}:
                lines.append(line(title.format(name), values, counts(found) if title == "{}" else ""))
        return lines

    def counts(found: Iterable[Mapping[str, Any]]) -> str:
        """``23``, or one number a model where they differ."""
        given = [str(one.get("n", "–")) for one in found]
        return given[0] if len(set(given)) == 1 else " / ".join(given)

    body = by_family("exact_match")
    body.append(line("mean of families", [one["family_mean"] for one in results.values()]))
    body.append(line("all questions", [one["exact_match"] for one in results.values()], counts(results.values())))
    for column in further_metrics(results.values()):
        body += by_family(column, f"{column}, {{}}")
        body.append(line(f"{column}, mean of families", [one.get(f"{column}_family_mean") for one in results.values()]))
        body.append(line(f"{column}, all questions", [one.get(column) for one in results.values()]))
    for name, key in (("mean of families", "nll_family_mean"), ("all answer tokens", "nll")):
        values = [one.get(key) for one in results.values()]
        if any(value is not None for value in values):
            body.append([f"nll, {name}", *("–" if value is None else f"{value:.3f}" for value in values), ""])
    if any(one.get("ece") is not None for one in results.values()):
        values = [one.get("ece") for one in results.values()]
        body.append(
            [
                "calibration error, all answer tokens",
                *("–" if value is None else f"{value:.3f}" for value in values),
                "",
            ]
        )
    shown = table(["exact match, %; nll, nats a token", *results, "questions"], body)
    lines = uncounted_lines(results)
    return "\n".join(
        [shown, *([""] if lines else []), *lines]
    )  # Markdown takes a line right below for one of the table


def uncounted_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """``12 of 29 rows asked, 17 skipped: 9 image_missing, 8 no_answer``, by model where they differ; nothing where no row is missing."""
    told: dict[str, list[str]] = {}
    for name, one in results.items():
        told.setdefault(_uncounted(one), []).append(name)
    return [text if len(told) == 1 else f"{', '.join(names)}: {text}" for text, names in told.items() if text]


def lost_rows(rows: int, asked: int, first: Mapping[str, str]) -> str:
    """Said beside scores that a good part of the file is missing from; first: of its skip records."""
    left = f"{rows - asked} of {rows} rows were not asked, the scores cover the other {asked}"
    return f"{left}; the first, {first['place']}: {first['detail']}"


def _uncounted(result: Mapping[str, Any]) -> str:
    """Scores of older versions say less: what they do not say is not written."""
    skipped, no_nll = (dict(result.get(name) or {}) for name in ("skipped", "nll_skipped"))
    pieces = []
    if skipped:
        count, asked = sum(skipped.values()), result.get("n", 0)
        pieces.append(f"{asked} of {asked + count} rows asked, {count} skipped: {_by_reason(skipped)}")
    if no_nll:
        pieces.append(f"nll without {sum(no_nll.values())} of them: {_by_reason(no_nll)}")
    return "; ".join(pieces)


def _by_reason(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda one: -one[1]))


def further_metrics(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Columns that have a mean of families of their own, in the order they were asked for; nll is in nats and has its place."""
    mean = "_family_mean"
    found = [key.removesuffix(mean) for one in results for key in one if key.endswith(mean)]
    return [column for column in dict.fromkeys(found) if column != "nll"]


def sample_view(decoded: Any) -> str:
    """One cached sample for a person: turns, the words of each vision token in its grid, response tokens with their words."""
    row = decoded.row
    lines = [f"{row.key}  part {row.sample.part}  {row.sample.place}"]
    lines += [f"  {turn.role}: {turn.text}" for turn in row.sample.turns]
    at = 0
    for number, image in enumerate(row.layout):
        lines.append(f"image {number}: {image.size[0]}×{image.size[1]} px, {image.tokens()} vision tokens")
        for view in image.views:
            lines += _grid(decoded.vision[at : at + view.tokens()], view)
            at += view.tokens()
    if decoded.response:
        lines.append("response tokens, with the teacher's likeliest token at each:")
        for label, expected in decoded.response:
            lines.append(f"  {label!r:>14}  ← " + "  ".join(f"{word!r} {p:.2f}" for word, p in expected))
    lines.append("bytes: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in decoded.bytes.items()))
    return "\n".join(lines)


def _grid(words: Sequence[Sequence[tuple[str, float]]], view: View) -> list[str]:
    """The top word of every vision token, laid out as the image is."""
    if not words:
        return ["  (no field tells the words of vision tokens)"]
    lines = ["  "] * view.grid[0]
    tops = [(row, words[place][0][0].strip()[:7]) for row, _, place in view.places()]
    width = max(len(top) for _, top in tops) + 1
    for row, top in tops:
        lines[row] += top.ljust(width)
    return [line.rstrip() for line in lines]
