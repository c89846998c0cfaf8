"""How long the stages of a sweep take, in seconds.

Owns the questions that can be asked (Times), and the answers for a device, a host and a model that
are described: a layer's linear work is bound by reading its weights or by arithmetic, attention by
reading KV. Pure functions. Imports no jax.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from apex_jax.config import LlamaConfig
from apex_jax.plan import PrefillBatch


class PromptWork(NamedTuple):
    """Chunks of prompts that prefill together.

    num_rows, num_tokens: of their padded shape. num_kv_tokens: that they attend to in all, their
    own included. num_pairs: of a token and one that it attends to, without padding.
    """

    num_rows: int
    num_tokens: int
    num_kv_tokens: int
    num_pairs: int

    @classmethod
    def of(cls, batch: PrefillBatch) -> "PromptWork":
        # Token i of a chunk attends to all before the chunk and to i + 1 of its own.
        lengths_b, starts_b = batch.lengths_b.astype(np.int64), batch.starts_b.astype(np.int64)
        pairs_b = lengths_b * starts_b + lengths_b * (lengths_b + 1) // 2
        num_kv_tokens = int((starts_b + lengths_b).sum())
        num_rows, num_tokens = batch.token_ids_bt.shape
        return cls(num_rows, num_tokens, num_kv_tokens, int(pairs_b.sum()))


@runtime_checkable
class Times(Protocol):
    """Seconds of every stage and job of one model on one device and one host.

    A device stage's contain what it costs to start one. Rows and tokens are those that count;
    padding is the implementation's business. num_layers: of the model. dispatch_sec: Python's, for
    a stage or a job. device_slowdown: how many times as long device stages take while a host job
    runs. host_slowdown: host jobs while a device stage runs.
    """

    @property
    def num_layers(self) -> int: ...
    @property
    def dispatch_sec(self) -> float: ...
    @property
    def device_slowdown(self) -> float: ...
    @property
    def host_slowdown(self) -> float: ...

    def embed(self, num_rows: int) -> float:
        """Return the time of an Embed stage of decode rows or prompt tokens."""
        ...

    def layers(self, num_layers: int, num_rows: int, num_tokens: int) -> float:
        """Return the time of decode rows through so many layers, run as whole programs.

        num_tokens: of KV that the rows attend to, in one layer and in all.
        """
        ...

    def prefill(self, num_layers: int, prompts: PromptWork) -> float:
        """Return the time of chunks of prompts through so many layers, run as whole programs."""
        ...

    def staged_layer(self, prompts: PromptWork) -> float:
        """Return the time of a StagedLayer: chunks of prompts bound for the host, in one layer."""
        ...

    def pre_attention(self, num_rows: int) -> float:
        """Return the time of a PreAttention stage."""
        ...

    def device_attention(self, num_rows: int, num_tokens: int) -> float:
        """Return the time of a DeviceAttention stage over so many tokens of KV in all."""
        ...

    def post_attention(self, num_rows: int) -> float:
        """Return the time of a PostAttention stage."""
        ...

    def linear(self, num_rows: int, num_cohort_rows: int = 0) -> float:
        """Return a layer's linear time, a Boundary's; 0 without rows.

        num_cohort_rows: of a cohort that rides along.
        """
        ...

    def head(self, num_rows: int, *, is_greedy: bool = False) -> float:
        """Return the time of a Head stage; 0 without rows."""
        ...

    def device_copy(self, num_tokens: int) -> float:
        """Return the time of an Export or Import of so many tokens' KV in one layer."""
        ...

    def host_attention(self, num_rows: int, num_tokens: int) -> float:
        """Return the time of a HostAttention job over so many tokens of KV; 0 without rows."""
        ...

    def host_copy(self, num_tokens: int) -> float:
        """Return the time of a job that writes or reads so many tokens' KV in one layer."""
        ...

    def transfer(self, num_rows: int = 0, num_tokens: int = 0) -> float:
        """Return the time of a transfer of a cohort's rows, or of tokens of KV in one layer."""
        ...


@dataclass(frozen=True)
class Hardware:
    """Rates of a device, of its host and of the link between them: as reached, not as advertised.

    device_bytes_per_sec, host_bytes_per_sec: of reading weights or KV. device_flops_per_sec: of
    matrix products. link_bytes_per_sec: either way. link_sec: latency of a transfer, and of
    whoever waits for it. stage_sec, host_job_sec: overhead of a device stage and of a host job.
    dispatch_sec: Python's time for either. device_attention_bytes_per_sec: of reading KV on the
    device, None where that is as fast as reading weights.
    """

    device_bytes_per_sec: float
    device_flops_per_sec: float
    host_bytes_per_sec: float
    link_bytes_per_sec: float
    link_sec: float = 0.0
    stage_sec: float = 0.0
    host_job_sec: float = 0.0
    dispatch_sec: float = 0.0
    device_attention_bytes_per_sec: float | None = None


