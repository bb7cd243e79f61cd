"""One picture of a run: its score with the lifecycle events, every seed's alpha and stage over time, and the loss."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .console import number, shorten
from .event import Event, Kind
from .sinks import read_events
from .timeline import Life, lives

# Okabe and Ito's palette: told apart with any kind of colour vision, and in grey by the alpha's height.
STAGE_COLOURS = {
    "GERMINATED": "#F0E442",
    "TRAINING": "#56B4E9",
    "BLENDING": "#E69F00",
    "HOLDING": "#CC79A7",
    "FOSSILIZED": "#009E73",
    "PRUNED": "#D55E00",
    "EMBARGOED": "#8C8C8C",
    "RESETTING": "#BFBFBF",
}
GROWN, HOST, INK, FAINT = "#0072B2", "#6E6E6E", "#222222", "#D9D9D9"
WIDTH, DPI = 10.0, 120  # inches and dots: 1200 pixels
_LEFT, _RIGHT = 1.75, 1.25  # inches of margin
_SCORE, _ROW, _LOSS, _TOP, _BOTTOM = 2.9, 0.4, 1.25, 0.5, 0.5  # inches of height
_GAPS = (0.36, 0.16, 0.0)  # inches below each panel
_MOST_ROWS, _MOST_NUMBERS = 48, 60
# How full a stage's colour is where alpha is 0; the stages that blend are pale up to their alpha.
_PALE = {"GERMINATED": 0.75, "TRAINING": 0.5, "PRUNED": 0.8, "EMBARGOED": 0.5, "RESETTING": 0.5}
_EDGE: dict[str, Any] = {"markersize": 7, "markeredgecolor": INK, "markeredgewidth": 0.7}
_LEGEND: dict[str, Any] = {
    "fontsize": 7.5,
    "frameon": False,
    "handlelength": 1.1,
    "handletextpad": 0.4,
    "columnspacing": 1.2,
    "labelcolor": INK,
    "borderaxespad": 0.0,
    "borderpad": 0.1,
}


@dataclasses.dataclass(frozen=True)
class _Milestone:
    name: str
    marker: str
    colour: str


_GERMINATED = _Milestone("germinated", "^", "#F0E442")
_KEPT = _Milestone("fossilized: kept", "s", STAGE_COLOURS["FOSSILIZED"])
_PRUNED = _Milestone("pruned", "X", STAGE_COLOURS["PRUNED"])


def training_figure(
    events_or_path: Iterable[Event] | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    host_events: Iterable[Event] | str | os.PathLike[str] | None = None,
    title: str = "Training with growth",
    score_name: str = "validation score (points)",
) -> Path:
    """Draw a run from its events (or the file that holds them) and save the picture; the format follows the suffix.

    Args:
        events_or_path: events of the grown run. Epoch events carry `score`, `loss`, `train_loss` and `seeds`.
        path: where to save, e.g. `figure.png`; folders are made.
        host_events: the host alone, trained equally long, for comparison.
        title: the heading.
        score_name: label of the score axis.

    Returns:
        The path of the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no epoch event to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('drawing a figure needs matplotlib: pip install "esper_jax[plot]"') from error

    events, host = _load(events_or_path), _load(host_events)
    grown_curve, host_curve = _curves(events), _curves(host)
    if not grown_curve:
        source = events_or_path if isinstance(events_or_path, (str, os.PathLike)) else "the events given"
        raise ValueError(
            f"{os.fspath(source)} holds no epoch event: there is nothing to draw before one epoch has ended"
        )
    every = lives(events)
    shown = every[:_MOST_ROWS]
    row = _ROW if len(shown) <= 16 else 0.27
    heights = [_SCORE, max(row * len(shown), 0.4), _LOSS]
    total = sum(heights) + sum(_GAPS) + _TOP + _BOTTOM

    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes: list[Any] = []
    top = total - _TOP
    for height, gap in zip(heights, _GAPS, strict=True):
        box = (_LEFT / WIDTH, (top - height) / total, 1 - (_LEFT + _RIGHT) / WIDTH, height / total)
        axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
        top -= height + gap
    first = min([*grown_curve, *host_curve])
    last = max([*grown_curve, *host_curve])
    axes[0].set_xlim(first - 0.5, last + 0.5)

    _draw_rows(axes[1], shown, max(grown_curve), compact=row < _ROW, more=len(every) - len(shown))
    _draw_loss(axes[2], grown_curve, host_curve)
    _draw_score(axes[0], grown_curve, host_curve, shown, score_name)
    rollbacks = sorted({event.epoch for event in events if event.kind == Kind.ROLLBACK})
    for epoch in rollbacks:
        axes[0].axvline(epoch, color=STAGE_COLOURS["PRUNED"], linewidth=1.1, linestyle=":", zorder=2)
    _milestone_legend(axes[0], {what for _, _, what in _milestones(shown)}, bool(rollbacks))
    _stage_legend(figure, shown, (total - _TOP - _SCORE - _GAPS[0] + 0.06) / total)
    for axis in axes[:-1]:
        axis.tick_params(axis="x", labelbottom=False)
    axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes[-1].set_xlabel("epoch", fontsize=9, color=INK)
    figure.text(0.012, 1 - 0.14 / total, title, fontsize=12.5, fontweight="bold", color=INK, va="top")

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _load(source: Iterable[Event] | str | os.PathLike[str] | None) -> list[Event]:
    if source is None:
        return []
    return read_events(source) if isinstance(source, (str, os.PathLike)) else list(source)


