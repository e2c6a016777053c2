"""The same model twice, with the same numbers: ours with adapters, and torch's or transformers' under peft."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steps.config.peft import Peft
from steps.config.training import Optimizer
from steps.engine.adapters import base
from steps.engine.adapters.canonical_lora import NAMES
from steps.engine.checkpoint import hf, mapping
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.model.layers import Linear
from steps.engine.train.loss import cross_entropy_sum
from steps.engine.train.optim import AdamW
from steps.shapes.targets import HF_NAMES, PARTS, chosen
from support.models import save_hf
from support.packed import SHAPE

#: What peft calls each of our adapter tensors.
TENSORS = {
    "linear_in.weight": "lora_A.default.weight",
    "linear_out.weight": "lora_B.default.weight",
    "weight_magnitude": "lora_magnitude_vector.default.weight",
    "spectrum": "waveft_spectrum.default",
}
#: One linear, relative to the whole tensor: the same sums in another order, of some 100 terms, at 1e-16 or 6e-8 each.
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
#: A model. In float64 all that differs is what transformers always does in float32: norms, rotation, softmax, loss.
THROUGH = {torch.float64: 2e-6, torch.float32: 2e-4}
#: A model's adapters after three steps, in either dtype, with gradients as near to each other as that.
STEPPED = 5e-5
# Adam divides each gradient by its own size plus epsilon: with the usual 1e-8, those near zero would turn float32 noise
# into whole steps.
ADAMW = Optimizer(lr=0.01, weight_decay=0.1, adam_eps=1e-5)


def reference_adamw(decayed: Sequence[Tensor], others: Sequence[Tensor] = ()) -> torch.optim.AdamW:
    """torch's, with the settings of ADAMW."""
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5)


