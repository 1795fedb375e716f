"""
Makes the tables and plots of docs/benchmarks from its results.json.

    python -m benchmarks.report [FILE]

What is measured stays as it is, so this can be run again after a change of words or colours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from benchmarks.contestant import NAMES
from benchmarks.results import Round
from benchmarks.workloads import WORKLOADS, Workload

JOBQ, RAW, LIMIT, PEER, GOAL = "#d1495b", "#4a4e69", "#2a9d8f", "#a3b1bf", "#1b1b1b"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def write(file: Path) -> None:
    """The page beside *file* has the tables, and beside it are the plots."""
    # Heavy, and an extra: the quick mode and the tests must do without.
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "jobq", "font.size": 10, "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})
    found = results.read(file)
    page = file.with_name("README.md")
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    lines = [
        *_sections(found.get("workloads", {}), file.parent),
        *_growth(found.get("growth", {}), file.parent),
        *_automatic(found.get("auto", {})),
    ]
    page.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{rest.split(END)[1]}"]))


def _sections(found: dict[str, Any], folder: Path) -> Iterator[str]:
    """Yield the overview and a section for each workload; draws their plots."""
    known = [(name, found[name]) for name in WORKLOADS if name in found]
    yield from ("", "| workload | goal | jobq now | best peer | limit |", "|---|---|---|---|---|")
    for name, measured in known:
        yield _overview(WORKLOADS[name], measured["rounds"])
    for family, members in groupby(known, key=lambda pair: pair[0].partition("-")[0]):
        group = list(members)
        _draw_family(family, group, folder)
        yield from ("", f"### {family}", "", f"![{family}]({family}.png)", "")
        for name, measured in group:
            yield from _table(WORKLOADS[name], measured)
        if family == "W8":
            _draw_memory(group[0][1]["rounds"][0], folder)
            yield "![W8: memory](W8-memory.png)"


def _goal(workload: Workload) -> str:
    sign = {"more": "≥", "less": "≤"}[workload.better]
    return f"{sign} {workload.goal:g} {'x raw' if workload.goal_of == 'raw' else workload.unit}"


def _overview(workload: Workload, rounds: list[Round]) -> str:
    """Return the row: what jobq's default reaches, the best of the others, and what is possible."""

    def reached(name: str | None) -> str:
        value = results.reached(workload, rounds, name) if name else None
        return "" if value is None else f"{value:.3g}"

    peers = [name for name in NAMES if not name.startswith(("jobq", "raw", "limit"))]
    pick = max if workload.better == "more" else min
    best = pick(
        (name for name in peers if results.reached(workload, rounds, name) is not None),
        key=lambda name: results.reached(workload, rounds, name) or 0.0,
        default=None,
    )
    named = f"{reached(best)} ({best})" if best else ""
    jobq, limit = reached("jobq-joinable"), reached("limit")
    return f"| {workload.name}: {workload.title} | {_goal(workload)} | **{jobq}** | {named} | {limit} |"


def _table(workload: Workload, measured: dict[str, Any]) -> Iterator[str]:
    rounds: list[Round] = measured["rounds"]
    yield f"**{workload.name}: {workload.title}.** Goal {_goal(workload)}."
    yield f"{measured['machine']}; {measured['versions']}; {measured['day']}, {len(rounds)} rounds."
    yield ""
    yield f"| | items | {workload.unit} | least to most | x raw | least to most | CPU us an item |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name in measured["counts"]:
        values, ratios = results.values(rounds, name), results.ratios(rounds, name)
        problem = results.trouble(rounds, name)
        if not values:
            yield f"| {name} | {problem} | | | | | |"
            continue
        cpu = median(row[name]["cpu"] / row[name]["count"] for row in rounds if "value" in row[name]) * 1e6
        compared = f"{median(ratios):.3g} | {min(ratios):.3g} to {max(ratios):.3g}" if ratios else " | "
        spread = f"{_short(median(values))} | {_short(min(values))} to {_short(max(values))}"
        yield f"| {name} {problem} | {measured['counts'][name]:,} | {spread} | {compared} | {cpu:,.2f} |"
    yield ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _colour(name: str) -> str:
    return {"jobq": JOBQ, "raw": RAW, "limit": LIMIT}.get(name.partition("-")[0], PEER)


def _save(figure: Any, folder: Path, name: str) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


