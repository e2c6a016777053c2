"""VB-LoRA: the factors of all linears mixed from one bank of vectors (arXiv 2405.15179).

W x + B A x, where A [r, in] and B [out, r] are cut into sub-vectors of the bank's vector length. Each sub-vector has a
logit for every vector of the bank; it is the sum of the topk vectors of the largest logits, weighted with the softmax
over these (section 3.2). The shared bank is `adapter.vector_bank` [num_vectors, vector_length].

The linear starts away from the base, if only a little: neither the bank nor the weights may be zero, or nothing would
have a gradient.

What is trained are the full logits; what the adapter file holds are the indices of the topk and their logits less the
largest, topk - 1 of them, which give the same weights to the bit. The full logits, with which alone the choice can
still change, lie with the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.config.peft.vblora import VBLoRA
from steps.engine.adapters.base import Adapter, Factors, Group, Method, Target, register
from steps.engine.adapters.lora import low_rank
from steps.engine.model.layers import Linear


class Bank(nn.Module):
    """vector_bank [num_vectors, vector_length]."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vector_bank = nn.Parameter(vectors)


class Choice(nn.Module):
    """logits [n, m, num_vectors]: how the n x m sub-vectors of one factor choose from the bank."""

    def __init__(self, logits: Tensor, topk: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.topk = topk

    def forward(self, bank: Tensor) -> Tensor:
        """The sub-vectors, [n, m, vector_length]."""
        logits, indices = self.logits.topk(self.topk)
        return mixed(bank, indices, logits)

    def saved(self) -> dict[str, Tensor]:
        """indices [n, m, topk], the largest logit's first; logits [n, m, topk - 1] of the others less the largest."""
        logits, indices = self.logits.detach().topk(self.topk)
        return {
            "indices": indices.to(index_dtype(self.logits.shape[-1])),
            "logits": logits[..., 1:] - logits[..., :1],
        }

    def load_saved(self, indices: Tensor, logits: Tensor) -> None:
        """From what `saved` returned; a vector that was not chosen never will be."""
        indices, logits = indices.to(self.logits.device), logits.to(self.logits)
        with torch.no_grad():
            self.logits.fill_(-torch.inf).scatter_(-1, indices.long(), _whole(logits))


class VBLoRAAdapter(Adapter):
    """linear_in.logits [r, in / vector_length, num_vectors] and linear_out.logits [out / vector_length, r, num_vectors]
    over a bank that belongs to all linears."""

    def __init__(self, bank: Bank, linear_in: Choice, linear_out: Choice, dropout: float) -> None:
        super().__init__()
        # In a tuple, so that the bank is no submodule: its parameter would be saved with every linear.
        self._shared = (bank,)
        self.linear_in, self.linear_out = linear_in, linear_out
        self.dropout = dropout

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        (bank,) = self._shared
        a, b = joined(self.linear_in(bank.vector_bank), self.linear_out(bank.vector_bank))
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        return low_rank(linear.project(x), dropped, a.to(x.dtype), b.to(x.dtype), 1.0)

    def saved(self) -> dict[str, Tensor]:
        return {f"{side}.{key}": tensor for side in _SIDES for key, tensor in self._choice(side).saved().items()}

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        for side in _SIDES:
            self._choice(side).load_saved(tensors[f"{side}.indices"], tensors[f"{side}.logits"])

    def memory(self) -> dict[str, Tensor]:
        return {f"{side}.logits": self._choice(side).logits for side in _SIDES}

    def _choice(self, side: str) -> Choice:
        module = self.get_submodule(side)
        assert isinstance(module, Choice)
        return module


_SIDES = ("linear_in", "linear_out")


@register("vblora")
class VBLoRAMethod(Method[VBLoRA]):
    """The method as such; see the module."""

    _bank: Bank

    def shared(self, targets: Sequence[Target], generator: torch.Generator) -> Bank:
        section = self.section
        uniform = torch.rand(section.num_vectors, section.vector_length, generator=generator)
        self._bank = Bank((2 * uniform - 1) * section.init_vector_bank_bound)
        return self._bank

    def build(self, target: Target) -> VBLoRAAdapter:
        section, linear, generator = self.section, target.linear, target.generator()
        inner, outer = (size // section.vector_length for size in (linear.in_features, linear.out_features))

        def choice(rows: int, columns: int) -> Choice:
            logits = torch.randn(rows, columns, section.num_vectors, generator=generator)
            return Choice(section.init_logits_std * logits, section.topk)

        return VBLoRAAdapter(self._bank, choice(section.dim, inner), choice(outer, section.dim), section.dropout)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        """Logits learn faster and do not decay: that would change which vectors are chosen without any gradient."""
        if name.endswith(".logits"):
            return Group(self.section.logits_lr_ratio, wd_mult=0.0)
        return super().group(name, parameter)

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        bank = shared["vector_bank"].float()
        sides = (
            mixed(bank, tensors[f"{side}.indices"].long(), _whole(tensors[f"{side}.logits"].float())) for side in _SIDES
        )
        return {"": Factors(*joined(*sides), 1.0)}


def mixed(bank: Tensor, indices: Tensor, logits: Tensor) -> Tensor:
    """The vectors at indices [n, m, k] of the bank, weighted with the softmax of logits [n, m, k]: [n, m, length]."""
    weights = logits.softmax(-1).flatten(0, 1)
    vectors = F.embedding_bag(indices.flatten(0, 1), bank, per_sample_weights=weights, mode="sum")
    return vectors.view(*indices.shape[:2], -1)


def joined(linear_in: Tensor, linear_out: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of their sub-vectors [r, in / length, length] and [out / length, r, length]."""
    return linear_in.flatten(1), linear_out.transpose(1, 2).flatten(0, 1)


def index_dtype(num_vectors: int) -> torch.dtype:
    """The smallest dtype for indices into the bank that every format we write has."""
    return torch.uint8 if num_vectors <= 2**8 else torch.int16 if num_vectors <= 2**15 else torch.int32


def _whole(logits: Tensor) -> Tensor:
    """Saved logits [..., k - 1] with the largest, 0, before them. A softmax takes the largest away anyway."""
    return F.pad(logits, (1, 0))