@dataclass(frozen=True)
class StageTimes:
    """Times that follow from a few rates and constants; those of heads apart, all are per layer.

    linear_sec: linear work for few rows. linear_sec_per_row: its arithmetic, which bounds many
    rows. pre_share: of the linear work, what comes before attention. device_attention_sec: of
    decode rows, whatever their KV. device_attention_sec_per_token, host_attention_sec_per_token:
    for a token of KV. prefill_attention_sec_per_pair: for a prompt token and a token it attends to.
    host_row_sec: for a row, whatever its length. host_job_sec: overhead of a job.
    host_copy_sec_per_token: for a token of KV into the host's pool or out of it. transfer_sec:
    latency of a transfer either way; transfer_sec_per_row: for a row's q, k and v, or its output;
    transfer_sec_per_token: for a token of KV. head_sec: output matrix and sampling for few rows.
    head_sec_per_row: its arithmetic. stage_sec: overhead of a device stage. dispatch_sec: Python's,
    for a stage or a job. device_slowdown, host_slowdown: as Times says.
    """

    num_layers: int
    linear_sec: float
    linear_sec_per_row: float = 0.0
    pre_share: float = 0.25
    device_attention_sec: float = 0.0
    device_attention_sec_per_token: float = 0.0
    prefill_attention_sec_per_pair: float = 0.0
    host_attention_sec_per_token: float = 0.0
    host_row_sec: float = 0.0
    host_job_sec: float = 0.0
    host_copy_sec_per_token: float = 0.0
    transfer_sec: float = 0.0
    transfer_sec_per_row: float = 0.0
    transfer_sec_per_token: float = 0.0
    head_sec: float = 0.0
    head_sec_per_row: float = 0.0
    stage_sec: float = 0.0
    dispatch_sec: float = 0.0
    device_slowdown: float = 1.0
    host_slowdown: float = 1.0

    @classmethod
    def predict(cls, model: LlamaConfig, itemsize: int, hardware: Hardware) -> "StageTimes":
        """Return what follows from the model's shape and the hardware's rates.

        itemsize: bytes of a weight, an activation and a KV entry.
        """
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        pre = model.d_model * (queries + 2 * keys)
        post = model.d_model * queries + 3 * model.d_model * model.d_ffn
        output = model.vocab_size * model.d_model
        token_bytes = 2 * keys * itemsize
        kv_bytes_per_sec = hardware.device_attention_bytes_per_sec or hardware.device_bytes_per_sec
        return cls(
            num_layers=model.num_layers,
            linear_sec=(pre + post) * itemsize / hardware.device_bytes_per_sec,
            linear_sec_per_row=2 * (pre + post) / hardware.device_flops_per_sec,
            pre_share=pre / (pre + post),
            device_attention_sec_per_token=token_bytes / kv_bytes_per_sec,
            prefill_attention_sec_per_pair=4 * queries / hardware.device_flops_per_sec,
            host_attention_sec_per_token=token_bytes / hardware.host_bytes_per_sec,
            host_job_sec=hardware.host_job_sec,
            host_copy_sec_per_token=2 * token_bytes / hardware.host_bytes_per_sec,
            transfer_sec=hardware.link_sec,
            transfer_sec_per_row=(queries + 2 * keys) * itemsize / hardware.link_bytes_per_sec,
            transfer_sec_per_token=token_bytes / hardware.link_bytes_per_sec,
            head_sec=output * itemsize / hardware.device_bytes_per_sec,
            head_sec_per_row=2 * output / hardware.device_flops_per_sec,
            stage_sec=hardware.stage_sec,
            dispatch_sec=hardware.dispatch_sec,
        )

    def embed(self, num_rows: int) -> float:
        return self.stage_sec

    def layers(self, num_layers: int, num_rows: int, num_tokens: int) -> float:
        attention_sec = self._decode_attention(num_tokens)
        return self.stage_sec + num_layers * (self._linear(num_rows) + attention_sec)

    def prefill(self, num_layers: int, prompts: PromptWork) -> float:
        linear_sec = self._linear(prompts.num_rows * prompts.num_tokens)
        reading_sec = self.device_attention_sec_per_token * prompts.num_kv_tokens
        arithmetic_sec = self.prefill_attention_sec_per_pair * prompts.num_pairs
        attention_sec = self.device_attention_sec + max(reading_sec, arithmetic_sec)
        return self.stage_sec + num_layers * (linear_sec + attention_sec)

    def staged_layer(self, prompts: PromptWork) -> float:
        return self.prefill(1, prompts)

    def pre_attention(self, num_rows: int) -> float:
        return self.stage_sec + self.pre_share * self._linear(num_rows)

    def device_attention(self, num_rows: int, num_tokens: int) -> float:
        return self.stage_sec + self._decode_attention(num_tokens) if num_tokens else 0.0

    def post_attention(self, num_rows: int) -> float:
        return self.stage_sec + (1 - self.pre_share) * self._linear(num_rows)

    def linear(self, num_rows: int, num_cohort_rows: int = 0) -> float:
        rows = num_rows + num_cohort_rows
        return self.stage_sec + self._linear(rows) if rows else 0.0

    def head(self, num_rows: int, *, is_greedy: bool = False) -> float:
        if not num_rows:
            return 0.0
        return self.stage_sec + max(self.head_sec, self.head_sec_per_row * num_rows)

    def device_copy(self, num_tokens: int) -> float:
        # Within the device's memory: KV is read, and written.
        return self.stage_sec + 2 * self.device_attention_sec_per_token * num_tokens

    def host_attention(self, num_rows: int, num_tokens: int) -> float:
        if not num_rows:
            return 0.0
        per_row = self.host_row_sec * num_rows
        return self.host_job_sec + per_row + self.host_attention_sec_per_token * num_tokens

    def host_copy(self, num_tokens: int) -> float:
        return self.host_job_sec + self.host_copy_sec_per_token * num_tokens

    def transfer(self, num_rows: int = 0, num_tokens: int = 0) -> float:
        per_row = self.transfer_sec_per_row * num_rows
        return self.transfer_sec + per_row + self.transfer_sec_per_token * num_tokens

    def _linear(self, num_rows: int) -> float:
        return max(self.linear_sec, self.linear_sec_per_row * num_rows)

    def _decode_attention(self, num_tokens: int) -> float:
        return self.device_attention_sec + self.device_attention_sec_per_token * num_tokens
