"""peft.type: waveft."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from steps.config.peft import Kept, Peft
from steps.errors import Problem


class WaveFT(Peft):
    """Wavelet fine-tuning, arXiv 2505.12532: a few coefficients of each weight's wavelet transform are trained."""

    has_factors: ClassVar[bool] = False

    type: Literal["waveft"] = Field("waveft", description="Adapter method")
    n_frequency: int = Field(2592, ge=1, description="Trained coefficients of each linear")
    scaling: float = Field(25, gt=0, description="The update is scaled by this")
    random_loc_seed: int = Field(777, ge=0, lt=2**63, description="Seed of the coefficients' positions, as peft has it")
    wavelet_family: Literal["db1"] = Field("db1", description="The wavelet: db1 (Haar) is the one there is")

    def trainable(self, out_features: int, in_features: int) -> int:
        return self.n_frequency

    def kept(self, layer: int, out_features: int, in_features: int, dtype: str, *, has_gradient: bool) -> Kept:
        # The input's transform instead of the input, an even number of features; the coefficients, scaled.
        width = 2 if dtype == "bfloat16" else 4
        return Kept(in_features + in_features % 2, input=False, fixed_bytes=self.n_frequency * width)

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Problem]:
        yield from super().misfits(shapes)
        small = {name: out * columns for name, (out, columns) in shapes.items() if self.n_frequency > out * columns}
        if small:
            name = min(small, key=lambda entry: small[entry])
            more = f" (and {len(small) - 1} more kinds of linear)" if len(small) > 1 else ""
            yield Problem(
                where="peft.n_frequency",
                what=f"{self.n_frequency} coefficients are more than {name} has values: it is "
                f"{list(shapes[name])}{more}",
                allowed=f"1 to {small[name]}",
            )


SECTION = WaveFT
