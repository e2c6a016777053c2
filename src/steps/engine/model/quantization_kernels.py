"""bitsandbytes' kernels (the extra `quantization`), where it is installed and they give the bits of ours.

On a CPU they dequantize nf4 three to four times as fast as torch.index_select.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steps.engine.model.quantization_codes import CODES

if TYPE_CHECKING:
    from steps.engine.model.quantization import QuantizedWeight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequantize(weight: QuantizedWeight, absmax: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weight [out, in] in dtype; None where no kernel serves. absmax: float32, one scale a block."""
    # bitsandbytes sends larger blocks on a CPU through torch.compile.
    if weight.code_name != "nf4" or dtype not in _DTYPES or weight.block_size >= 2048:
        return None
    # Its CPU kernel begins a new block with each row, whatever the block size; rows of one block are right for it.
    if weight.shape.numel() % weight.block_size or not serves(weight.packed.device.type):
        return None
    return _call(weight, absmax, dtype)


def _call(weight: QuantizedWeight, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    rows = (len(absmax), weight.block_size)
    op: Any = torch.ops.bitsandbytes.dequantize_4bit.default
    found: Tensor = op(weight.packed[:, None], absmax, weight.block_size, "nf4", rows, dtype)
    return found.view(weight.shape)


@cache
def serves(device_type: str) -> bool:
    """Whether bitsandbytes is here and its kernel for this kind of device has our bits, asked by trying it once."""
    from steps.engine.model.quantization import QuantizedWeight

    # It warns, at its import, of kernels that nobody asks for here.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        native = importlib.import_module("bitsandbytes.cextension")
        if isinstance(native.lib, native.ErrorHandlerMockBNBNativeLibrary):
            return False
        trial = QuantizedWeight((16, 64), _Trial()).copy_(
            torch.tensor(CODES["nf4"].values).outer(torch.linspace(-3, 2, 64))
        )
        trial = trial.to(device_type)
        absmax = trial.absmax()
        ours = trial.dequantize_here(absmax)
        return all(torch.equal(_call(trial, absmax, dtype), ours.to(dtype)) for dtype in _DTYPES)
    except Exception:  # not installed, of another libc, of another release: ours serve as well
        return False
    finally:
        logger.setLevel(level)


class _Trial:
    type, block_size, double_quant = "nf4", 64, True
