"""Stage times looked up in what was measured: the measured twin of cost_model.StageTimes.

Owns which measured point a question comes to. A program takes what its bucket takes, so sizes are
padded first; between measured points times are interpolated linearly, axis by axis; below the first
they are the first's, and beyond the last they go on with the last slope, never falling. Pure
functions of a table. Imports no jax.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from apex_jax.buckets import Buckets
from apex_jax.cost_model import PromptWork
from apex_jax.profiling.table import Measurements, Shape


class Grid:
    """A function of one or more sizes, known at some points; each axis may depend on those before.

    points: at least one; all shapes have the same length.
    """

    def __init__(self, points: Mapping[Shape, float]):
        self._points: dict[tuple[int | float, ...], float] = {
            **points
        }  # most questions are about one of them
        inner: dict[int, dict[Shape, float]] = {}
        for (first, *rest), value in points.items():
            inner.setdefault(first, {})[tuple(rest)] = value
        self._knots = sorted(inner)
        self._values = [
            Grid(inner[knot]) if () not in inner[knot] else inner[knot][()] for knot in self._knots
        ]

    def __call__(self, first: int | float, *rest: int | float) -> float:
        known = self._points.get((first, *rest))
        return self._interpolate(first, rest) if known is None else known

    def _interpolate(self, first: int | float, rest: tuple[int | float, ...]) -> float:
        knots = self._knots
        index = bisect_left(knots, first)
        is_beyond = index == len(knots)
        index = min(index, len(knots) - 1)
        if index == 0 or knots[index] == first:
            return self._at(index, rest)
        left, right = self._at(index - 1, rest), self._at(index, rest)
        slope = (right - left) / (knots[index] - knots[index - 1])
        return right + (max(slope, 0.0) if is_beyond else slope) * (first - knots[index])

    def _at(self, index: int, rest: tuple[int | float, ...]) -> float:
        value = self._values[index]
        return value(*rest) if isinstance(value, Grid) else value


class MeasuredTimes:
    """Times of one model's programs, as measured. See cost_model.Times for what is asked.

    Shapes of the stages in `measurements`, in buckets: `embed`, `pre_attention`, `post_attention`,
    `boundary`, `head_greedy`, `head_sample`, `transfer_rows`: rows. `merged_boundary`: device's and
    cohort's rows. `layers`, `device_attention`: rows and KV blocks. `prefill`, `staged_layer`: all
    tokens of the chunks, rows, pages of context. `device_copy`, `host_copy`, `transfer_pages`:
    pages. `host_attention`: rows and tokens of each, not in buckets.
    """

    def __init__(
        self, measurements: Measurements, shapes: Buckets, *, num_layers: int, span: int
    ) -> None:
        """span: layers of a `layers` or `prefill` program."""
        self.measurements = measurements
        self.num_layers = num_layers
        self.dispatch_sec = measurements.dispatch_sec
        self.device_slowdown = measurements.device_slowdown
        self.host_slowdown = measurements.host_slowdown
        self._shapes, self._span = shapes, span
        seconds = {
            name: {shape: point.sec for shape, point in points.items()}
            for name, points in measurements.stages.items()
        }
        self._grids = {name: Grid(points) for name, points in seconds.items()}
        self._most_blocks = shapes.num_blocks[shapes.device_rows[-1]]
        assert shapes.host is not None
        self._host = shapes.host

    def embed(self, num_rows: int) -> float:
        return self._grids["embed"](_pad(num_rows, self._shapes.rows))

    def layers(self, num_layers: int, num_rows: int, num_tokens: int) -> float:
        program_sec = self._grids["layers"](*self._rows_and_blocks(num_rows, num_tokens))
        return program_sec * num_layers / self._span

    def prefill(self, num_layers: int, prompts: PromptWork) -> float:
        return self._grids["prefill"](*self._prompt_shape(prompts)) * num_layers / self._span

    def staged_layer(self, prompts: PromptWork) -> float:
        return self._grids["staged_layer"](*self._prompt_shape(prompts))

    def pre_attention(self, num_rows: int) -> float:
        return self._grids["pre_attention"](_pad(num_rows, self._shapes.rows))

    def device_attention(self, num_rows: int, num_tokens: int) -> float:
        if not num_tokens:
            return 0.0
        return self._grids["device_attention"](*self._rows_and_blocks(num_rows, num_tokens))

    def post_attention(self, num_rows: int) -> float:
        return self._grids["post_attention"](_pad(num_rows, self._shapes.rows))

    def linear(self, num_rows: int, num_cohort_rows: int = 0) -> float:
        if num_rows and num_cohort_rows:
            rows = _pad(num_rows, self._shapes.device_rows)
            return self._grids["merged_boundary"](
                rows, _pad(num_cohort_rows, self._host.cohort_rows)
            )
        rows = num_rows or num_cohort_rows
        return self._grids["boundary"](_pad(rows, self._shapes.rows)) if rows else 0.0

    def head(self, num_rows: int, *, is_greedy: bool = False) -> float:
        if not num_rows:
            return 0.0
        return self._grids["head_greedy" if is_greedy else "head_sample"](
            _pad(num_rows, self._host.head_rows)
        )

    def device_copy(self, num_tokens: int) -> float:
        return self._grids["device_copy"](self._pages(num_tokens))

    def host_attention(self, num_rows: int, num_tokens: int) -> float:
        """Rows of different lengths take what as many of their mean length do."""
        return self._grids["host_attention"](num_rows, num_tokens / num_rows) if num_rows else 0.0

    def host_copy(self, num_tokens: int) -> float:
        return self._grids["host_copy"](self._pages(num_tokens))

    def transfer(self, num_rows: int = 0, num_tokens: int = 0) -> float:
        rows_sec = tokens_sec = 0.0
        if num_rows:
            rows_sec = self._grids["transfer_rows"](_pad(num_rows, self._host.cohort_rows))
        if num_tokens:
            tokens_sec = self._grids["transfer_pages"](self._pages(num_tokens))
        return rows_sec + tokens_sec

    def _rows_and_blocks(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """Return the bucket of a decode batch; how full its blocks are is a guess.

        Of each row the last block is partly used: on average, half.
        """
        rows = _pad(num_rows, self._shapes.device_rows)
        block_tokens = self._shapes.block_tokens
        half_blocks = num_rows * (block_tokens - 1) / 2
        num_blocks = max(num_rows, round((num_tokens + half_blocks) / block_tokens))
        sizes = self._shapes.num_blocks.get(rows, self._most_blocks)
        return rows, _pad(num_blocks, sizes)

    def _prompt_shape(self, prompts: PromptWork) -> Shape:
        context = self._pages_of(-(-prompts.num_kv_tokens // prompts.num_rows))
        rows = [
            rows
            for rows, tokens in self._shapes.chunks
            if tokens == prompts.num_tokens and rows >= prompts.num_rows
        ]
        padded_rows = min(rows, default=prompts.num_rows)
        num_tokens = padded_rows * prompts.num_tokens
        return num_tokens, padded_rows, _pad(context, self._shapes.context_pages)

    def _pages(self, num_tokens: int) -> int:
        return _pad(self._pages_of(num_tokens), self._host.move_pages)

    def _pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._shapes.page_size)


def _pad(size: int, buckets: Sequence[int]) -> int:
    """Return the bucket that holds a size, or the size itself beyond the last."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else size
