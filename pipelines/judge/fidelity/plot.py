"""Bytes a row against gradient angle, both logarithmic, a panel a row kind."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.capture.profiles import HEAD_K
from teacher_cache.whole_file import write_whole

FLOOR = 0.003
"""Degrees below which a point is drawn on the axis: a logarithm has no room for 0."""
MARKERS = {"forward": "o", "reverse": "s"}
FAMILIES = {
    "head 8 + sketch": "tab:blue",
    "other head + sketch": "tab:purple",
    "sketch": "tab:cyan",
    "top-k": "tab:orange",
    "sampled": "tab:green",
    "hidden": "tab:gray",
    "this cache": "black",
}
SINGLE = ("this cache", "hidden", "other head + sketch")
"""Families whose points are no series of one parameter: no line joins them."""
TICKS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def write_plot(result: Mapping[str, Any], path: Path) -> Path:
    """The PNG: points of the cache, and of the sweep where there was one; circles forward KL, squares reverse KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = plot_points(result)
    kinds = list(dict.fromkeys(one["kind"] for one in points)) or ["response"]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.6), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        draw_panel(axis, kind, [one for one in points if one["kind"] == kind])
    axes[0][0].set_ylabel("angle of the head's gradient, degrees")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    png = io.BytesIO()
    figure.savefig(png, dpi=80, format="png")
    pyplot.close(figure)
    write_whole(path, png.getvalue())
    return path


def draw_panel(axis: Any, kind: str, points: list[dict[str, Any]]) -> None:
    from matplotlib import ticker

    axis.set(xscale="log", yscale="log", title=f"{kind} rows", xlabel="bytes a row")
    axis.xaxis.set_major_locator(ticker.FixedLocator(TICKS))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axis.axhline(FLOOR, color="lightgray", linewidth=0.8)
    for family, colour in FAMILIES.items():
        for direction, marker in MARKERS.items():
            mine = [one for one in points if (one["family"], one["direction"]) == (family, direction)]
            if not mine:
                continue
            mine.sort(key=lambda one: one["bytes"])
            style = "" if family in SINGLE else "-" if direction == "forward" else ":"
            places = [one["bytes"] for one in mine], [max(one["angle"], FLOOR) for one in mine]
            axis.plot(*places, marker + style, color=colour, ms=4, lw=0.8, label=f"{family}, {direction}")
    for one in points:
        if one["family"] != "this cache" and (one["direction"] == "reverse" or one["family"] == "sampled"):
            place = (one["bytes"], max(one["angle"], FLOOR))
            axis.annotate(one["label"], place, fontsize=5, xytext=(2, 3), textcoords="offset points")


def plot_points(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``{"kind", "family", "label", "direction", "bytes", "angle"}`` of everything that was measured."""
    found = [(one, "this cache", "", one["payload_per_row"]) for one in result["distributions"].values()]
    for one in result["sweep"]:
        if "error" not in one:
            label = one["label"]
            for word in ("top-8 + ", "top-", "sketch ", " hidden"):
                label = label.replace(word, "")
            found.append((one, family_of(one["fields"]), label, one["bytes_per_row"]))
    return [
        {
            "kind": one["kind"],
            "family": family,
            "label": label,
            "direction": direction,
            "bytes": size,
            "angle": one[direction]["head_angle"],
        }
        for one, family, label, size in found
        for direction in MARKERS
        if one.get(direction) and one[direction].get("head_angle") is not None
    ]


def family_of(fields: Mapping[str, Mapping[str, Any]]) -> str:
    suffixes = {name.split("_")[1] for name in fields}
    sketched = any(params.get("codec") == "sketch" for params in fields.values())
    if "sampled" in suffixes:
        return "sampled"
    if "topk" in suffixes:
        if not sketched:
            return "top-k"
        (k,) = (params["k"] for name, params in fields.items() if name.endswith("_topk"))
        return "head 8 + sketch" if k == HEAD_K else "other head + sketch"
    return "sketch" if sketched else "hidden"
