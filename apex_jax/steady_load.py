"""A load that does not change, planned by hand: what the dispatch loop meets without a scheduler.

Device rows and host rows decode for ever, each in pages and a slot of its own; who begins a token
in which cohort is the policy's to say. Called by simulation.py and tests. Imports no jax.
"""

from collections.abc import Sequence

import numpy as np

from apex_jax.dispatch import SweepHandle
from apex_jax.plan import CohortBatch, DecodeBatch, HeadBatch, SweepPlan
from apex_jax.policies import Load, Policy
from apex_jax.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class SteadyLoad:
    """Rows 0 .. G-1 on the device, then the host's; a row's slot is its number.

    lengths: tokens of KV of each row. grows: whether they grow with each token; where they do not,
    every sweep costs the same. counts: tokens sampled by each row.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        device_lengths: Sequence[int],
        host_lengths: Sequence[int],
        pages_per_row: int = 1,
        grows: bool = True,
        max_cohort_rows: int = 1024,
    ):
        self.num_device_rows, self.num_host_rows = len(device_lengths), len(host_lengths)
        self.counts = np.zeros(self.num_device_rows + self.num_host_rows, np.int64)
        self._policy, self._max_cohort_rows = policy, max_cohort_rows
        self._lengths = np.array([*device_lengths, *host_lengths], np.int32)
        self._step = 1 if grows else 0
        self._pages_per_row = pages_per_row
        self._idle_rows = list(range(self.num_device_rows, len(self._lengths)))
        self._cohorts: dict[int, list[int]] = {}  # the rows of those with a token under way
        self._num_sweeps = 0

    def plan_sweep(self) -> SweepPlan:
        device_rows = list(range(self.num_device_rows))
        num_tokens = int(self._lengths[device_rows].sum())
        under_way = [row for rows in self._cohorts.values() for row in rows]
        load = Load(
            num_rows=len(device_rows),
            num_tokens=num_tokens,
            num_settled_rows=len(device_rows),
            num_settled_tokens=num_tokens,
            lengths=self._lengths[self._idle_rows].tolist(),
            num_under_way=len(under_way),
            num_tokens_under_way=int(self._lengths[under_way].sum()),
            idle_cohorts=[
                one for one in range(self._policy.max_cohorts) if one not in self._cohorts
            ],
            max_rows=self._max_cohort_rows,
        )
        self._policy.consider(load)
        members = self._policy.form(load)
        begun = {one: [self._idle_rows[index] for index in rows] for one, rows in members.items()}
        self._cohorts |= begun
        begun_rows = {row for rows in begun.values() for row in rows}
        self._idle_rows = [row for row in self._idle_rows if row not in begun_rows]
        self._num_sweeps += 1
        return SweepPlan(
            sweep_id=self._num_sweeps,
            decode=self._decode(device_rows) if device_rows else None,
            decode_head=self._head(device_rows) if device_rows else None,
            cohorts=tuple(
                CohortBatch(one, self._decode(rows), self._head(rows))
                for one, rows in begun.items()
            ),
        )

    def note_launched(self, sweep: SweepHandle) -> list[int]:
        """Take what a launch says; returns the rows that sampled, in the order of the tokens."""
        rows = list(range(self.num_device_rows))
        for cohort_id in sweep.sampled_cohorts:
            ended = self._cohorts.pop(cohort_id)
            self._idle_rows += ended
            rows += ended
        self.counts[rows] += 1
        self._lengths[rows] += self._step
        return rows

    def _decode(self, rows: Sequence[int]) -> DecodeBatch:
        # Each lane has a pool of its own, so a row's pages there are counted from its lane's first.
        first = 0 if rows[0] < self.num_device_rows else self.num_device_rows
        rows_b = np.array(rows, np.int32)
        pages_m = np.arange(self._pages_per_row, dtype=np.int32)
        table_bm = (rows_b[:, None] - first) * self._pages_per_row + pages_m
        return DecodeBatch(rows_b, self._lengths[rows_b], table_bm.astype(np.int32))

    def _head(self, rows: Sequence[int]) -> HeadBatch:
        positions = (self._lengths[list(rows)] + 1).tolist()
        return HeadBatch.of(range(len(rows)), rows, positions, [GREEDY] * len(rows))
