"""What it costs a whole job to serve a request by way of the host lane.

Owns the arithmetic of bringing requests there and home again, set against what the lane yields
while others wait: a steady state knows neither. Called by adaptive.py. Imports no jax.
"""

from apex_jax.cost_model import PromptWork, Times
from apex_jax.policies import Waiting
from apex_jax.prediction import Prediction

# What a move costs is guessed: twice as much would forgo a little where hosts are fast, and once
# was 2 % too much for four rows of 4,000 tokens on an H100.
CAUTION = 1.5


class Detour:
    """The way of a request through the host lane, beside a device that serves the others.

    device_only: what the device yields by itself.
    """

    def __init__(self, times: Times, waiting: Waiting, device_only: Prediction):
        self._times, self._waiting, self._alone = times, waiting, device_only
        tokens = round(waiting.prompt_tokens)
        num_layers = times.num_layers
        self._prompt_sec = self._prefill_sec(tokens)
        # A layer's KV has to be out of the way before the next layer's may follow.
        self._layer_prompt_sec = self._prefill_sec(round(waiting.padded_tokens)) / num_layers
        self._layer_copy_sec = times.host_copy(tokens)
        self._home_sec = num_layers * (times.host_copy(tokens) + times.transfer(num_tokens=tokens))
        self._export_sec = 2 * num_layers * times.device_copy(tokens)

    @property
    def turn_sec(self) -> float:
        """Time of the device for a request that it serves alone, its prompt included."""
        return self._prompt_sec + self._waiting.output_tokens / self._alone.rate

    def cost_sec(self, lane: Prediction) -> float:
        """Return the device's time that is lost for each request in such a host lane."""
        # Pages wait behind the attention that the host is at, layer by layer.
        job_sec = lane.cohort_job_sec(self._times.num_layers)
        write_sec = self._layer_copy_sec + lane.host_busy * job_sec
        layer_sec = max(self._layer_prompt_sec, write_sec)
        there_sec = self._times.num_layers * layer_sec - self._prompt_sec
        # At the job's end rows come home one by one, and the device's run out.
        idle_sec = max(0.0, self._home_sec - self.turn_sec / 2)
        return there_sec + self._export_sec + idle_sec

    def gain_sec(self, lane: Prediction, num_host_rows: int) -> float:
        """Return what such a lane saves the device until nobody waits any more.

        num_host_rows: of those it would have, who are there already.
        """
        waiting = self._waiting
        horizon_sec = waiting.num_requests * self.turn_sec
        saved_sec = horizon_sec * (lane.rate / self._alone.rate - 1)
        num_new = lane.host_rows - num_host_rows
        num_replaced = horizon_sec * lane.host_rate / waiting.output_tokens
        num_detours = min(waiting.num_requests, max(0.0, num_new) + num_replaced)
        return saved_sec - CAUTION * num_detours * self.cost_sec(lane)

    def is_dear(self, lane: Prediction, share: float) -> bool:
        """Whether everybody's going by way of the host would cost more than this of the time."""
        return self.cost_sec(lane) > share * self.turn_sec

    @property
    def horizon_sec(self) -> float:
        return self._waiting.num_requests * self.turn_sec

    def _prefill_sec(self, num_tokens: int) -> float:
        if not num_tokens:
            return 0.0
        num_pairs = num_tokens * (num_tokens + 1) // 2
        work = PromptWork(1, num_tokens, num_tokens, num_pairs)
        return self._times.prefill(self._times.num_layers, work)
