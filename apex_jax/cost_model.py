"""How long the stages of a sweep take, in seconds.

Owns the arithmetic of one device, one host and one model: a layer's linear work is bound by reading
its weights or by arithmetic, attention by reading KV. Pure functions. Imports no jax.
"""

from dataclasses import dataclass

from apex_jax.config import LlamaConfig


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
    """Times of one model's stages on one device and one host; all but head_sec are per layer.

    linear_sec: linear work for few rows. linear_sec_per_row: its arithmetic, which bounds many
    rows. pre_share: of the linear work, what comes before attention. device_attention_sec: of
    decode rows, whatever their KV. device_attention_sec_per_token, host_attention_sec_per_token:
    for a token of KV. prefill_attention_sec_per_pair: for a prompt token and a token it attends to.
    host_row_sec: for a row, whatever its length. host_job_sec: overhead of a job.
    host_copy_sec_per_token: for a token of KV into the host's pool or out of it. transfer_sec:
    latency of a transfer either way; transfer_sec_per_row: for a row's q, k and v, or its output;
    transfer_sec_per_token: for a token of KV. head_sec: output matrix and sampling. stage_sec:
    overhead of a device stage. dispatch_sec: Python's, for a stage or a job.
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
    stage_sec: float = 0.0
    dispatch_sec: float = 0.0

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
            stage_sec=hardware.stage_sec,
            dispatch_sec=hardware.dispatch_sec,
        )

    def linear(self, num_rows: int) -> float:
        """Return a layer's linear time for so many rows (or prompt tokens)."""
        return max(self.linear_sec, self.linear_sec_per_row * num_rows) if num_rows else 0.0

    def device_attention(self, num_tokens: int, num_pairs: int = 0) -> float:
        """Return a layer's attention time on the device over so many tokens of KV in all.

        num_pairs: of a prompt's tokens and those they attend to.
        """
        if not num_tokens:
            return 0.0
        reading_sec = self.device_attention_sec_per_token * num_tokens
        arithmetic_sec = self.prefill_attention_sec_per_pair * num_pairs
        return self.device_attention_sec + max(reading_sec, arithmetic_sec)

    def host_attention(self, num_rows: int, num_tokens: int) -> float:
        """Return the time of a host job: a layer's attention of a cohort, overhead included."""
        if not num_rows:
            return 0.0
        per_row = self.host_row_sec * num_rows
        return self.host_job_sec + per_row + self.host_attention_sec_per_token * num_tokens

    def host_copy(self, num_tokens: int) -> float:
        """Return the time of a host job that writes or reads pages of a layer."""
        return self.host_job_sec + self.host_copy_sec_per_token * num_tokens

    def transfer(self, num_rows: int = 0, num_tokens: int = 0) -> float:
        """Return the time of a transfer of a cohort's rows, or of tokens of KV in one layer."""
        per_row = self.transfer_sec_per_row * num_rows
        return self.transfer_sec + per_row + self.transfer_sec_per_token * num_tokens