def _curves(events: Iterable[Event]) -> dict[int, dict[str, float]]:
    """The metrics of each epoch, NaN where not finite; an epoch that was run again counts as it was last."""
    curves = {}
    for event in events:
        if event.kind == Kind.EPOCH:
            values = {name: event.data.get(name) for name in ("score", "loss", "train_loss")}
            curves[event.epoch] = {
                name: float(v) if isinstance(v, (int, float)) and math.isfinite(v) else math.nan
                for name, v in values.items()
            }
    return dict(sorted(curves.items()))


def _style(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#9A9A9A")
    axis.tick_params(labelsize=8, colors=INK, color="#9A9A9A", length=3)
    axis.set_axisbelow(True)


def _line(axis: Any, curve: dict[int, dict[str, float]], name: str, **style: Any) -> None:
    alone = {"marker": ".", "markersize": 6} if len(curve) < 3 else {}
    axis.plot(list(curve), [point[name] for point in curve.values()], **(alone | style))


def _end_label(axis: Any, curve: dict[int, dict[str, float]], text: str, colour: str, shift: float) -> None:
    """Name and last value of a line, to the right of the axis; `shift` in points keeps two of them apart."""
    ends = [(epoch, point["score"]) for epoch, point in curve.items() if math.isfinite(point["score"])]
    if ends:
        label = f"{text} {number(ends[-1][1], 2)}"
        place = (axis.get_xlim()[1], ends[-1][1])
        axis.annotate(label, place, (5, shift), textcoords="offset points", va="center", fontsize=8.5, color=colour,
                      fontweight="bold", annotation_clip=False)  # fmt: skip


def _draw_score(
    axis: Any, grown: dict[int, dict[str, float]], host: dict[int, dict[str, float]], seeds: list[Life], name: str
) -> None:
    _style(axis)
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    if host:
        _line(axis, host, "score", color=HOST, linewidth=1.4, linestyle=(0, (4, 2)), zorder=3)
    _line(axis, grown, "score", color=GROWN, linewidth=1.8, zorder=4)
    axis.set_ylabel(name, fontsize=9, color=INK)
    _draw_milestones(axis, grown, seeds)
    ends = [
        next((p["score"] for p in reversed(c.values()) if math.isfinite(p["score"])), math.nan) for c in (grown, host)
    ]
    low, high = axis.get_ylim()
    gap = (ends[0] - ends[1]) / (high - low) * _SCORE * 72  # points between the two labels
    shift = max(0.0, (12 - abs(gap)) / 2) * (1 if gap >= 0 else -1) if math.isfinite(gap) else 0.0
    _end_label(axis, grown, "grown", GROWN, shift)
    _end_label(axis, host, "host", HOST, -shift)


def _milestones(seeds: list[Life]) -> list[tuple[float, int, _Milestone]]:
    """`(epoch, number of the seed, what happened)` in order."""
    marks: list[tuple[float, int, _Milestone]] = []
    for index, life in enumerate(seeds, 1):
        pairs = ((life.born, _GERMINATED), (life.kept, _KEPT), (life.pruned, _PRUNED))
        marks += [(epoch, index, what) for epoch, what in pairs if epoch is not None]
    return sorted(marks, key=lambda mark: mark[:2])


def _draw_milestones(axis: Any, grown: dict[int, dict[str, float]], seeds: list[Life]) -> None:
    """Markers just above the score curve with the seed's number, stacked upward where they would touch."""
    marks = _milestones(seeds)
    scored = {epoch: point["score"] for epoch, point in grown.items() if math.isfinite(point["score"])}
    if not marks or not scored:
        return
    numbered = len(marks) <= _MOST_NUMBERS
    pixel = DPI / 100
    wide, tall, lift = (24.0 if numbered else 11.0) * pixel, 13.0 * pixel, 11.0 * pixel  # pixels a mark takes
    for _ in range(2):  # the second time with the room that the first one asked for
        low, high = axis.get_ylim()
        placed: list[tuple[float, float]] = []
        drawn: list[tuple[float, float, float, int, _Milestone]] = []
        for epoch, index, what in marks:
            score = scored[min(scored, key=lambda at: abs(at - epoch))]
            x, y = axis.transData.transform((epoch, score))
            y += lift
            while any(abs(x - a) < wide and abs(y - b) < tall for a, b in placed):
                y += 2.0
            placed.append((x, y))
            drawn.append((epoch, score, axis.transData.inverted().transform((x, y))[1], index, what))
        axis.set_ylim(low, max(high, max(y for _, _, y, _, _ in drawn) + (high - low) * 0.05))
    for epoch, score, y, index, what in drawn:
        axis.plot([epoch, epoch], [score, y], color="#9A9A9A", linewidth=0.7, zorder=5)
        axis.plot([epoch], [y], marker=what.marker, color=what.colour, linestyle="none", zorder=6, **_EDGE)
        if numbered:
            style: dict[str, Any] = {"fontsize": 8, "color": INK, "zorder": 7, "ha": "right", "va": "center_baseline"}
            axis.annotate(str(index), (epoch, y), (-6, 0), textcoords="offset points", **style)


def _draw_rows(axis: Any, seeds: list[Life], until: float, *, compact: bool, more: int) -> None:
    """A row for each seed: its stage as the colour, its alpha as the height of the full colour."""
    _style(axis)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    if not seeds:
        axis.set_yticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="x", length=0)
        axis.text(
            0.5, 0.5, "no seed germinated", transform=axis.transAxes, ha="center", va="center", fontsize=9, color=HOST
        )
        return
    axis.set_ylim(len(seeds) - 0.5, -0.5)
    axis.set_yticks([])
    size = 0.82
    for index, life in enumerate(seeds):
        base = index + size / 2
        for start, stop, stage, alpha in life.spans(until):
            colour = STAGE_COLOURS.get(stage, FAINT)
            box = {"width": stop - start, "bottom": base, "align": "edge", "color": colour, "linewidth": 0}
            axis.bar(start, -size, alpha=_PALE.get(stage, 0.28), **box)
            if stage not in _PALE:
                axis.bar(start, -size * alpha, **box)
        axis.axhline(index + 0.5, color=FAINT, linewidth=0.6)
        _label_row(axis, index, life, compact)
    if more:
        below = {"transform": axis.get_yaxis_transform(), "va": "top", "fontsize": 8, "color": INK}
        axis.text(1.01, len(seeds) - 0.4, f"and {more} more", **below)


