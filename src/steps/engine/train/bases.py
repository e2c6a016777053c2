"""A base in memory, as a run trains on it and as it is looked at later."""

from __future__ import annotations

import torch
from torch import Tensor

from steps.config.peft import Peft
from steps.engine.checkpoint.lazy import LazyTensors
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.progress import Progress
from steps.engine.train.precision import compute_dtype
from steps.shapes.model_config import ModelConfig


def load_base(
    shape: ModelConfig,
    tensors: LazyTensors,
    progress: Progress,
    *,
    precision: str,
    device: torch.device,
    section: Peft | None = None,
    recompute: bool = False,
) -> Decoder:
    """The frozen model with these weights, in Megatron's names.

    precision: `train.precision`.   section: of the adapter that comes on it, which may hold its weights in few bits.
    Raises ValueError as `load_weights`.
    """
    held = None if section is None else section.quantization
    decoder = Decoder(
        shape,
        dtype=compute_dtype(precision, shape.params_dtype, device),
        device=device,
        recompute=recompute,
        quantize=None if section is None else section.held,
        compute_dtype=getattr(torch, held.compute_dtype) if held is not None and held.compute_dtype else None,
    )
    with progress.task("load base", len(tensors), "tensors") as task:

        def loaded(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
            task.advance()
            return item

        load_weights(decoder, (loaded((name, tensor.load())) for name, tensor in tensors.items()))
    return decoder
