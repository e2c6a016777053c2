"""peft.type: vblora."""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field

from steps.config.peft import Kept
from steps.config.peft._low_rank import Ranked
from steps.errors import Problem


class VBLoRA(Ranked):
    """Low-rank adaptation whose factors are mixed from one bank of vectors, arXiv 2405.15179."""

    type: Literal["vblora"] = Field("vblora", description="Adapter method")
    dim: int = Field(4, ge=1, description="Rank of the update")
    num_vectors: int = Field(256, ge=2, description="Vectors in the bank, which all linears share")
    vector_length: int = Field(256, ge=1, description="Length of each; divides the in and out features of every target")
    # One vector alone has the weight 1 whatever its logit is: there would be nothing to train.
    topk: int = Field(2, ge=2, description="Vectors that each sub-vector of a factor is mixed from")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of values dropped on the adapter's path while training")
    init_vector_bank_bound: float = Field(0.02, gt=0, description="The bank starts uniform between minus this and this")
    init_logits_std: float = Field(0.1, gt=0, description="The logits start normal with this deviation")
    logits_lr_ratio: float = Field(
        10.0, gt=0, description="Learning rate of the logits over that of the bank (the paper: 1e-2 over 1e-3)"
    )

    def sub_vectors(self, out_features: int, in_features: int) -> int:
        """Sub-vectors that the two factors of one linear consist of."""
        return self.dim * (out_features // self.vector_length + in_features // self.vector_length)

    def trainable(self, out_features: int, in_features: int) -> int:
        return self.sub_vectors(out_features, in_features) * self.num_vectors

    def shared_trainable(self) -> int:
        return self.num_vectors * self.vector_length

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        width = 2 if dtype == "bfloat16" else 4
        # Both factors, mixed anew; of each sub-vector which vectors it is mixed from (int64) and how (float32), and
        # three int64 that the embedding bag keeps of each bag.
        fixed = self.dim * (out_features + in_features) * width
        fixed += self.sub_vectors(out_features, in_features) * (self.topk * (8 + 4) + 3 * 8)
        if not self.dropout:
            return Kept(self.dim, fixed_bytes=fixed)
        return Kept(self.dim + in_features * (1 + has_gradient), input=False, fixed_bytes=fixed)

    def stored(self, out_features: int, in_features: int) -> int:
        """Numbers that the adapter file holds of one linear: topk indices and topk - 1 logits for each sub-vector."""
        return self.sub_vectors(out_features, in_features) * (2 * self.topk - 1)

    def check(self, train_iters: int) -> Iterator[Problem]:
        yield from super().check(train_iters)
        if self.topk > self.num_vectors:
            what = f"{self.topk} is above num_vectors ({self.num_vectors})"
            yield Problem(where="peft.topk", what=what, allowed=f"2 to {self.num_vectors}")

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
        yield from super().misfits(shapes)
        odd = {
            name: shape for name, shape in shapes.items() if math.gcd(self.vector_length, *shape) < self.vector_length
        }
        if odd:
            name, (out_features, in_features) = next(iter(odd.items()))
            common = math.gcd(*(features for shape in shapes.values() for features in shape))
            fitting = [length for length in range(1, common + 1) if common % length == 0]
            yield Problem(
                where="peft.vector_length",
                what=f"{self.vector_length} does not divide both the out and in features of {name}, "
                f"{out_features} and {in_features}",
                allowed=", ".join(map(str, fitting[-6:])),
            )


SECTION = VBLoRA
