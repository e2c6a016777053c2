"""A decoder-only transformer over packed tokens, with Megatron-Core's module names and weight layout.

There is no batch dimension and no padding: the packs of a micro-batch are laid end to end, and every document in them,
wherever it lies, is computed as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from steps.engine.model.layers import Documents, Linear, TransformerLayer, Weight
from steps.engine.model.pointwise import rms_norm
from steps.engine.model.quantization import QuantizedWeight, Spec
from steps.engine.model.rotary import inverse_frequencies, rotation
from steps.shapes.model_config import ModelConfig


class _Embedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = Weight(config.vocab_size, config.hidden_size)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.final_layernorm = Weight(config.hidden_size)


class Decoder(nn.Module):
    """The model. Its parameters are uninitialized and frozen; `load_weights` fills them.

    recompute: keep only each layer's input for the backward pass and compute the rest again (activation checkpointing).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        recompute: bool = False,
        quantize: Callable[[str], Spec | None] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """dtype:      of the weights and the computation; None: config.params_dtype.
        quantize:      how a linear, by its full name, holds its weight: None for as it is. It is never wide as a whole.
        compute_dtype: of products with quantized weights; None: dtype.
        """
        super().__init__()
        self.config, self.recompute = config, recompute
        with torch.device("meta"):
            self.embedding = _Embedding(config)
            self.decoder = _Block(config)
            tied = config.share_embeddings_and_output_weights
            self.output_layer = None if tied else Weight(config.vocab_size, config.hidden_size)
        self.to(dtype or getattr(torch, config.params_dtype))
        for name, linear in self.linears().items():
            if quantize is not None and (spec := quantize(name)) is not None:
                linear.quantize(spec, compute_dtype)
        self.to_empty(device=device)
        self._frequencies = inverse_frequencies(config)

    @property
    def output_weight(self) -> Tensor:
        """[vocab, hidden]: the output layer's weight, or the embedding where they are tied."""
        return self.embedding.word_embeddings.weight if self.output_layer is None else self.output_layer.weight

    def forward(self, input_ids: Tensor, cu_seqlens: Sequence[int] | Tensor) -> Tensor:
        """Logits [tokens, vocab] in the weights' dtype.

        input_ids:  [tokens] int64.
        cu_seqlens: [documents + 1], ascending: document i is input_ids[cu_seqlens[i]:cu_seqlens[i + 1]].
        """
        return F.linear(self.hidden_states(input_ids, cu_seqlens), self.output_weight)

    def hidden_states(self, input_ids: Tensor, cu_seqlens: Sequence[int] | Tensor) -> Tensor:
        """What the output layer is applied to: [tokens, hidden], the final norm included."""
        return self.through_layers(input_ids, self.documents(cu_seqlens, len(input_ids)))

    def through_layers(self, input_ids: Tensor, documents: Documents) -> Tensor:
        """The same for tokens of which `documents` says how they belong together."""
        x = F.embedding(input_ids, self.embedding.word_embeddings.weight)
        for layer in self.decoder.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, documents, use_reentrant=False)
            else:
                x = layer(x, documents)
        return rms_norm(x, self.decoder.final_layernorm.weight, self.config.layernorm_epsilon)

    def documents(self, cu_seqlens: Sequence[int] | Tensor, tokens: int) -> Documents:
        """Lengths and rotary tables of a packed row. Raises ValueError where the bounds do not cover the tokens."""
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        lengths = tuple(end - start for start, end in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 1:
            raise ValueError(f"cu_seqlens must ascend from 0 to {tokens}, got {bounds[:3]} … {bounds[-3:]}")
        counted = torch.arange(max(lengths), device=self.output_weight.device)
        return Documents(lengths, *self.rotation(torch.cat([counted[:length] for length in lengths])))

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables for positions [tokens], see `rotary.rotation`."""
        return rotation(positions, self._frequencies, self.output_weight.dtype)

    def linears(self) -> dict[str, Linear]:
        """Every linear that an adapter can be put on, by its full name, in the order of computation."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def weights(self) -> dict[str, nn.Parameter | QuantizedWeight]:
        """Everything of the frozen model by its full name, quantized weights under the names of the weights."""
        found: dict[str, nn.Parameter | QuantizedWeight] = {
            name: value for name, value in self.named_parameters() if "adapter" not in name.split(".")
        }
        return found | {name: module for name, module in self.named_modules() if isinstance(module, QuantizedWeight)}


def load_weights(decoder: Decoder, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors, named per layer as the decoder's own weights are, into the decoder, one at a time.

    Raises ValueError for a name the model does not have, a wrong shape, values that are not finite where they are
    quantized, and (in the end) names that never came.
    """
    waiting = decoder.weights()
    for name, tensor in tensors:
        parameter = waiting.pop(name, None)
        if parameter is None:
            raise ValueError(f"{name}: the model has no such weight, or it came twice")
        if parameter.shape != tensor.shape:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(parameter.shape)}")
        with torch.no_grad():
            try:
                parameter.copy_(tensor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if waiting:
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        raise ValueError(f"the checkpoint lacks {', '.join(list(waiting)[:3])}{more}")
