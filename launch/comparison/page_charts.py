"""The report's charts: bars, dots along tracks, and lines, all 360 pixels wide.

So wide is a phone's column, where text then has its own size; wider columns magnify it. Owns the
drawing of values that it is given; which values, and what a colour stands for, is the callers'.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from launch.drawing import BRIGHT, OTHER, Picture, grid_line, log_ticks, rect, text, ticks

WIDTH = 360
LETTER = 6.0  # of the 11 pixel font, on average
ROW, BAR_HEIGHT, LEGEND_HEIGHT, SHIFT = 32, 12, 18, 2.2
AXIS_LEFT, AXIS_RIGHT, PLOT_HEIGHT = 40, 12, 190
STRATEGY_COLORS = {
    "device_only": "#8a8f98",
    "apex": BRIGHT[0],
    "apex_paper": BRIGHT[5],
    "async_overlap": BRIGHT[2],
    "asymmetric_pipelining": BRIGHT[1],
    "full_offload": BRIGHT[4],
}


@dataclass(frozen=True)
class Bar:
    """A line of a bar chart. parts: values and colours, end to end. spread: least and most.

    mark: another value, drawn as a diamond. shown: what stands at the right. A bar of no parts is
    its text alone, such as why there is none.
    """

    label: str
    shown: str
    parts: tuple[tuple[float, str], ...] = ()
    spread: tuple[float, float] | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one kind: (x or index of the track, y or value, least and most of it)."""

    label: str
    points: tuple[tuple[float, float, tuple[float, float] | None], ...]


def color_of(name: str, index: int) -> str:
    """Return a strategy's colour, the same in every chart, or one by index."""
    return STRATEGY_COLORS.get(name) or BRIGHT[(index + 3) % len(BRIGHT)]


def draw_bars(
    bars: Sequence[Bar],
    title: str,
    description: str,
    legend: Sequence[tuple[str, str]] = (),
    reference: float | None = None,
) -> Picture:
    """Return horizontal bars from 0; `reference` is a value with a line through all of them."""
    body, top = _legend(legend)
    ends = [
        max(sum(value for value, _ in bar.parts), bar.mark or 0, *(bar.spread or (0,)))
        for bar in bars
    ]
    scale = (WIDTH - 2) / (max([*ends, reference or 0]) or 1)
    bottom = top + ROW * len(bars)
    for index, bar in enumerate(bars):
        y = top + ROW * index
        body += [text(0, y + 11, bar.label), text(WIDTH, y + 11, bar.shown, 'text-anchor="end"')]
        body += _bar(bar, y + 15, scale)
    if reference is not None:
        x = scale * reference
        dashes = 'stroke-width="1" stroke-dasharray="3 3"'
        body.append(f'<path class="mark" d="M{x:.2f} {top}V{bottom}" stroke="#1f2328" {dashes}/>')
    return Picture(WIDTH, bottom + 2, body, title, description)


def _bar(bar: Bar, y: float, scale: float) -> Iterator[str]:
    x = 0.0
    for value, color in bar.parts:
        yield rect(x, y, scale * value, BAR_HEIGHT, color)
        x += scale * value
    middle = y + BAR_HEIGHT / 2
    if bar.spread is not None and bar.spread[0] != bar.spread[1]:
        left, right = (scale * end for end in bar.spread)
        path = (
            f"M{left:.2f} {middle - 4}v8M{left:.2f} {middle}H{right:.2f}M{right:.2f} {middle - 4}v8"
        )
        yield f'<path class="mark" d="{path}" stroke="#1f2328" stroke-width="1.2" fill="none"/>'
    if bar.mark is not None:
        yield _marker(3, scale * bar.mark, middle, "none", 'class="mark" stroke="#1f2328"')


def draw_dots(
    tracks: Sequence[str],
    series: Sequence[Series],
    title: str,
    description: str,
    *,
    bands: Sequence[tuple[float, float]] = (),
    band_label: str = "",
    log: bool = False,
    reference: float | None = None,
) -> Picture:
    """Return a track for each label, with a dot of each series on it.

    bands: an interval on each track, in grey. log: of the axis, which else begins at 0.
    """
    colors = [color_of(one.label, index) for index, one in enumerate(series)]
    entries = [(one.label, color) for one, color in zip(series, colors, strict=True)]
    body, top = _legend([*entries, *([(band_label, OTHER)] if bands else [])], has_markers=True)
    values = [value for one in series for _, value, _ in one.points]
    values += [end for band in bands for end in band] + ([reference] if reference else [])
    axis = _Axis(values, 6.0, WIDTH - 8.0, log=log, from_zero=not log)
    bottom = top + ROW * len(tracks)
    for at, label in axis.labels():
        body.append(grid_line(f"M{at:.2f} {top}V{bottom + 2}"))
        body.append(text(at, bottom + 14, label, 'class="muted" text-anchor="middle"'))
    if reference is not None:
        x = axis.at(reference)
        body.append(f'<path class="mark" d="M{x:.2f} {top}V{bottom}" stroke="#1f2328"/>')
    for index, label in enumerate(tracks):
        y = top + ROW * index + 22
        body.append(rect(0, y - 20, 4.5 * len(label), 11, "#ffffff", attributes='class="paper"'))
        body.append(text(0, y - 11, label))
        if bands:
            left, right = (axis.at(end) for end in bands[index])
            body.append(rect(left, y - 5, right - left, 10, OTHER))
        else:
            body.append(grid_line(f"M0 {y}H{WIDTH}"))
    for kind, (one, color) in enumerate(zip(series, colors, strict=True)):
        for index, value, _ in one.points:
            # Side by side where they would cover each other.
            y = top + ROW * index + 22 + SHIFT * (kind - (len(series) - 1) / 2)
            body.append(_marker(kind, axis.at(value), y, color, tip=f"{one.label}: {value:.4g}"))
    return Picture(WIDTH, bottom + 20, body, title, description)