def off(mine: Tensor, theirs: Tensor) -> float:
    """Relative to the whole tensor's size."""
    return ((mine.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm()).item()


def fill(adapter: nn.Module, generator: torch.Generator) -> None:
    """Move every trained tensor of an adapter away from its start."""
    for value in adapter.parameters():
        value.data.add_(0.1 * torch.randn(value.shape, generator=generator))


class LinearPair:
    """One linear.

    mine: ours, with its adapter.   theirs: peft's layer.   x: [tokens, in], requires a gradient.
    """

    def __init__(
        self,
        section: Peft,
        settings: Any,
        shape: tuple[int, int] = (24, 16),
        *,
        dtype: torch.dtype = torch.float32,
        base_dtype: torch.dtype | None = None,
        bias: bool = False,
        weight: Tensor | None = None,
        moved: bool = True,
    ) -> None:
        """dtype: of the adapter, and of the base if base_dtype does not say otherwise. moved: away from the start."""
        import peft

        out_features, in_features = shape
        draw = torch.Generator().manual_seed(out_features * in_features)
        weight = torch.randn(shape, generator=draw) / in_features**0.5 if weight is None else weight
        base_dtype = base_dtype or dtype
        self.mine, plain = Linear(in_features, out_features, bias=bias), nn.Linear(in_features, out_features, bias)
        offset = torch.randn(out_features, generator=draw)
        with torch.no_grad():
            for linear in (self.mine, plain):
                linear.weight.copy_(weight)
                if bias:
                    linear.bias.copy_(offset)
                linear.to(base_dtype)
        self.method = base.create(section, SHAPE)
        self.adapter = self.method.build(base.Target("linear_fc2", self.mine, (), 3)).to(dtype)
        self.mine.adapter = self.adapter
        self.model = peft.get_peft_model(nn.Sequential(OrderedDict(proj=plain)), settings)
        self.theirs = self.model.get_submodule("base_model.model.proj")
        for value in self.theirs.parameters():
            value.data = value.data.to(dtype if value.requires_grad else base_dtype)
        if moved:
            fill(self.adapter, draw)
            self.share()
        self.x = torch.randn(30, in_features, generator=draw, dtype=torch.float64).to(base_dtype).requires_grad_()
        self.wanted = torch.randn(30, out_features, generator=draw, dtype=torch.float64).to(base_dtype)

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each trained tensor of ours with peft's."""
        for name, value in self.adapter.named_parameters():
            yield value, self.theirs.get_parameter(TENSORS[name])

    def share(self) -> None:
        """Give ours to peft."""
        for mine, theirs in self.tensors():
            theirs.data.copy_(mine.data)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.mine(self.x), self.theirs(self.x)

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the mean squared distance to `wanted`: those of x, then of each trained tensor."""
        mine, theirs = (
            torch.autograd.grad((out - self.wanted).square().mean(), [self.x, *trained])
            for out, trained in zip(self.outputs(), zip(*self.tensors(), strict=True), strict=True)
        )
        return zip(mine, theirs, strict=True)

    def train(self, iterations: int = 3, reference: torch.optim.Optimizer | None = None) -> None:
        """Optimizer steps on both sides: our AdamW against torch's."""
        adapters = base.Adapters(self.mine, self.method, {"linear_fc2": self.adapter}, None)  # type: ignore[arg-type]
        optimizer = AdamW(adapters, ADAMW)
        reference = reference or reference_adamw([theirs for _, theirs in self.tensors()])
        for _ in range(iterations):
            for out in self.outputs():
                (out - self.wanted).square().mean().backward()
            optimizer.step(ADAMW.lr)
            reference.step()
            for mine, theirs in self.tensors():
                mine.grad = theirs.grad = None

    def merged(self) -> tuple[Tensor, Tensor]:
        """Merged weights in the base's dtype: ours rounded from float32 as merge_lora does, and peft's."""
        saved = {key: value.detach() for key, value in self.adapter.saved().items()}
        mine = self.method.merge("linear_fc2", self.mine.weight.float(), saved, {}).to(self.mine.weight.dtype)
        self.theirs.merge()
        return mine, self.theirs.get_base_layer().weight


class ModelPair:
    """A random model of a family: our Decoder, and transformers' under peft."""

    def __init__(
        self, directory: Path, family: str, dtype: torch.dtype, section: Peft, settings: Any, *, moved: bool = True
    ) -> None:
        """settings: peft's, without target_modules. moved: the adapters are away from their start.

        dtype: of the base, and of the adapters, which are float32 beside a bfloat16 base.
        """
        import peft
        from transformers import AutoModelForCausalLM

        save_hf(directory, family)
        source = hf.open_source(str(directory))
        self.config = replace(source.config, params_dtype=str(dtype).removeprefix("torch."))
        self.decoder = Decoder(self.config)
        load_weights(self.decoder, ((n, t.load()) for n, t in mapping.to_megatron(self.config, source.tensors).items()))
        self.method = base.create(section, self.config)
        self.adapters = base.attach(self.decoder, self.method, chosen(section, self.config.num_layers), 0)
        generator = torch.Generator().manual_seed(1)
        for module in self.adapters.modules.values():
            if dtype != torch.bfloat16:
                module.to(dtype)
            if moved:
                fill(module, generator)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        settings.target_modules = {
            HF_NAMES[part] for name in self.adapters.modules for part in _parts(name.rpartition(".")[2])
        }
        self.model = peft.get_peft_model(model, settings)
        if dtype != torch.bfloat16:
            self.model.to(dtype)
        if moved:
            self.share()
        self.ids = torch.randint(self.config.vocab_size, (2, 24), generator=generator)

    def share(self) -> None:
        """Give our adapters to peft."""
        for name, module in self.adapters.modules.items():
            mine = self.unfused(name, dict(module.named_parameters()))
            for tensors, layer in zip(mine, self.layers(name), strict=True):
                for key, value in tensors.items():
                    layer.get_parameter(TENSORS[key]).data.copy_(value)

    def layers(self, name: str) -> list[Any]:
        """peft's layers that a linear of ours stands for."""
        _, _, layer, block, linear = name.split(".")
        block = block.replace("self_attention", "self_attn")
        before = f"base_model.model.model.layers.{layer}.{block}"
        return [self.model.get_submodule(f"{before}.{HF_NAMES[part]}") for part in _parts(linear)]

    def unfused(self, name: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The adapter tensors of a linear (or their gradients) as each of its parts has them by itself."""
        parts = _parts(name.rpartition(".")[2])
        tensors = {key: value.detach() for key, value in tensors.items()}
        if len(parts) == 1:
            return [tensors]
        if self.method.section.canonical:
            return [{key: tensors[f"{NAMES[part]}.{key}"] for key in list(TENSORS)[:2]} for part in parts]
        # A fused linear with one A is its parts with that A each.
        rows = {key: self.split(name, value) for key, value in tensors.items() if key != "linear_in.weight"}
        a = {"linear_in.weight": tensors["linear_in.weight"]}
        return [{**a, **{key: value[at] for key, value in rows.items()}} for at in range(len(parts))]

    def split(self, name: str, rows: Tensor) -> list[Tensor]:
        """Rows of a fused linear as its parts; per group of linear_qkv: its queries, then its key, then its value."""
        if name.endswith("linear_qkv"):
            c = self.config
            grouped = rows.view(c.num_query_groups, -1, c.kv_channels, *rows.shape[1:])
            slices = (slice(0, -2), slice(-2, -1), slice(-1, None))
            return [grouped[:, at].reshape(-1, *rows.shape[1:]) for at in slices]
        return list(rows.chunk(2)) if name.endswith("linear_fc1") else [rows]

    def logits(self) -> tuple[Tensor, Tensor]:
        """[rows, length, vocab] each; ours of one packed row of two documents."""
        rows, length = self.ids.shape
        mine = self.decoder(self.ids.flatten(), [0, length, 2 * length]).view(rows, length, -1)
        return mine, self.model(self.ids).logits

    def losses(self) -> tuple[Tensor, Tensor]:
        """Mean next-token loss of both rows."""
        rows, length = self.ids.shape
        hidden = self.decoder.hidden_states(self.ids.flatten(), [0, length, 2 * length])
        trained = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
        targets = self.ids[:, 1:].flatten()
        mine = cross_entropy_sum(hidden[trained], self.decoder.output_weight, targets) / len(targets)
        return mine, self.model(self.ids, labels=self.ids).loss

    def trained(self, *, decayed: bool = True) -> list[Tensor]:
        """peft's trained tensors: matrices, or (decayed: False) vectors."""
        return [value for value in self.model.parameters() if value.requires_grad and decayed == (value.ndim > 1)]

    def train(self, iterations: int = 3) -> None:
        """Optimizer steps on both sides: our AdamW against torch's."""
        optimizer = AdamW(self.adapters, ADAMW)
        reference = reference_adamw(self.trained(), self.trained(decayed=False))
        for _ in range(iterations):
            for loss in self.losses():
                loss.backward()
            optimizer.step(ADAMW.lr)
            reference.step()
            self.decoder.zero_grad()
            self.model.zero_grad()

    def values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each trained tensor of each part with peft's."""
        for name, module in self.adapters.modules.items():
            mine = self.unfused(name, dict(module.named_parameters()))
            for tensors, layer in zip(mine, self.layers(name), strict=True):
                yield from ((value, layer.get_parameter(TENSORS[key])) for key, value in tensors.items())

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each gradient, after a backward pass, with peft's; of an A that parts share with the sum of theirs."""
        for name, module in self.adapters.modules.items():
            mine = {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
            parts, layers = self.unfused(name, mine), self.layers(name)
            for key in parts[0]:
                theirs = [layer.get_parameter(TENSORS[key]).grad for layer in layers]
                if len(parts) > 1 and key in mine and key == "linear_in.weight":
                    yield mine[key], sum(theirs)
                else:
                    yield from zip((part[key] for part in parts), theirs, strict=True)

    def merged(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Merged weights of each part in float32, with peft's, as stored."""
        layers = {name: self.layers(name) for name in self.adapters.modules}
        self.model.merge_adapter()
        for name, module in self.adapters.modules.items():
            saved = {key: value.detach() for key, value in module.saved().items()}
            weight = self.method.merge(name, self.decoder.linears()[name].weight.float(), saved, {})
            for part, layer in zip(self.split(name, weight), layers[name], strict=True):
                yield part, layer.get_base_layer().weight.detach()


def _parts(linear: str) -> tuple[str, ...]:
    return PARTS.get(linear, (linear,))
