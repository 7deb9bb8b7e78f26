"""What known GPUs' matrix products reach at most: the denominators of the trainer's utilisation (MFU).

Dense products in bfloat16 with sums in float32, by data sheets, which nothing reaches. The H200's is of the largest
product that was measured on one, of which no row is kept: its MFU is 1.25 times that by its data sheet.
"""

from __future__ import annotations

BFLOAT16: dict[str, float] = {
    "NVIDIA H200": 790e12,  # data sheet: 989e12
    "NVIDIA B200": 2250e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX 6000 Ada Generation": 364e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
"""FLOP/s by `torch.cuda.get_device_name()`. A GPU that is not here has no utilisation: nobody guesses it."""
