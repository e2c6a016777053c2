"""bitsandbytes' kernels, where it is installed and they give the bits of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from steps.engine.model.quantization import QuantizedWeight


def dequantize(weight: QuantizedWeight, absmax: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weight [out, in] in dtype; None where no kernel serves."""
    return None
