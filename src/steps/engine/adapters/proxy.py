"""What a configuration of bits and ranks promises, measured on a part of the data: QR-Adaptor's sensitivity and its
proxy tuning (arXiv 2505.03802, stages 1 and 2). One decoder serves all configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.engine.adapters.base import Adapters
from steps.engine.data.batches import MicroBatch
from steps.engine.model.decoder import Decoder
from steps.engine.model.pointwise import rms_norm
from steps.engine.model.quantization import QuantizedWeight, Spec, quantize
from steps.engine.progress import Progress
from steps.engine.search.space import Configuration

#: Nats that count for a configuration whose loss is not finite: worse than any that is.
_HOPELESS = 100.0
#: Tokens whose logits exist at a time.
_CHUNK = 256


class Proxy:
    """A decoder that takes on one configuration after the other.

    batches: every other one is tuned on, the rest measured on; a single one serves for both.
    loss:    sum over a batch's trained tokens.
    choices: bits that each layer may be held in.   held: how weights are held in so many bits.
    attach:  puts fresh adapters of a configuration on the decoder.
    steps, lr: AdamW steps of one batch each, without weight decay.

    The decoder is used up: from the first `loss` on its linears' own weights are gone.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[MicroBatch],
        loss: Callable[[Decoder, MicroBatch], Tensor],
        choices: Sequence[Sequence[int]],
        held: Callable[[int], Spec],
        attach: Callable[[Configuration], Adapters],
        steps: int,
        lr: float,
    ) -> None:
        self.decoder, self._loss, self._held, self._attach = decoder.eval(), loss, held, attach
        self.tuned, self.measured = batches[::2], batches[1::2] or batches
        self.steps, self.lr, self._choices = steps, lr, choices
        self._linears = [
            [(name, linear) for name, linear in decoder.linears().items() if name.split(".")[2] == str(layer)]
            for layer in range(decoder.config.num_layers)
        ]
        self._wide = {name: linear.weight for name, linear in decoder.linears().items()}
        self._few: dict[tuple[str, int], QuantizedWeight] = {}
        self._bits: list[int | None] = [None] * decoder.config.num_layers

    def sensitivity(self, progress: Progress) -> list[float]:
        """For each layer KL(p || q) in nats, the mean over the trained tokens that are tuned on.

        p is what the model says of the next token, q what it says when this layer alone is held in its fewest bits.
        """
        bits = [min(choices) for choices in self._choices]
        found = [0.0] * len(bits)
        tokens = sum(len(batch.trained) for batch in self.tuned)
        with torch.no_grad(), progress.task("layer sensitivity", len(bits) * len(self.tuned), "layers") as task:
            for batch in self.tuned:
                inputs, last = self._inputs(batch)
                for layer, few in enumerate(bits):
                    self._hold(layer, few)
                    divergence = self._divergence(last, self._continued(batch, inputs[layer], layer), batch)
                    found[layer] += divergence / max(tokens, 1)
                    self._hold(layer, None)
                    task.advance()
        return found

    def loss(self, configuration: Configuration) -> float:
        """Mean loss in nats over the trained tokens that are measured on, after the tuning."""
        self._forget()
        for layer, (bits, _) in enumerate(configuration):
            self._hold(layer, bits)
        adapters = self._attach(configuration)
        self.decoder.eval()  # new adapters would drop out, and two configurations differ by chance
        try:
            self._tune(adapters)
            with torch.no_grad():
                total = sum(self._loss(self.decoder, batch).item() for batch in self.measured)
        finally:
            for name, linear in self.decoder.linears().items():
                if name in adapters.modules:
                    linear.adapter = None
        mean = total / max(sum(len(batch.targets) for batch in self.measured), 1)
        return mean if math.isfinite(mean) else _HOPELESS

    def _tune(self, adapters: Adapters) -> None:
        optimizer = torch.optim.AdamW(list(adapters.parameters().values()), lr=self.lr, weight_decay=0)
        for step in range(self.steps):
            batch = self.tuned[step % len(self.tuned)]
            loss = self._loss(self.decoder, batch) / max(len(batch.targets), 1)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()

    def _hold(self, layer: int, bits: int | None) -> None:
        """Give a layer's linears the weights that so many bits leave; None: their own."""
        if self._bits[layer] == bits:
            return
        for name, linear in self._linears[layer]:
            if bits is None:
                linear.weight = self._wide[name]
                continue
            # Wide for as long as it serves: it is used in each step, and there was room for it when it was loaded.
            weight = self._quantized(name, bits).dequantize(self.decoder.output_weight.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        self._bits[layer] = bits

    def _quantized(self, name: str, bits: int) -> QuantizedWeight:
        if (name, bits) not in self._few:
            weight = self._wide[name]
            assert isinstance(weight, nn.Parameter), "the base that is searched on is not quantized"
            self._few[name, bits] = quantize(weight, self._held(bits))
        return self._few[name, bits]

    def _forget(self) -> None:
        """Keep what the linears' own weights are in every choice of bits, but not themselves."""
        for layer, choices in enumerate(self._choices):
            for name, _ in self._linears[layer]:
                for bits in choices if name in self._wide else ():
                    self._quantized(name, bits)
                self._wide.pop(name, None)

    def _inputs(self, batch: MicroBatch) -> tuple[list[Tensor], Tensor]:
        """What each layer is given, [tokens, hidden], and what the output layer is."""
        documents = self.decoder.documents(batch.cu_seqlens, len(batch.input_ids))
        x = F.embedding(batch.input_ids, self.decoder.embedding.word_embeddings.weight)
        inputs = []
        for layer in self.decoder.decoder.layers:
            inputs.append(x)
            x = layer(x, documents)
        return inputs, self._normed(x, batch)

    def _continued(self, batch: MicroBatch, x: Tensor, first: int) -> Tensor:
        documents = self.decoder.documents(batch.cu_seqlens, len(batch.input_ids))
        for layer in self.decoder.decoder.layers[first:]:
            x = layer(x, documents)
        return self._normed(x, batch)

    def _normed(self, x: Tensor, batch: MicroBatch) -> Tensor:
        weight, epsilon = self.decoder.decoder.final_layernorm.weight, self.decoder.config.layernorm_epsilon
        return rms_norm(x[batch.trained], weight, epsilon)

    def _divergence(self, last: Tensor, other: Tensor, batch: MicroBatch) -> float:
        """Sum over tokens of KL(p || q), p and q being what the output layer makes of [n, hidden]."""
        total = 0.0
        for ours, theirs in zip(torch.split(last, _CHUNK), torch.split(other, _CHUNK), strict=True):
            p, q = (F.log_softmax(F.linear(x, self.decoder.output_weight).float(), -1) for x in (ours, theirs))
            total += F.kl_div(q, p, reduction="sum", log_target=True).item()
        return total if math.isfinite(total) else _HOPELESS * len(batch.trained)
