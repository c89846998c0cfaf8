"""Hosts: those this project was measured on, the paper's two, and the cloud instances of NEO.

A socket's bandwidth is its memory channels times 8 bytes times their transfers per second. Of it,
or of what was measured by reading in order, the attention op has what it reached on this project's
Xeon: 0.81 with groups of 4 (cpu_ops/README.md). An instance has part of a socket; nobody divides
the bandwidth, so it is taken in proportion to the cores, and may be more while neighbours are idle.
"""

from apex_jax.hardware_profiles import GB, GIB, HostProfile

OP_SHARE = 0.81


def _sockets(num_sockets: float, channels: int, megatransfers_per_sec: int) -> float:
    """Return the bandwidth of sockets, or of part of one."""
    return num_sockets * channels * 8 * megatransfers_per_sec * 1e6


def _g5(size: str, num_vcpus: int) -> HostProfile:
    """Return one of AWS's instances with an A10G: a vCPU is half a core, and has 4 GiB."""
    return HostProfile(
        name=f"AWS g5.{size}, {num_vcpus // 2} of 48 cores of an EPYC 7R32",
        memory_bytes=4 * num_vcpus * GIB,
        bytes_per_sec=_sockets(num_vcpus / 2 / 48, channels=8, megatransfers_per_sec=3200),
        source="https://aws.amazon.com/ec2/instance-types/g5/, arXiv 2411.01142",
        attention_share=OP_SHARE,
    )


HOSTS = {
    "epyc_1_thread": HostProfile(
        name="one of two cores of an AMD EPYC (Zen 4)",
        memory_bytes=20 * GIB,
        bytes_per_sec=30 * GB,
        source="docs/results/host_attention/bfloat16_1_thread.json: read_gb_per_sec, and what "
        "groups of 4 reach of it",
        attention_share=0.64,
    ),
    "xeon_1_thread": HostProfile(
        name="one of two cores of an Intel Xeon",
        memory_bytes=20 * GIB,
        bytes_per_sec=16 * GB,
        source="docs/results/host_attention_xeon.json",
        attention_share=OP_SHARE,
    ),
    "paper_t4": HostProfile(
        name="two Intel Xeon Gold 6130, beside a T4",
        memory_bytes=180 * GIB,
        bytes_per_sec=_sockets(2, channels=6, megatransfers_per_sec=2666),
        source="arXiv 2506.03296; https://www.intel.com/content/www/us/en/products/sku/120492",
        attention_share=OP_SHARE,
    ),
    "paper_a10": HostProfile(
        name="two Intel Xeon Gold 6342, beside an A10",
        memory_bytes=250 * GIB,
        bytes_per_sec=_sockets(2, channels=8, megatransfers_per_sec=3200),
        source="arXiv 2506.03296; https://www.intel.com/content/www/us/en/products/sku/215276",
        attention_share=OP_SHARE,
    ),
    "g4dn_4xlarge": HostProfile(
        name="AWS g4dn.4xlarge, 8 of 24 cores of a Xeon Platinum 8259CL",
        memory_bytes=64 * GIB,
        bytes_per_sec=_sockets(8 / 24, channels=6, megatransfers_per_sec=2933),
        source="https://aws.amazon.com/ec2/instance-types/g4/, arXiv 2411.01142",
        attention_share=OP_SHARE,
    ),
    "g5_2xlarge": _g5("2xlarge", 8),
    "g5_4xlarge": _g5("4xlarge", 16),
    "g5_8xlarge": _g5("8xlarge", 32),
    "g5_16xlarge": _g5("16xlarge", 64),
}
