"""How busy device and host were, and how much of that at once, from spans as they are reported.

Owns the arithmetic of intervals: sums are kept, and only the youngest spans, because those of one
lane may be reported later than younger ones of another. Imports no jax.
"""

from array import array
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float64

# Some hundred sweeps of 32 layers; working them in takes a few milliseconds.
MAX_PENDING_SPANS = 16384


class Kind(StrEnum):
    """What a span says. REST: nobody had any work to do, so that idleness means nothing."""

    DEVICE = "device"
    HOST = "host"
    REST = "rest"


@dataclass(frozen=True)
class Figures:
    """What was observed from the first span to the last, rest left out.

    both_busy_sec: device and host at once. num_bubbles, bubble_sec: gaps between two spans of the
    device, less rest.
    """

    observed_sec: float = 0.0
    device_busy_sec: float = 0.0
    host_busy_sec: float = 0.0
    both_busy_sec: float = 0.0
    num_bubbles: int = 0
    bubble_sec: float = 0.0

    @property
    def device_busy_percent(self) -> float:
        return _percent(self.device_busy_sec, self.observed_sec)

    @property
    def host_busy_percent(self) -> float:
        return _percent(self.host_busy_sec, self.observed_sec)

    @property
    def overlap_percent(self) -> float:
        """Share of the host's work that was hidden behind the device's."""
        return _percent(self.both_busy_sec, self.host_busy_sec)

    def to_json(self) -> dict[str, float]:
        """Return seconds, counts and percentages by name."""
        return {
            **asdict(self),
            "device_busy_percent": self.device_busy_percent,
            "host_busy_percent": self.host_busy_percent,
            "overlap_percent": self.overlap_percent,
        }


@dataclass(frozen=True)
class _Settled:
    """Figures up to until_sec. ends_in_bubble: the device idles there.

    num_open, open_sec: bubbles since the device's last span; they count once another one comes.
    """

    until_sec: float = -np.inf
    figures: Figures = Figures()
    has_device: bool = False
    ends_in_bubble: bool = False
    num_open: int = 0
    open_sec: float = 0.0


class BusyMeter:
    """Figures of any number of spans, in any order of kinds; not thread-safe.

    A span counts whole unless, before it was added, more than half of max_pending_spans were that
    ended after its start: then it counts from about there on.
    """

    def __init__(self, max_pending_spans: int = MAX_PENDING_SPANS):
        self._max_pending_spans = max_pending_spans
        self._num_pending = 0
        # Starts and ends in turn.
        self._pending: dict[Kind, array[float]] = {kind: array("d") for kind in Kind}
        self._settled = _Settled()

    def add(self, kind: Kind, start_sec: float, end_sec: float) -> None:
        pending = self._pending[kind]
        pending.append(start_sec)
        pending.append(end_sec)
        self._num_pending += 1
        if self._num_pending >= self._max_pending_spans:
            self._settle_older_half()

    def figures(self) -> Figures:
        return _advance(self._settled, self._pending_n2(), np.inf).figures

    def _pending_n2(self) -> dict[Kind, Float64[np.ndarray, "_ 2"]]:
        return {kind: np.array(spans).reshape(-1, 2) for kind, spans in self._pending.items()}

    def _settle_older_half(self) -> None:
        pending_n2 = self._pending_n2()
        until_sec = float(np.median(np.concatenate(list(pending_n2.values()))[:, 1]))
        self._settled = _advance(self._settled, pending_n2, until_sec)
        self._num_pending = 0
        for kind, spans_n2 in pending_n2.items():
            left_n2 = spans_n2[spans_n2[:, 1] > until_sec]
            self._pending[kind] = array("d", left_n2.tobytes())
            self._num_pending += len(left_n2)


def _advance(
    settled: _Settled, spans_n2: dict[Kind, Float64[np.ndarray, "_ 2"]], until_sec: float
) -> _Settled:
    """Return the figures up to until_sec, or to the last span's end if that is earlier."""
    clipped_n2 = {
        kind: np.clip(spans, settled.until_sec, until_sec) for kind, spans in spans_n2.items()
    }
    edges = np.unique(np.concatenate([spans.ravel() for spans in clipped_n2.values()]))
    edges = np.union1d(edges, [settled.until_sec]) if np.isfinite(settled.until_sec) else edges
    if len(edges) < 2:
        return settled
    # From each edge to the next nothing changes: s counts these stretches.
    sec_s = np.diff(edges)
    device_s, host_s, rest_s = (_covered(clipped_n2[kind], edges[:-1]) for kind in Kind)

    bubble_s = ~device_s & ~rest_s
    device_indices = np.flatnonzero(device_s)
    if not settled.has_device:
        first = device_indices[0] if len(device_indices) else len(device_s)
        bubble_s[:first] = False
    begins_s = bubble_s & ~np.concatenate([[settled.ends_in_bubble], bubble_s[:-1]])
    num_open, open_sec, num_closed, closed_sec = settled.num_open, settled.open_sec, 0, 0.0
    num_before = 0
    if len(device_indices):
        num_before = int(device_indices[-1])
        num_closed = num_open + int(begins_s[:num_before].sum())
        closed_sec = open_sec + float(sec_s[:num_before][bubble_s[:num_before]].sum())
        num_open, open_sec = 0, 0.0
    num_open += int(begins_s[num_before:].sum())
    open_sec += float(sec_s[num_before:][bubble_s[num_before:]].sum())

    figures = settled.figures
    return _Settled(
        until_sec=float(edges[-1]),
        figures=replace(
            figures,
            observed_sec=figures.observed_sec + float(sec_s[device_s | host_s | ~rest_s].sum()),
            device_busy_sec=figures.device_busy_sec + float(sec_s[device_s].sum()),
            host_busy_sec=figures.host_busy_sec + float(sec_s[host_s].sum()),
            both_busy_sec=figures.both_busy_sec + float(sec_s[device_s & host_s].sum()),
            num_bubbles=figures.num_bubbles + num_closed,
            bubble_sec=figures.bubble_sec + closed_sec,
        ),
        has_device=settled.has_device or len(device_indices) > 0,
        ends_in_bubble=bool(bubble_s[-1]),
        num_open=num_open,
        open_sec=open_sec,
    )


def _covered(
    spans_n2: Float64[np.ndarray, "n 2"], at_s: Float64[np.ndarray, "s"]
) -> Bool[np.ndarray, "s"]:
    """Return whether any of the spans holds each time; an end is outside its span."""
    starts, ends = np.sort(spans_n2[:, 0]), np.sort(spans_n2[:, 1])
    num_begun = np.searchsorted(starts, at_s, side="right")
    return num_begun > np.searchsorted(ends, at_s, side="right")


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 else 0.0
