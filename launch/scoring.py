"""Answers with the scores behind their tokens, and how far two runs of them agree.

Owns the near-tie rule as measurements apply it: where two texts part, the reference's own margin
there (the gap of its two best scores) tells whether rounding can have done it. Called by the
measurements that compare outputs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from apex_jax.backends.handles import HiddenHandle
from apex_jax.backends.xla import XlaBackend
from apex_jax.buckets import Buckets
from apex_jax.hardware import Handle, Head, Stage
from apex_jax.request import RequestOutput
from launch.measuring import Row
from launch.shared_engine import WatchedBackend


class ScoringBackend(WatchedBackend):
    """A backend that keeps the scores behind every sampled token.

    module: the model in the same number format. keeps_scores: False while only time counts.
    """

    def __init__(self, backend: XlaBackend, shapes: Buckets, module: Any):
        super().__init__(backend, shapes, computes_prompts=True)
        self.keeps_scores = True
        self._score = jax.jit(module.logits)
        self._heads: list[tuple[Any, jax.Array]] = []

    def enqueue(self, stage: Stage, *operands: Handle) -> tuple[Handle, ...]:
        handles = super().enqueue(stage, *operands)
        if isinstance(stage, Head) and self.keeps_scores:
            for batch, group in zip(stage.batches, operands, strict=True):
                assert isinstance(group, HiddenHandle)
                self._heads.append((batch, self._score(group.x_bd)))
        return handles

    def take(self) -> dict[tuple[int, int], np.ndarray]:
        """Return the scores since the last call, by a request's seed and the token's position."""
        scores: dict[tuple[int, int], np.ndarray] = {}
        for batch, scores_bv in self._heads:
            rows_bv = np.asarray(scores_bv, np.float32)
            for row, seed, position in zip(
                batch.rows_b, batch.sampling_b["seed"][:, 1], batch.positions_b, strict=True
            ):
                scores[int(seed), int(position)] = rows_bv[row]
        self._heads.clear()
        return scores


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a run made of the requests. scores: as ScoringBackend yields them."""

    outputs: Mapping[str, RequestOutput]
    scores: Mapping[tuple[int, int], np.ndarray]


def compare(right: Answers, got: Answers) -> Row:
    """Return how far answers agree with the reference's."""
    firsts: list[int] = []
    margins: list[float] = []
    max_difference = 0.0
    num_tokens = num_host_tokens = 0
    for name, expected in right.outputs.items():
        output = got.outputs[name]
        num_tokens += len(output.token_ids)
        num_host_tokens += output.num_host_tokens
        seed, start = expected.request.sampling.seed, len(expected.request.prompt_token_ids)
        for index, (a, b) in enumerate(zip(expected.token_ids, output.token_ids, strict=True)):
            scores_v = right.scores[seed, start + index]
            std = float(scores_v.std())
            difference = np.abs(got.scores[seed, start + index] - scores_v).max() / std
            max_difference = max(max_difference, float(difference))
            if a != b:
                best = np.partition(scores_v, -2)[-2:]
                firsts.append(index)
                margins.append(float(best[1] - best[0]) / std)
                break
    return {
        "requests": len(right.outputs),
        "tokens": num_tokens,
        "equal_percent": 100 * (1 - len(firsts) / len(right.outputs)),
        "first_differences": firsts,
        "earliest_difference": min(firsts, default=None),
        "margins_there_stds": [float(f"{margin:.3g}") for margin in margins],
        "widest_margin_stds": max(margins, default=None),
        "max_score_difference_stds": max_difference,
        "host_token_percent": 100 * num_host_tokens / num_tokens,
    }