def draw_lines(
    series: Sequence[Series],
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    reference: float | None = None,
) -> Picture:
    """Return lines with a marker at each point, and its spread; y begins at 0."""
    colors = [color_of(one.label.split(",")[0], index) for index, one in enumerate(series)]
    if len(set(colors)) < len(colors):  # several lines of one strategy
        colors = [BRIGHT[index % len(BRIGHT)] for index in range(len(series))]
    body, top = _legend(
        [(one.label, color) for one, color in zip(series, colors, strict=True)], has_markers=True
    )
    body.append(text(0, top + 10, y_label, 'class="muted"'))
    top += 18
    points = [point for one in series for point in one.points]
    highs = [spread[1] if spread else y for _, y, spread in points]
    bottom = top + PLOT_HEIGHT
    x_axis = _Axis([x for x, _, _ in points], AXIS_LEFT + 8.0, WIDTH - AXIS_RIGHT, log=log_x)
    y_axis = _Axis([*highs, reference or 0.0], float(bottom), float(top), from_zero=True)
    for at, label in y_axis.labels():
        body.append(grid_line(f"M{AXIS_LEFT} {at:.2f}H{WIDTH}"))
        body.append(text(AXIS_LEFT - 5, at + 4, label, 'class="muted" text-anchor="end"'))
    for at, label in x_axis.labels():
        body.append(text(at, bottom + 14, label, 'class="muted" text-anchor="middle"'))
    if reference is not None:
        at = y_axis.at(reference)
        path = f'd="M{AXIS_LEFT} {at:.2f}H{WIDTH}" stroke="#1f2328" stroke-dasharray="3 3"'
        body.append(f'<path class="mark" {path}/>')
    for kind, (one, color) in enumerate(zip(series, colors, strict=True)):
        body += _line(one, x_axis, y_axis, color, kind)
    body.append(text(WIDTH, bottom + 30, x_label, 'class="muted" text-anchor="end"'))
    return Picture(WIDTH, bottom + 36, body, title, description)


def _line(one: Series, x_axis: "_Axis", y_axis: "_Axis", color: str, kind: int) -> Iterator[str]:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y, _ in one.points]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    yield f'<path d="{path}" stroke="{color}" stroke-width="2" fill="none"/>'
    for (x, y), (value_x, value, spread) in zip(places, one.points, strict=True):
        if spread is not None and spread[0] != spread[1]:
            low, high = (y_axis.at(end) for end in spread)
            yield f'<path d="M{x:.2f} {low:.2f}V{high:.2f}" stroke="{color}"/>'
        yield _marker(kind, x, y, color, tip=f"{one.label}: {value:.4g} at {value_x:.4g}")


class _Axis:
    """Values to pixels, and the round numbers along them."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        from_zero: bool = False,
    ):
        low, high = min(values), max(values)
        if from_zero:
            low, high = min(0.0, low), high or 1.0
        elif low == high:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        elif log:
            low, high = low / 1.1, high * 1.1
        self._log, self._low, self._high = log, low, high
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        low, high = self._low, self._high
        if self._log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self._start + (self._end - self._start) * (value - low) / (high - low)

    def labels(self) -> list[tuple[float, str]]:
        find = log_ticks if self._log else ticks
        found = [(self.at(tick), _round(tick)) for tick in find(self._low, self._high)]
        return found if self._start > self._end else list(_apart(found))


def _apart(labels: Sequence[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """Yield labels of a horizontal axis, without those that would touch the one before."""
    free_from = -math.inf
    for at, label in labels:
        half = LETTER * len(label) / 2
        if at - half >= free_from:
            yield at, label
            free_from = at + half + LETTER


def _round(tick: float) -> str:
    return f"{tick / 1e6:g}M" if abs(tick) >= 1e6 else f"{tick:,.6g}"


def _legend(
    entries: Sequence[tuple[str, str]], *, has_markers: bool = False
) -> tuple[list[str], float]:
    """Return what colours mean, and where the picture goes on."""
    x, y, body = 0.0, 11.0, list[str]()
    for index, (label, color) in enumerate(entries):
        width = 28 + LETTER * len(label)
        if x and x + width > WIDTH:
            x, y = 0.0, y + LEGEND_HEIGHT
        if has_markers and color != OTHER:
            body.append(_marker(index, x + 6, y - 4, color))
        else:
            body.append(rect(x, y - 9, 11, 11, color))
        body.append(text(x + 16, y, label))
        x += width
    return body, (y + 9 if entries else 0.0)


def _marker(
    kind: int, x: float, y: float, color: str, attributes: str = 'class="edge"', tip: str = ""
) -> str:
    """Return a disc, a square, a triangle or a diamond: kinds differ without their colours."""
    shape = (
        "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
        "M-4 -4H4V4H-4Z",
        "M0 -5L5 4H-5Z",
        "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
        "M-5 -4H5L0 5Z",
        "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    )[kind % 6]
    place = f'transform="translate({x:.2f} {y:.2f})" fill="{color}"'
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<path d="{shape}" {place} {attributes}>{title}</path>'
