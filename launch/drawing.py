"""SVG by hand: a picture's frame, text, colours and round steps, for everything that launch/ draws.

Owns what pictures share: that they can be read by the colour-blind, in light and in dark, by a
screen reader, and without a network. Called by the scripts named plot_* and the report's charts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

# Paul Tol's light scheme, for areas that carry dark text, and his bright one, for the rest: both
# are told apart by colour-blind people too.
LIGHT = (
    *("#77aadd", "#eedd88", "#44bb99", "#ffaabb"),
    *("#bbcc33", "#99ddff", "#ee8866", "#aaaa00"),
)
BRIGHT = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")
OTHER = "#bbbbbb"
INK = "#1f2328"

# Classes: `muted` for what names axes, `line` for grids, `edge` between areas, `mark` for what is
# on bars, `on-color` for text on a light area, `paper` for what hides lines behind text.
STYLE = """\
svg{--ink:#1f2328;--muted:#59636e;--line:#d1d9e0;--paper:#ffffff}
@media (prefers-color-scheme:dark){
svg{--ink:#e6edf3;--muted:#9da7b1;--line:#3d444d;--paper:#12161c}
}
svg text{fill:var(--ink)}
svg text.muted{fill:var(--muted)}
svg text.on-color{fill:#1f2328}
svg .edge{stroke:var(--paper)}
svg .line{stroke:var(--line)}
svg .mark{stroke:var(--ink)}
svg .paper{fill:var(--paper)}
"""
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Picture:
    """SVG elements in a frame. title, description: what a screen reader says in their place."""

    width: float
    height: float
    body: Sequence[str]
    title: str
    description: str = ""
    font_size: float = 11

    def to_file(self) -> str:
        """Return a whole SVG file."""
        size = f'width="{self.width:g}" height="{self.height:g}"'
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} {self._attributes()}>',
                f"<title>{escape(self.title)}</title>",
                *([f"<desc>{escape(self.description)}</desc>"] if self.description else []),
                f"<style>{STYLE}</style>",
                f'<rect class="paper" {size} fill="#ffffff"/>',
                *self.body,
                "</svg>\n",
            )
        )

    def to_element(self, name: str) -> str:
        """Return an element for a page that holds STYLE; its ids begin with `name`."""
        described = f' aria-describedby="{name}-desc"' if self.description else ""
        return "\n".join(
            (
                f'<svg role="img" aria-labelledby="{name}-title"{described} {self._attributes()}>',
                f'<title id="{name}-title">{escape(self.title)}</title>',
                *(
                    [f'<desc id="{name}-desc">{escape(self.description)}</desc>']
                    if self.description
                    else []
                ),
                *self.body,
                "</svg>",
            )
        )

    def _attributes(self) -> str:
        return (
            f'viewBox="0 0 {self.width:g} {self.height:g}" font-family={quoteattr(FONT)} '
            f'font-size="{self.font_size:g}" fill="{INK}"'
        )


def text(x: float, y: float, content: str, attributes: str = "") -> str:
    """Return a line of text whose baseline begins at (x, y)."""
    return f'<text x="{x:.2f}" y="{y:.2f}" {attributes}>{escape(content)}</text>'


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    tip: str = "",
    attributes: str = "",
) -> str:
    """Return a filled rectangle; `tip` is shown where it is pointed at."""
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    frame = f'{place} fill="{color}" {attributes}'.rstrip()
    return f"<rect {frame}><title>{escape(tip)}</title></rect>" if tip else f"<rect {frame}/>"


def grid_line(path: str) -> str:
    """Return a thin line of a grid or an axis."""
    return f'<path class="line" d="{path}" stroke="#d1d9e0" fill="none"/>'


def round_step(at_least: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= at_least)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, about so many."""
    step = round_step((high - low) / about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... between two numbers, or as `ticks` where those would be few."""
    if high < 5 * low:
        return ticks(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < 1000 * low else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