def _draw_family(family: str, group: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Draw bars, the best at the top: median, least and most; the goal as a line."""
    from matplotlib import pyplot as plt

    tallest = max(len(measured["counts"]) for _, measured in group)
    figure, axes = plt.subplots(
        1, len(group), figsize=(3 + 4.2 * len(group), 1.4 + 0.3 * tallest), squeeze=False
    )
    for axis, (name, measured) in zip(axes[0], group, strict=True):
        _bars(axis, WORKLOADS[name], measured["rounds"])
    _save(figure, folder, family)


def _bars(axis: Any, workload: Workload, rounds: list[Round]) -> None:
    middle = {name: median(values) for name in NAMES if (values := results.values(rounds, name))}
    names = sorted(middle, key=middle.__getitem__, reverse=workload.better == "less")
    heights = [middle[name] for name in names]
    spread = [
        [middle[name] - min(results.values(rounds, name)) for name in names],
        [max(results.values(rounds, name)) - middle[name] for name in names],
    ]
    axis.barh(
        names, heights, xerr=spread, color=[_colour(name) for name in names], ecolor="#888888", height=0.7
    )
    wide = bool(heights) and min(heights) > 0 and max(heights) / min(heights) > 20
    if wide:
        axis.set_xscale("log")
    goal = workload.goal
    if workload.goal_of == "raw":
        goal *= middle.get(results.BASELINE, float("nan"))
    if goal == goal:
        axis.axvline(goal, color=GOAL, linestyle="--", linewidth=1.2)
        axis.set_title(f"goal (dashed): {_goal(workload)}", fontsize=9, loc="right", color=GOAL)
    for name, height in zip(names, heights, strict=True):
        axis.annotate(
            f" {_short(height)}",
            (max(results.values(rounds, name)), name),
            va="center",
            fontsize=8,
            clip_on=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.6},
        )
    low, high = axis.get_xlim()
    top = max([*heights, goal if goal == goal else 0.0])
    axis.set_xlim(low, max(high, top * 2.5) if wide else max(high, top * 1.18))
    for label in axis.get_yticklabels():
        if label.get_text().startswith("jobq"):
            label.set(color=JOBQ, fontweight="bold")
    axis.set_xlabel(f"{workload.unit} ({workload.better} is better)")
    axis.set_title(workload.name, loc="left", fontweight="bold")


def _draw_memory(first: Round, folder: Path) -> None:
    """Draw each process's memory over time, of each contestant that was watched."""
    from matplotlib import pyplot as plt

    shown = [name for name in NAMES if "memory" in first.get(name, {})]
    columns = 4
    figure, axes = plt.subplots(
        -(-len(shown) // columns), columns, figsize=(13, 2.4 * -(-len(shown) // columns)), squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        for series in first[name]["memory"]:
            axis.plot(*zip(*series, strict=True), color=_colour(name), linewidth=1.3, alpha=0.8)
        axis.axvline(first[name]["since"], color=GOAL, linestyle=":", linewidth=1)
        axis.set_title(f"{name}: {first[name].get('count', 0) / 1e6:.3g} M items", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    for axis in axes[:, 0]:
        axis.set_ylabel("MB a process")
    for axis in axes.flat[max(0, len(shown) - columns) :]:
        axis.set_xlabel("seconds")
    _save(figure, folder, "W8-memory")


# --- how cost grows


def _growth(found: dict[str, Any], folder: Path) -> Iterator[str]:
    """Yield a section for each curve; draws its plot."""
    from benchmarks.growth import CURVES

    known = [(curve, found[name]) for name, curve in CURVES.items() if name in found]
    if known:
        yield from ("", "## How cost grows", "")
    for curve, measured in known:
        _draw_curve(curve, measured, folder)
        yield from (f"### {curve.title}", "", f"![{curve.title}](growth-{curve.name}.png)", "")
        yield f"{measured['machine']}; {measured['day']}, `{measured['backend']}`,"
        yield f"{measured['rounds']} rounds, medians."
        columns = list(measured["points"][0]["medians"])
        yield from ("", f"| {curve.across} | {' | '.join(columns)} |", "|--:" * (len(columns) + 1) + "|")
        for point in measured["points"]:
            cells = (_short(point["medians"][column]) for column in columns)
            yield f"| {point['at']:,} | {' | '.join(cells)} |"
        yield ""


def _draw_curve(curve: Any, measured: dict[str, Any], folder: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    points = measured["points"]
    across = [point["at"] for point in points]
    styles = ((JOBQ, "o-"), (RAW, "s--"), (LIMIT, "^:"))
    for line, (colour, style) in zip(curve.lines, styles, strict=False):
        middle = [point["medians"][line] for point in points]
        axis.plot(across, middle, style, color=colour, label=line)
        axis.fill_between(
            across,
            *([point[end][line] for point in points] for end in ("least", "most")),
            color=colour,
            alpha=0.15,
        )
    if curve.logarithmic:
        axis.set_xscale("log")
    if max(across) < 1_000:
        axis.set_xticks(across, [str(at) for at in across])
        axis.minorticks_off()
    axis.set_yscale("log")
    axis.set_xlabel(curve.across)
    axis.set_title(curve.title, loc="left", fontweight="bold")
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, folder, f"growth-{curve.name}")


# --- automatic workers


def _automatic(found: dict[str, Any]) -> Iterator[str]:
    """Yield the table of automatic workers beside splits by hand."""
    from benchmarks.auto import HEADER, MIXES, row

    known = [(name, found[name]) for name in MIXES if name in found]
    if not known:
        return
    first = known[0][1]
    yield from ("", '## `workers="auto"` beside splits of the workers by hand', "")
    yield f"{first['machine']}; {first['day']}, `{first['backend']}`,"
    yield f"{first['rounds']} rounds, medians of seconds."
    yield from ("", *HEADER)
    for name, measured in known:
        yield row(name, measured)
    yield ""


def main() -> None:
    """Write from the file named, or from the repository's own."""
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else results.FILE)


if __name__ == "__main__":
    main()