def _label_row(axis: Any, index: int, life: Life, compact: bool) -> None:
    """Number, blueprint and place to the left of a row, verdict and contribution to the right."""
    left, right = -0.012, 1.01
    style: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8}
    name, where = f"{index + 1}  {life.blueprint}", f"{life.site}[{life.slot}]"
    if compact:
        text = f"{name}  {shorten(where, max(9, 28 - len(name)))}"
        axis.text(left, index, text, ha="right", color=INK, **(style | {"fontsize": 7}))
    else:
        axis.text(left, index - 0.2, name, ha="right", color=INK, fontweight="bold", **style)
        axis.text(left, index + 0.2, shorten(where, 27), ha="right", color="#555555", **(style | {"fontsize": 7.5}))
    verdict, colour = ("kept", "#00724F") if life.kept is not None else ("on trial", INK)
    if life.pruned is not None:
        verdict, colour = "pruned", "#A84A00"
    if math.isfinite(life.contribution):
        verdict += f" {life.contribution:+.2f}"
    axis.text(right, index, verdict, color=colour, **style)


def _draw_loss(axis: Any, grown: dict[int, dict[str, float]], host: dict[int, dict[str, float]]) -> None:
    _style(axis)
    axis.grid(axis="y", color=FAINT, linewidth=0.6)
    if host:
        _line(axis, host, "loss", color=HOST, linewidth=1.2, linestyle=(0, (4, 2)), label="host alone")
    _line(axis, grown, "train_loss", color="#56B4E9", linewidth=1.2, label="grown, training")
    _line(axis, grown, "loss", color=GROWN, linewidth=1.5, label="grown, validation")
    values = [
        v for curve in (grown, host) for point in curve.values() for v in (point["loss"], point["train_loss"]) if v > 0
    ]
    if values and max(values) > 20 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_ylabel("loss", fontsize=9, color=INK)
    axis.legend(loc="upper right", fontsize=7.5, frameon=False, ncols=3, labelcolor=INK, borderaxespad=0.1)


