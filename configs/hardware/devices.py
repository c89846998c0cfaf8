"""NVIDIA cards as their data sheets describe them.

Memory is what nvidia-smi reports: a little less than the data sheet's, as ECC takes some.
Arithmetic is float16 on tensor cores, dense, accumulating in float32; where a sheet gives it with
sparsity only, half of that. PCIe is one direction of 16 lanes.

The shares of the advertised rates are estimates, for this project has measured none of these cards:
matrix-vector products reach about 0.8 of a memory's bandwidth, a paged attention kernel that reads
KV once 0.7, prefill's matrix products 0.6 of the arithmetic. A T4 has less in all: ECC takes part
of its bandwidth, and 70 W do not carry its clocks through a long matrix product. Attention in plain
XLA copies the pages before it reads them and has about a third of that share.
"""

from apex_jax.hardware_profiles import GB, DeviceProfile

MIB = 2**20
TFLOPS = 1e12
PCIE_3, PCIE_4, PCIE_5 = 16 * GB, 32 * GB, 64 * GB

_USUAL = {"weights_share": 0.80, "attention_share": 0.70, "flops_share": 0.60}
_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center"

DEVICES = {
    "t4": DeviceProfile(
        name="NVIDIA T4",
        memory_bytes=15_360 * MIB,
        bytes_per_sec=320 * GB,
        flops_per_sec=65 * TFLOPS,
        link_bytes_per_sec=PCIE_3,
        source=f"{_NVIDIA}/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
        weights_share=0.72,
        attention_share=0.72,
        flops_share=0.50,
    ),
    "a10": DeviceProfile(
        name="NVIDIA A10",
        memory_bytes=23_028 * MIB,
        bytes_per_sec=600 * GB,
        flops_per_sec=125 * TFLOPS,
        link_bytes_per_sec=PCIE_4,
        source=f"{_NVIDIA}/a10/pdf/a10-datasheet.pdf",
        **_USUAL,
    ),
    "a10g": DeviceProfile(
        name="NVIDIA A10G",
        memory_bytes=23_028 * MIB,
        bytes_per_sec=600 * GB,
        flops_per_sec=70 * TFLOPS,
        link_bytes_per_sec=PCIE_4,
        source="https://d1.awsstatic.com/product-marketing/ec2/"
        "NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
        **_USUAL,
    ),
    "l4": DeviceProfile(
        name="NVIDIA L4",
        memory_bytes=23_034 * MIB,
        bytes_per_sec=300 * GB,
        flops_per_sec=121 * TFLOPS,
        link_bytes_per_sec=PCIE_4,
        source="https://www.nvidia.com/en-us/data-center/l4/",
        **_USUAL,
    ),
    "rtx_4090": DeviceProfile(
        name="NVIDIA GeForce RTX 4090",
        memory_bytes=24_564 * MIB,
        bytes_per_sec=1008 * GB,
        flops_per_sec=165.2 * TFLOPS,
        link_bytes_per_sec=PCIE_4,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf",
        **_USUAL,
    ),
    "a100_40gb": DeviceProfile(
        name="NVIDIA A100 40GB",
        memory_bytes=40_960 * MIB,
        bytes_per_sec=1555 * GB,
        flops_per_sec=312 * TFLOPS,
        link_bytes_per_sec=PCIE_4,
        source="https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/"
        "nvidia-ampere-architecture-whitepaper.pdf",
        **_USUAL,
    ),
    "a100_80gb": DeviceProfile(
        name="NVIDIA A100 80GB SXM",
        memory_bytes=81_920 * MIB,
        bytes_per_sec=2039 * GB,
        flops_per_sec=312 * TFLOPS,
        link_bytes_per_sec=PCIE_4,
        source=f"{_NVIDIA}/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
        **_USUAL,
    ),
    "h100": DeviceProfile(
        name="NVIDIA H100 SXM",
        memory_bytes=81_559 * MIB,
        bytes_per_sec=3350 * GB,
        flops_per_sec=989.5 * TFLOPS,
        link_bytes_per_sec=PCIE_5,
        source="https://www.nvidia.com/en-us/data-center/h100/",
        **_USUAL,
    ),
    "h200": DeviceProfile(
        name="NVIDIA H200 SXM",
        memory_bytes=143_771 * MIB,
        bytes_per_sec=4800 * GB,
        flops_per_sec=989.5 * TFLOPS,
        link_bytes_per_sec=PCIE_5,
        source="https://www.nvidia.com/en-us/data-center/h200/",
        **_USUAL,
    ),
}
