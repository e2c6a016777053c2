"""peft.type: qr_adaptor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from steps.config.peft import Kept, Layer, Peft, Quantization
from steps.config.peft._low_rank import cast_bytes
from steps.errors import Problem
from steps.shapes.targets import layer

#: How a base weight is held in so many bits: the `type` of a quantization.
TYPES: Mapping[int, Literal["nf2", "nf4", "int8"]] = {2: "nf2", 4: "nf4", 8: "int8"}
_BYTES = {None: 4, "float32": 4, "bfloat16": 2}


class FewBits(Quantization):
    """How the weights of one layer are held."""

    type: Literal["nf2", "nf4", "int8"] = Field(description="nf2, nf4: NormalFloat; int8: symmetric")  # type: ignore[assignment]


class QRAdaptor(Peft):
    """Bits of the base and rank of the adapters chosen together for each decoder layer, arXiv 2505.03802.

    What is not given (layer_bits, layer_ranks) is searched for when a run starts, and recorded with it.
    """

    type: Literal["qr_adaptor"] = Field("qr_adaptor", description="Adapter method")
    alpha: float = Field(32, gt=0, description="Updates of every rank are scaled by alpha / the largest of ranks")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of values dropped before linear_in while training")
    lora_A_init_method: Literal["xavier", "uniform", "kaiming"] = Field(  # noqa: N815
        "xavier", description="Start of linear_in: xavier normal, xavier uniform, or kaiming uniform as peft has it"
    )
    lora_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Dtype of the adapter's parameters (default float32; bfloat16 rounds away small updates)"
    )
    bits: list[Literal[2, 4, 8]] = Field(default=[2, 4, 8], description="Bits that a layer's weights may be held in")
    ranks: list[Annotated[int, Field(ge=1)]] = Field(
        default=[4, 8, 16], description="Ranks that a layer's adapters may have"
    )
    budget_bits: float = Field(
        4.0, gt=0, description="Memory budget: what a base with so many bits in every layer and the middle rank takes"
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="Values that share one scale")
    double_quant: bool = Field(True, description="Quantize the scales too (blocks of 256 of them, 8 bits)")
    layer_bits: list[Literal[2, 4, 8]] | None = Field(
        None, description="Bits of each layer, the first layer first; null: searched for"
    )
    layer_ranks: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Rank of each layer; null: searched for"
    )
    calibration_rows: int = Field(
        8, ge=2, description="Packed rows that the search looks at; it tunes on half of them and measures on the others"
    )
    proxy_steps: int = Field(4, ge=1, description="Optimizer steps of one row that a configuration is tuned for")
    proxy_lr: float = Field(1e-3, gt=0, description="Learning rate of these steps")
    population: int = Field(12, ge=2, description="Configurations in one generation of the genetic search")
    generations: int = Field(5, ge=0, description="Generations after the first")
    refinements: int = Field(8, ge=0, description="Configurations that the Bayesian refinement tries at most")
    loss_weight: float = Field(
        1.0, gt=0, le=1,
        description="What loss counts against memory in the refinement and the choice; 1: least loss within the budget",
    )  # fmt: skip
    search_seed: int | None = Field(None, ge=0, description="Seed of the search (default: rng.seed)")

    @property
    def open(self) -> bool:
        return self.layer_bits is None or self.layer_ranks is None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with: the same in every layer, whatever its rank, so that the
        factors of all layers can be padded to one rank and stay what they are."""
        return self.alpha / max(self.ranks)

    def rank(self, number: int) -> int:
        """Rank of the adapters of the layer of this number; before the search the largest."""
        return max(self.ranks) if self.layer_ranks is None else self.layer_ranks[number]

    @property
    def padded_rank(self) -> int:
        """Rank that the factors of all layers have in a checkpoint."""
        return max(self.ranks if self.layer_ranks is None else self.layer_ranks)

    def trainable(self, out_features: int, in_features: int) -> int:
        return max(self.ranks) * (out_features + in_features)

    def trainable_at(self, layer: int, out_features: int, in_features: int) -> int:
        return self.rank(layer) * (out_features + in_features)

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        rank = self.rank(layer)
        factors = cast_bytes(rank * (out_features + in_features), self.adapter_dtype, dtype)
        if not self.dropout:
            return Kept(rank, fixed_bytes=factors)
        return Kept(rank + in_features * (1 + has_gradient), input=False, fixed_bytes=factors)

    def held(self, linear: str) -> FewBits:
        return self.held_in(max(self.bits) if self.layer_bits is None else self.layer_bits[layer(linear)])

    def held_in(self, bits: int) -> FewBits:
        """How a weight is held in so many bits."""
        return FewBits(type=TYPES[bits], block_size=self.block_size, double_quant=self.double_quant)

    def layer_bytes(self, layer: Layer, bits: float, rank: int) -> int:
        """What a layer's linears and their adapters take in memory, scales included: the paper's memory of a layer.

        Norms, embeddings, gradients and optimizer states are not in it.
        """
        base = sum(self._weight_bytes(out * width, bits) for out, width in layer.linears)
        return base + _BYTES[self.lora_dtype] * rank * sum(out + width for out, width in layer.adapted)

    def _weight_bytes(self, values: int, bits: float) -> int:
        blocks = math.ceil(values / self.block_size)
        scales = blocks + 4 * math.ceil(blocks / 256) + 4 if self.double_quant else 4 * blocks
        return math.ceil(values * bits / 8) + scales

    def budget(self, layers: Sequence[Layer]) -> int:
        """`budget_bits` in bytes."""
        ranks = sorted(set(self.ranks))
        return sum(self.layer_bytes(layer, self.budget_bits, ranks[len(ranks) // 2]) for layer in layers)

    def choices(self, layers: Sequence[Layer]) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
        """Bits and ranks that each layer may have, ascending: one where it is given, or where no linear is adapted."""
        bits, ranks = sorted(set(self.bits)), sorted(set(self.ranks))
        return (
            [bits] * len(layers) if self.layer_bits is None else [[given] for given in self.layer_bits],
            [ranks if layer.adapted else ranks[:1] for layer in layers]
            if self.layer_ranks is None
            else [[given] for given in self.layer_ranks],
        )

    def check(self, train_iters: int) -> Iterator[Problem]:
        yield from super().check(train_iters)
        if self.quantization is not None:
            yield Problem(
                where="peft.quantization",
                what="has no place beside peft.type=qr_adaptor, which quantizes each layer by itself",
                hint="Leave it out; peft.bits, peft.block_size and peft.double_quant say how, peft.layer_bits in what.",
            )
        for name, of in (("bits", self.layer_bits), ("ranks", self.layer_ranks)):
            choices = getattr(self, name)
            if not choices:
                yield Problem(where=f"peft.{name}", what="is empty: there is nothing to choose from")
            elif odd := sorted(set(of or ()) - set(choices)):
                allowed = ", ".join(map(str, sorted(set(choices))))
                yield Problem(
                    where=f"peft.layer_{name}", what=f"{odd[0]} is none of peft.{name}", allowed=allowed,
                    hint=f"Add it to peft.{name}, or choose another.",
                )  # fmt: skip

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
        yield from super().misfits(shapes)
        rank = max(self.ranks, default=0)
        if small := {name: shape for name, shape in shapes.items() if rank > min(shape)}:
            name, shape = min(small.items(), key=lambda entry: min(entry[1]))
            yield Problem(
                where="peft.ranks",
                what=f"rank {rank} is above that of {name}, which is {list(shape)}",
                allowed=f"1 to {min(shape)}",
            )

    def layer_misfits(self, layers: Sequence[Layer]) -> Iterator[Problem]:
        yield from super().layer_misfits(layers)
        wrong = False
        for key, given in (("layer_bits", self.layer_bits), ("layer_ranks", self.layer_ranks)):
            if given is not None and len(given) != len(layers):
                wrong = True
                yield Problem(
                    where=f"peft.{key}", what=f"has {len(given)} entries, but the model has {len(layers)} layers",
                    allowed=f"{len(layers)} of them, or null to search for them",
                )  # fmt: skip
        if wrong or not self.open or not self.bits or not self.ranks:
            return
        bits, ranks = self.choices(layers)
        least = sum(self.layer_bytes(*one) for one in zip(layers, map(min, bits), map(min, ranks), strict=True))
        if least > (budget := self.budget(layers)):
            weights = sum(out * width for layer in layers for out, width in layer.linears)
            needed = math.ceil(100 * (self.budget_bits + 8 * (least - budget) / weights)) / 100
            yield Problem(
                where="peft.budget_bits",
                what=f"{self.budget_bits:g} bits are {budget / 1e6:,.3f} MB here, but the least of peft.bits and "
                f"peft.ranks in every layer takes {least / 1e6:,.3f} MB",
                allowed=f"{needed:.2f} and more", hint="Raise the budget, or allow fewer bits or lower ranks.",
            )  # fmt: skip


SECTION = QRAdaptor