def _milestone_legend(axis: Any, used: Iterable[_Milestone], rollbacks: bool) -> None:
    """What the markers of the score panel mean, in its lower right corner, where a rising score leaves room."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=what.marker, color=what.colour, label=what.name, linestyle="none", **_EDGE)
        for what in (_GERMINATED, _KEPT, _PRUNED)
        if what in used
    ]
    if rollbacks:
        handles.append(Line2D([], [], color=STAGE_COLOURS["PRUNED"], linestyle=":", label="rolled back"))
    if handles:
        axis.legend(handles=handles, loc="lower right", ncols=len(handles), **_LEGEND)


def _stage_legend(figure: Any, seeds: list[Life], y: float) -> None:
    """What the colours of the rows mean, above them: as pale or as full as they show there."""
    from matplotlib.patches import Patch

    present = {stage for life in seeds for stage in life.stages.values()}
    handles = [
        Patch(color=colour, alpha=_PALE.get(stage), label=stage.lower(), linewidth=0)
        for stage, colour in STAGE_COLOURS.items()
        if stage in present
    ]
    if handles:
        corner = (_LEFT / WIDTH, y)
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=corner, ncols=len(handles), **_LEGEND)
        figure.text((_LEFT - 0.1) / WIDTH, y, "height: alpha", ha="right", va="bottom", fontsize=7.5, color="#555555")
        figure.text(1 - (_RIGHT - 0.08) / WIDTH, y, "contribution", va="bottom", fontsize=7.5, color="#555555")
