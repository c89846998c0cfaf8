"""How long the stages of a sweep take, in seconds.

Owns the arithmetic of one device, one host and one model: a layer's linear work is bound by reading
its weights or by arithmetic, attention by reading KV. Pure functions. Imports no jax.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageTimes:
    """Times of one model's stages on one device and one host; attention is per layer.

    linear_sec: one layer's linear work for few rows. linear_sec_per_row: its arithmetic, which
    bounds many rows. pre_share: of the linear work, what comes before attention.
    device_attention_sec_per_token, host_attention_sec_per_token: for a token of KV in one layer.
    host_row_sec: likewise for a row, whatever its length. host_job_sec: overhead of a job.
    transfer_sec: latency of a transfer either way; transfer_sec_per_row: for a row's q, k and v,
    or its output; transfer_sec_per_token: for a token of KV in one layer. head_sec: output matrix
    and sampling. stage_sec: overhead of a device stage. dispatch_sec: Python's, for a stage.
    """

    num_layers: int
    linear_sec: float
    linear_sec_per_row: float = 0.0
    pre_share: float = 0.25
    device_attention_sec: float = 0.0
    device_attention_sec_per_token: float = 0.0
    host_attention_sec_per_token: float = 0.0
    host_row_sec: float = 0.0
    host_job_sec: float = 0.0
    transfer_sec: float = 0.0
    transfer_sec_per_row: float = 0.0
    transfer_sec_per_token: float = 0.0
    head_sec: float = 0.0
    stage_sec: float = 0.0
    dispatch_sec: float = 0.0

    def linear(self, num_rows: int) -> float:
        """Return a layer's linear time for so many rows (or prompt tokens)."""
        return max(self.linear_sec, self.linear_sec_per_row * num_rows) if num_rows else 0.0

    def device_attention(self, num_tokens: int) -> float:
        """Return a layer's attention time on the device over so many tokens of KV in all."""
        if not num_tokens:
            return 0.0
        return self.device_attention_sec + self.device_attention_sec_per_token * num_tokens

    def host_attention(self, num_rows: int, num_tokens: int) -> float:
        """Return the time of a host job: a layer's attention of a cohort, overhead included."""
        if not num_rows:
            return 0.0
        per_row = self.host_row_sec * num_rows
        return self.host_job_sec + per_row + self.host_attention_sec_per_token * num_tokens

    def transfer(self, num_rows: int = 0, num_tokens: int = 0) -> float:
        """Return the time of a transfer of a cohort's rows, or of tokens of KV in one layer."""
        per_row = self.transfer_sec_per_row * num_rows
        return self.transfer_sec + per_row + self.transfer_sec_per_token * num_tokens
