"""Devices and hosts that are only described: what their data sheets say, and how much of it is had.

Owns the arithmetic from a data sheet to the rates that cost_model.py works with, and from a card's
memory to what it leaves for KV cache. The tables are in configs/hardware/. Refuses a model that a
card cannot hold. Imports no jax.
"""

from dataclasses import dataclass

from apex_jax.config import ConfigError, LlamaConfig
from apex_jax.cost_model import Hardware, StageTimes

GB, GIB = 1e9, 2**30
DISPATCH_SEC = 20e-6  # a compiled call with a layer's arrays takes 10, finding it as much again


@dataclass(frozen=True)
class DeviceProfile:
    """An accelerator and its link to the host.

    memory_bytes: in all, as its driver counts them. bytes_per_sec: of its memory, flops_per_sec: of
    float16 tensor cores that accumulate in float32, without sparsity, link_bytes_per_sec: of PCIe
    in one direction; all three as advertised. weights_share, attention_share: of bytes_per_sec, had
    when weights are read and when pages of KV are attended to. flops_share, link_share: likewise.
    link_sec: latency of a transfer. stage_sec: between two stages. source: where the advertised
    figures are from.
    """

    name: str
    memory_bytes: int
    bytes_per_sec: float
    flops_per_sec: float
    link_bytes_per_sec: float
    source: str
    weights_share: float
    attention_share: float
    flops_share: float
    link_share: float = 0.75
    link_sec: float = 20e-6
    stage_sec: float = 3e-6

    def kv_bytes(self, model: LlamaConfig, itemsize: int, reserve_bytes: int) -> int:
        """Return what the weights leave for KV cache; ConfigError where that is nothing.

        itemsize: bytes of a weight. reserve_bytes: for programs' scratch and the driver's own.
        """
        weight_bytes = model.num_parameters * itemsize
        left_bytes = self.memory_bytes - weight_bytes - reserve_bytes
        if left_bytes <= 0:
            raise ConfigError(
                f"{self.name} has {self.memory_bytes / GIB:.2f} GiB of memory, which cannot hold "
                f"{weight_bytes / GIB:.2f} GiB of weights and {reserve_bytes / GIB:.2f} GiB in "
                "reserve: choose a larger card or a smaller model"
            )
        return left_bytes

    def describe(self) -> str:
        """Return the profile in a line."""
        return (
            f"{self.name}: {self.memory_bytes / GIB:.1f} GiB, {self.bytes_per_sec / GB:.0f} GB/s "
            f"({self.weights_share:.0%} for weights, {self.attention_share:.0%} for KV), "
            f"{self.flops_per_sec / 1e12:.0f} TFLOPS ({self.flops_share:.0%}), link "
            f"{self.link_bytes_per_sec / GB:.0f} GB/s ({self.link_share:.0%}); {self.source}"
        )


@dataclass(frozen=True)
class HostProfile:
    """A CPU and its memory.

    memory_bytes: in all. bytes_per_sec: of reading memory with all threads of the op, the
    memory's own rate where those saturate it. attention_share: of that, what the op reaches.
    job_sec: of a job, whatever its size. source: where the figures are from.
    """

    name: str
    memory_bytes: int
    bytes_per_sec: float
    source: str
    attention_share: float
    job_sec: float = 60e-6

    def describe(self) -> str:
        """Return the profile in a line."""
        return (
            f"{self.name}: {self.memory_bytes / GIB:.0f} GiB, {self.bytes_per_sec / GB:.0f} GB/s "
            f"({self.attention_share:.0%} for KV); {self.source}"
        )


def hardware(device: DeviceProfile, host: HostProfile) -> Hardware:
    """Return the rates that device and host reach together."""
    return Hardware(
        device_bytes_per_sec=device.bytes_per_sec * device.weights_share,
        device_attention_bytes_per_sec=device.bytes_per_sec * device.attention_share,
        device_flops_per_sec=device.flops_per_sec * device.flops_share,
        host_bytes_per_sec=host.bytes_per_sec * host.attention_share,
        link_bytes_per_sec=device.link_bytes_per_sec * device.link_share,
        link_sec=device.link_sec,
        stage_sec=device.stage_sec,
        host_job_sec=host.job_sec,
        dispatch_sec=DISPATCH_SEC,
    )


def stage_times(
    model: LlamaConfig, itemsize: int, device: DeviceProfile, host: HostProfile
) -> StageTimes:
    """Return the times of a model's stages; itemsize: bytes of a weight and of a KV entry."""
    return StageTimes.predict(model, itemsize, hardware(device, host))
