"""Draw a part of a trace as an SVG picture.

    python -m launch.plot_timeline --trace=IN.json --output=OUT.svg --from_sec=1.2 --to_sec=1.25

A row for each lane, coloured by the name of what ran, with a stripe in the colour of the cohort
that it served; at the right, the share of the time in which the lane was busy. Times are seconds
from the trace's own 0. Refuses files that are no trace, and times in which nothing happened.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from apex_jax.trace import read_events
from launch.drawing import LIGHT, OTHER, Picture, grid_line, rect, round_step, text

# Pixels. A README column on GitHub is about 880 wide.
WIDTH, LEFT, RIGHT = 880, 112, 48
ROW, BAR, STRIPE, INSET, AXIS, LEGEND = 30, 22, 4, 4, 22, 20
MIN_BAR = 0.4  # what is narrower is drawn so wide, and what it then hides is left out
LETTER = 5.6  # of the 10 pixel font, generously

COHORT_COLORS = ("#ee6677", "#4477aa", "#228833", "#aa3377", "#66ccee", "#ccbb44")


class Span(NamedTuple):
    """depth: how many spans of its lane it lies in."""

    name: str
    start_sec: float
    end_sec: float
    args: dict[str, Any]
    depth: int


def read_lanes(path: Path) -> dict[str, list[Span]]:
    """Return the spans of each lane in order, lanes from the top. Raises ValueError."""
    events = read_events(path)
    titles = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    lanes: dict[str, list[Span]] = {titles[track]: [] for track in sorted(titles)}
    open_ends_sec: dict[str, list[float]] = {title: [] for title in lanes}
    timed = [event for event in events if event["ph"] == "X"]
    for event in sorted(timed, key=lambda event: (event["ts"], -event["dur"])):
        start_sec, end_sec = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        title = titles[event["tid"]]
        around = [end for end in open_ends_sec[title] if end > start_sec + 1e-9]
        lanes[title].append(Span(event["name"], start_sec, end_sec, event["args"], len(around)))
        open_ends_sec[title] = [*around, end_sec]
    return lanes


class View(NamedTuple):
    """The times that are drawn."""

    from_sec: float
    to_sec: float

    @property
    def sec(self) -> float:
        return self.to_sec - self.from_sec

    def x(self, at_sec: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (at_sec - self.from_sec) / self.sec


def draw(lanes: dict[str, list[Span]], view: View) -> str:
    """Return the picture. Raises ValueError if nothing lies in the view."""
    seen = [span for spans in lanes.values() for span in spans]
    lanes = {
        title: [
            span for span in spans if span.end_sec > view.from_sec and span.start_sec < view.to_sec
        ]
        for title, spans in lanes.items()
    }
    lanes = {title: spans for title, spans in lanes.items() if spans}
    if not lanes:
        first = min((span.start_sec for span in seen), default=0.0)
        last = max((span.end_sec for span in seen), default=0.0)
        raise ValueError(
            f"nothing happened from {view.from_sec:g} s to {view.to_sec:g} s; the trace's events "
            f"are from {first:.3f} s to {last:.3f} s"
        )
    colors = _colors_by_name(lanes)
    bottom = AXIS + ROW * len(lanes)
    body = list(_axis(view, bottom))
    for index, (title, spans) in enumerate(lanes.items()):
        body += _lane(title, spans, view, colors, AXIS + ROW * index)
    legend, height = _legend(lanes, colors, bottom + LEGEND)
    return Picture(
        WIDTH, height, (*body, *legend), "What ran when, by lane", font_size=10
    ).to_file()


def _lane(
    title: str, spans: list[Span], view: View, colors: dict[str, str], top: float
) -> Iterator[str]:
    middle = top + BAR / 2 + 4
    yield text(LEFT - 8, middle, title, 'text-anchor="end" font-size="12"')
    drawn_to: Counter[int] = Counter()  # in tenths of a pixel, by depth
    busy_sec, busy_until_sec = 0.0, view.from_sec
    for span in spans:
        start_sec, end_sec = max(span.start_sec, view.from_sec), min(span.end_sec, view.to_sec)
        busy_sec += max(0.0, end_sec - max(start_sec, busy_until_sec))
        busy_until_sec = max(busy_until_sec, end_sec)
        left, right = view.x(start_sec), view.x(end_sec)
        right = max(right, left + MIN_BAR)
        if 10 * right > drawn_to[span.depth] + 10 * MIN_BAR / 2:
            drawn_to[span.depth] = math.ceil(10 * right)
            yield from _bar(span, left, right - left, colors[span.name], top)
    share = f"{100 * busy_sec / view.sec:.0f} %"
    yield text(WIDTH - 4, middle, share, 'text-anchor="end" font-size="12"')


def _bar(span: Span, left: float, width: float, color: str, top: float) -> Iterator[str]:
    y, height = top + INSET * span.depth, BAR - INSET * span.depth
    border = 'class="edge" stroke="#ffffff" stroke-width="0.5"' if width > 3 else ""
    milliseconds = 1e3 * (span.end_sec - span.start_sec)
    tip = [f"{span.name}, {milliseconds:.3f} ms", *(f"{k} {v}" for k, v in span.args.items())]
    yield rect(left, y, width, height, color, ", ".join(tip), border)
    if "cohort" in span.args:
        stripe = _cohort_color(span.args["cohort"])
        yield rect(left, top + BAR - STRIPE, width, STRIPE, stripe)
    layer = str(span.args.get("layer", ""))
    for label in (f"{span.name} {layer}".strip(), layer):
        if label and LETTER * len(label) + 2 <= width:
            attributes = 'class="on-color" text-anchor="middle"'
            yield text(left + width / 2, y + height / 2 + 2, label, attributes)
            break


def _axis(view: View, bottom: float) -> Iterator[str]:
    """Lines at round milliseconds from the picture's left edge."""
    step_ms = round_step(100 * view.sec)
    for index in range(int(1e3 * view.sec / step_ms) + 1):
        x = view.x(view.from_sec + index * step_ms / 1e3)
        yield grid_line(f"M{x:.2f} {AXIS - 4}V{bottom}")
        yield text(x, AXIS - 8, f"{index * step_ms:g}", 'text-anchor="middle"')
    yield text(LEFT - 12, AXIS - 8, f"ms from {view.from_sec:g} s", 'text-anchor="end"')
    yield text(WIDTH - 4, AXIS - 8, "busy", 'text-anchor="end"')


