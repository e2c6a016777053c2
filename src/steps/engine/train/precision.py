"""In which dtype the frozen model computes."""

from __future__ import annotations

import torch

_COMMON = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(precision: str, stored: str, device: torch.device) -> torch.dtype:
    """The dtype for `train.precision` and a base stored as `stored` ("float32", "bfloat16", "float16").

    auto: bfloat16 for a base that is stored so, where the hardware is faster at it than at float32; otherwise float32,
    which holds every stored value exactly. float16 is never computed in: its products are slow on CPUs, and its range
    needs a loss scale.
    """
    if precision != "auto":
        return _COMMON[precision]
    return torch.bfloat16 if stored == "bfloat16" and _fast_bfloat16(device) else torch.float32


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # oneDNN's own question: AVX-512 with bf16 instructions, AMX, or Arm's bf16 extension.
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
