"""Devices and links that people train on, as data: rates of vendors' data sheets, dense (no
sparsity), with their sources.

`matmul_efficiency` is what large matrix products reach of the peak, and is where a device that
nobody measured starts; `constants.py` has what was fitted to runs. Prices are on-demand list
prices per device and hour as seen in 2025, for orientation: put yours into the cluster file.
"""

from __future__ import annotations

from typing import Any

DEVICES: dict[str, dict[str, Any]] = {
    "v100-16": {
        "memory_gib": 15.8,
        "peak_tflops": {"fp16": 125.0, "fp32": 15.7},
        "matmul_efficiency": 0.70,
        "memory_gb_s": 900.0,
        "price_per_hour": 3.06,
        "power_w": 300.0,
        "source": "NVIDIA Tesla V100 data sheet, SXM2 (2018); AWS p3",
    },
    "v100-32": {
        "memory_gib": 31.7,
        "peak_tflops": {"fp16": 125.0, "fp32": 15.7},
        "matmul_efficiency": 0.70,
        "memory_gb_s": 900.0,
        "price_per_hour": 3.90,
        "power_w": 300.0,
        "source": "NVIDIA Tesla V100 data sheet, SXM2 (2018); AWS p3dn",
    },
    "t4": {
        "memory_gib": 14.6,
        "peak_tflops": {"fp16": 65.0, "fp32": 8.1},
        "matmul_efficiency": 0.38,  # 70 W hold the clock near half of the boost clock
        "memory_gb_s": 320.0,
        "price_per_hour": 0.98,
        "power_w": 70.0,
        "source": "NVIDIA T4 data sheet (2019); AWS g4dn.12xlarge / 4",
    },
    "a10": {
        "memory_gib": 22.1,
        "peak_tflops": {"bf16": 125.0, "fp16": 125.0, "fp32": 31.2},
        "matmul_efficiency": 0.55,  # 150 W
        "memory_gb_s": 600.0,
        "price_per_hour": 1.00,
        "power_w": 150.0,
        "source": "NVIDIA A10 data sheet (2021)",
    },
    "a100-40": {
        "memory_gib": 39.4,
        "peak_tflops": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
        "matmul_efficiency": 0.78,
        "memory_gb_s": 1555.0,
        "price_per_hour": 2.70,
        "power_w": 400.0,
        "source": "NVIDIA A100 data sheet, SXM4 (2020); AWS p4d",
    },
    "a100-80": {
        "memory_gib": 79.15,
        "peak_tflops": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
        "matmul_efficiency": 0.78,
        "memory_gb_s": 2039.0,
        "price_per_hour": 3.40,
        "power_w": 400.0,
        "source": "NVIDIA A100 80GB data sheet, SXM4 (2021); AWS p4de",
    },
    "h100": {
        "memory_gib": 79.1,
        "peak_tflops": {"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "fp32": 66.9},
        "matmul_efficiency": 0.68,
        "memory_gb_s": 3350.0,
        "price_per_hour": 4.00,
        "power_w": 700.0,
        "source": "NVIDIA H100 data sheet, SXM5 (2023); without the factor 2 of sparsity",
    },
    "h100-96-500w": {
        "memory_gib": 94.5,
        "peak_tflops": {"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "fp32": 66.9},
        "matmul_efficiency": 0.55,
        "memory_gb_s": 2400.0,
        "price_per_hour": 4.00,
        "power_w": 500.0,
        "source": "torchtitan benchmarks, 2024-12: H100 with 96 GB of HBM2e limited to 500 W; "
        "rates of the H100 data sheet",
    },
    "h200": {
        "memory_gib": 139.8,
        "peak_tflops": {"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "fp32": 66.9},
        "matmul_efficiency": 0.70,
        "memory_gb_s": 4800.0,
        "price_per_hour": 5.00,
        "power_w": 700.0,
        "source": "NVIDIA H200 data sheet, SXM (2024); without sparsity",
    },
    "b200": {
        "memory_gib": 178.4,
        "peak_tflops": {"bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "fp32": 75.0},
        "matmul_efficiency": 0.70,
        "memory_gb_s": 7700.0,
        "price_per_hour": 7.00,
        "power_w": 1000.0,
        "source": "NVIDIA DGX B200 data sheet (2024), / 8 devices; without sparsity",
    },
    "gb200": {
        "memory_gib": 184.0,
        "peak_tflops": {"bf16": 2500.0, "fp16": 2500.0, "fp8": 5000.0, "fp32": 80.0},
        "matmul_efficiency": 0.70,
        "memory_gb_s": 8000.0,
        "price_per_hour": 8.00,
        "power_w": 1200.0,
        "source": "NVIDIA GB200 NVL72 data sheet (2024), / 72 devices; without sparsity",
    },
    "mi300x": {
        "memory_gib": 191.5,
        "peak_tflops": {"bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9, "fp32": 163.4},
        "matmul_efficiency": 0.50,
        "memory_gb_s": 5300.0,
        "price_per_hour": 4.00,
        "power_w": 750.0,
        "source": "AMD Instinct MI300X data sheet (2023); without sparsity",
    },
    "l40s": {
        "memory_gib": 44.4,
        "peak_tflops": {"bf16": 362.0, "fp16": 362.0, "fp8": 733.0, "fp32": 91.6},
        "matmul_efficiency": 0.60,
        "memory_gb_s": 864.0,
        "price_per_hour": 1.90,
        "power_w": 350.0,
        "source": "NVIDIA L40S data sheet (2023); without sparsity",
    },
    "rtx4090": {
        "memory_gib": 23.5,
        "peak_tflops": {"bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "fp32": 82.6},
        "matmul_efficiency": 0.88,
        "memory_gb_s": 1008.0,
        "price_per_hour": 0.70,
        "power_w": 450.0,
        "source": "NVIDIA Ada GPU architecture paper (2022), table 2: with fp32 accumulation, "
        "without sparsity",
    },
    "cpu": {
        "memory_gib": 32.0,
        "peak_tflops": {"fp32": 1.0, "bf16": 1.0},
        "matmul_efficiency": 0.50,
        "memory_gb_s": 50.0,
        "price_per_hour": 0.40,
        "power_w": 150.0,
        "source": "one process on about 16 AVX2 cores (2 x 8 FMA x 2 x 2 GHz); measure yours; "
        "constants from four small runs on 2 cores (constants.py)",
    },
}
"""Usable memory (what a driver reports, below the marketed number), peak rates by data type, memory
bandwidth.
"""

LINKS: dict[str, dict[str, float | str]] = {
    # Bytes per second that a device sends in one direction.
    "nvlink2": {"gb_s": 150.0, "latency_us": 3.0, "kind": "nvlink"},
    "nvlink3": {"gb_s": 300.0, "latency_us": 3.0, "kind": "nvlink"},
    "nvlink4": {"gb_s": 450.0, "latency_us": 3.0, "kind": "nvlink"},
    "nvlink5": {"gb_s": 900.0, "latency_us": 3.0, "kind": "nvlink"},
    "infinity-fabric": {"gb_s": 448.0, "latency_us": 3.0, "kind": "xgmi"},
    "pcie3": {"gb_s": 13.0, "latency_us": 8.0, "kind": "pcie"},
    "pcie4": {"gb_s": 26.0, "latency_us": 6.0, "kind": "pcie"},
    "pcie5": {"gb_s": 52.0, "latency_us": 5.0, "kind": "pcie"},
    "memory": {"gb_s": 20.0, "latency_us": 20.0, "kind": "memory"},
}

DEFAULT_LINKS: dict[str, str] = {
    "v100-16": "nvlink2",
    "v100-32": "nvlink2",
    "t4": "pcie3",
    "a10": "pcie4",
    "a100-40": "nvlink3",
    "a100-80": "nvlink3",
    "h100": "nvlink4",
    "h100-96-500w": "nvlink4",
    "h200": "nvlink4",
    "b200": "nvlink5",
    "gb200": "nvlink5",
    "mi300x": "infinity-fabric",
    "l40s": "pcie4",
    "rtx4090": "pcie4",
    "cpu": "memory",
}
"""What joins the devices of one node where the cluster file says nothing."""

NETWORK_LATENCY_US = {"infiniband": 3.0, "roce": 5.0, "ethernet": 25.0, "wan": 5_000.0}
"""Of one hop, as a collective sees it, where the cluster file says nothing."""
