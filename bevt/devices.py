"""What known devices can do at most: the denominators of the trainer's utilisation and the benchmarks' limits."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Device(NamedTuple):
    """Limits of one device."""

    bfloat16: float
    """FLOP/s of dense matrix products in bfloat16 with sums in float32."""
    bandwidth: float
    """Bytes a second, read and written, of its memory."""
    source: Literal["measured", "data sheet"]
    """`measured`: its largest matrix product and device copy, which no step passes; a data sheet's nothing reaches."""


DEVICES = {
    "NVIDIA H200": Device(790e12, 4.3e12, "measured"),  # data sheet: 989e12, 4.8e12
    "NVIDIA B200": Device(2250e12, 8.0e12, "data sheet"),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12, "data sheet"),
    "NVIDIA H100 NVL": Device(835e12, 3.9e12, "data sheet"),
    "NVIDIA H100 PCIe": Device(756e12, 2.0e12, "data sheet"),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2.04e12, "data sheet"),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 1.55e12, "data sheet"),
    "NVIDIA A100 80GB PCIe": Device(312e12, 1.94e12, "data sheet"),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 1.55e12, "data sheet"),
    "NVIDIA L40S": Device(362e12, 0.86e12, "data sheet"),
    "NVIDIA RTX 6000 Ada Generation": Device(364e12, 0.96e12, "data sheet"),
    "NVIDIA GeForce RTX 4090": Device(165e12, 1.01e12, "data sheet"),
    "NVIDIA GeForce RTX 3090": Device(71e12, 0.94e12, "data sheet"),
}
"""By `torch.cuda.get_device_name()`. One that is not here has no limit: nobody guesses it."""
