"""QR-Adaptor: bits of the base and rank of the adapters chosen together, layer by layer (arXiv 2505.03802).

A configuration gives each decoder layer a pair (bits, rank). What is looked for is the least loss under a memory
budget, and with it the Pareto front of loss and memory, in the paper's three stages (engine/search/stages.py), without
a gradient of anything with respect to the configuration. Then a LoRA of these ranks is trained on a base of these bits.

As the paper has it: the unit is a decoder layer; its sensitivity is the KL divergence of the model's output when this
layer alone is held in the fewest bits; sensitive layers start with more of both; crossover inherits a layer's pair
whole, mutation moves by one choice; a configuration is judged by proxy tuning, a few steps on calibration data, and the
loss on other rows; memory is the quantized weights, their scales and the adapters; a Matérn-5/2 process proposes
neighbours of the front by expected improvement, its features being the places of bits and ranks among the choices.

Where the paper leaves it open, or is dearer than a laptop can pay, here: the rows are the first of the run, half for
the tuning and half for the measuring. KL and loss are over trained tokens. One sensitivity stands for both bits and
rank. The authors pre-select children by a learnt model, and their process knows the front alone; here every child is
tuned for `proxy_steps`, and the process knows all that was tried. The budget is a hard limit, kept, as in the authors'
code, by stepping down where it hurts least per byte. The choice is the least loss within the budget, the paper's
statement of the problem (`loss_weight` 1; the authors' code weighs loss 0.6 against memory 0.4). The uniform base that
the budget speaks of is tried too. Adapters of all ranks share one scale, alpha / max(ranks), and a smaller A is the
head of a larger one, so that configurations differ in nothing but themselves. 2, 4 and 8 bits are nf2, nf4 and int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from steps.config.peft.qr_adaptor import QRAdaptor
from steps.engine.adapters.base import Adapters, Calibration, Factors, Method, Settled, Target, attach, register
from steps.engine.adapters.lora import LoRAAdapter
from steps.engine.adapters.proxy import Proxy
from steps.engine.adapters.starts import matrix
from steps.engine.model.decoder import Decoder
from steps.engine.search.report import Report
from steps.engine.search.space import Configuration, Space
from steps.engine.search.stages import Settings, Trial, search
from steps.shapes import account, targets


class RankedAdapter(LoRAAdapter):
    """LoRA of a layer's own rank. A checkpoint has one shape for all layers: there it is padded with zeros."""

    def __init__(self, linear_in: Tensor, linear_out: Tensor, scale: float, dropout: float, padded_rank: int) -> None:
        super().__init__(linear_in, linear_out, scale, dropout, "pre")
        self.missing = padded_rank - len(linear_in)

    def saved(self) -> dict[str, Tensor]:
        a, b = self.linear_in.weight.detach(), self.linear_out.weight.detach()
        padded = {
            "linear_in.weight": F.pad(a, (0, 0, 0, self.missing)),
            "linear_out.weight": F.pad(b, (0, self.missing)),
        }
        return padded if self.missing else super().saved()

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        rank = len(self.linear_in.weight)
        a, b = tensors["linear_in.weight"], tensors["linear_out.weight"]
        super().load_saved({"linear_in.weight": a[:rank], "linear_out.weight": b[:, :rank]})


@register("qr_adaptor")
class QRAdaptorMethod(Method[QRAdaptor]):
    """The method as such; see the module."""

    documents = ("qr_adaptor.json", "qr_adaptor.md", "qr_adaptor.svg")

    def build(self, target: Target) -> RankedAdapter:
        section, linear = self.section, target.linear
        rank, dtype = section.rank(targets.layer(target.name)), getattr(torch, section.lora_dtype or "float32")
        a = matrix(section.lora_A_init_method, max(section.ranks), linear.in_features, target.generator())[:rank]
        b = torch.zeros(linear.out_features, rank)
        # A copy of the head: the rest of the larger matrix is not kept alive.
        return RankedAdapter(a.to(dtype, copy=True), b.to(dtype), section.scale, section.dropout, section.padded_rank)

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        rank = self.section.rank(targets.layer(name))
        a, b = tensors["linear_in.weight"].float(), tensors["linear_out.weight"].float()
        return {"": Factors(a[:rank], b[:, :rank], self.section.scale)}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        bits, ranks = self.section.layer_bits or [], self.section.layer_ranks or []
        return {"average_bits": _mean(bits), "average_rank": _mean(ranks)}

    def settle(self, calibration: Calibration) -> Settled:
        section, log = self.section, calibration.progress.log
        layers = account.layers(section, self.model)
        bits, ranks = section.choices(layers)
        space = Space(
            bits, ranks, lambda layer, *gene: section.layer_bytes(layers[layer], *gene), section.budget(layers)
        )
        settings = Settings(
            section.population, section.generations, section.refinements, section.loss_weight,
            calibration.seed if section.search_seed is None else section.search_seed,
        )  # fmt: skip
        decoder, batches = calibration.decoder(), calibration.batches(section.calibration_rows)
        proxy = Proxy(
            decoder, batches, calibration.loss, bits, section.held_in,
            partial(self._attached, decoder, calibration.seed), section.proxy_steps, section.proxy_lr,
        )  # fmt: skip
        sensitivity = proxy.sensitivity(calibration.progress)
        log(f"search: layers {_ordered(sensitivity)} are the most sensitive to few bits, in this order")
        with calibration.progress.task("search", settings.trials, "configurations") as task:
            best: list[float] = []

            def watch(trial: Trial) -> None:
                best[:] = [min([*best, trial.loss])]
                task.advance(1, loss=trial.loss, best=best[0])

            outcome = search(space, sensitivity, proxy.loss, _near(section), settings, watch)
        report = Report(outcome, space.budget, sensitivity)
        for line in report.summary():
            log(f"search: {line}")
        texts = (report.json(), report.markdown(), report.svg())
        return Settled(self._with(outcome.choice.configuration), dict(zip(self.documents, texts, strict=True)))

    def _with(self, configuration: Configuration) -> QRAdaptor:
        bits, ranks = ([gene[index] for gene in configuration] for index in range(2))
        return self.section.model_copy(update={"layer_bits": bits, "layer_ranks": ranks})

    def _attached(self, decoder: Decoder, seed: int, configuration: Configuration) -> Adapters:
        section = self._with(configuration)
        names = targets.chosen(section, self.model.num_layers)
        return attach(decoder, QRAdaptorMethod(section, self.model), names, seed)


def _near(section: QRAdaptor) -> int:
    """The bits that the budget speaks of, or the nearest there are."""
    return min(section.bits, key=lambda bits: (abs(bits - section.budget_bits), bits))


def _ordered(sensitivity: list[float]) -> str:
    most = sorted(range(len(sensitivity)), key=lambda layer: -sensitivity[layer])[:3]
    return ", ".join(map(str, most))


def _mean(values: Sequence[int]) -> float:
    return sum(values) / max(len(values), 1)