def _legend(
    lanes: dict[str, list[Span]], colors: dict[str, str], top: float
) -> tuple[list[str], float]:
    """Return what colours mean, and where the picture ends."""
    entries = [(name, color) for name, color in colors.items() if color != OTHER]
    if OTHER in colors.values():
        entries.append(("other", OTHER))
    spans = [span for of_lane in lanes.values() for span in of_lane]
    cohorts = sorted({span.args["cohort"] for span in spans if "cohort" in span.args})
    # More cohorts than colours are not worth a legend: the stripes still show where one goes.
    if len(cohorts) <= len(COHORT_COLORS):
        entries += [(f"cohort {cohort}", _cohort_color(cohort)) for cohort in cohorts]
    x, lines = float(LEFT), list[str]()
    for name, color in entries:
        width = 26 + LETTER * len(name)
        if x + width > WIDTH:
            x, top = float(LEFT), top + LEGEND
        lines += [rect(x, top - 9, 10, 10, color), text(x + 14, top, name)]
        x += width
    return lines, top + LEGEND / 2


def _colors_by_name(lanes: dict[str, list[Span]]) -> dict[str, str]:
    """Return a colour for each name of a span, in the order of the time they took."""
    sec_by_name: dict[str, float] = {}
    for spans in lanes.values():
        for span in spans:
            sec = span.end_sec - span.start_sec
            sec_by_name[span.name] = sec_by_name.get(span.name, 0.0) + sec
    names = sorted(sec_by_name, key=lambda name: -sec_by_name[name])
    named = dict(zip(names, LIGHT, strict=False))
    return {name: named.get(name, OTHER) for name in names}


def _cohort_color(cohort: int) -> str:
    return COHORT_COLORS[cohort % len(COHORT_COLORS)]


def plot(trace: Path, from_sec: float | None, to_sec: float | None) -> str:
    """Return the picture of a trace, of all of it where no times are given. Raises ValueError."""
    lanes = read_lanes(trace)
    spans = [span for of_lane in lanes.values() for span in of_lane]
    if from_sec is None:
        from_sec = min((span.start_sec for span in spans), default=0.0)
    if to_sec is None:
        to_sec = max((span.end_sec for span in spans), default=from_sec + 1.0)
    if from_sec >= to_sec:
        raise ValueError(f"--to_sec={to_sec:g} must be after --from_sec={from_sec:g}")
    return draw(lanes, View(from_sec, to_sec))


def main(argv: Sequence[str]) -> int:
    """Draw what the flags name; return the exit status."""
    values = flags.FLAGS
    if len(argv) > 1 or values.trace is None or values.output is None:
        return _refuse("give --trace=FILE and --output=FILE.svg, maybe --from_sec and --to_sec")
    try:
        Path(values.output).write_text(plot(Path(values.trace), values.from_sec, values.to_sec))
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # Only here: other scripts have flags of the same names, and tests import several of them.
    flags.DEFINE_string("trace", None, "File that --trace of launch.generate wrote.")
    flags.DEFINE_string("output", None, "SVG file to write.")
    flags.DEFINE_float("from_sec", None, "Where the picture begins; unset: where the trace does.")
    flags.DEFINE_float("to_sec", None, "Where it ends; unset: where the trace does.")
    app.run(main)
