"""The most memory that one process of a training run with our engine will have, before it starts. Free of torch.

What it holds all the time (memory.py), what a forward pass keeps for its backward pass (activations.py), what passes,
and the process itself. benchmarks/estimate.py holds it against the kernel's account of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from steps.config.peft import Peft
from steps.shapes import memory, targets
from steps.shapes.activations import Activations, activations
from steps.shapes.memory import BYTES, Held
from steps.shapes.model_config import ModelConfig

#: A process of the step before it has any tensor of the model: interpreter, libraries, our modules, and what torch sets
#: up at its first products. VmRSS after a 512 x 512 product, its backward pass and an update, torch 2.13 for CPUs,
#: x86-64: 359 MiB, of which 211 are torch's import and 87 our modules with what they import.
PROCESS_BYTES = 376_000_000
#: Holes in the heap, a fit (see Estimate._holes): bytes at once; of each layer for a byte of the compute dtype; and of
#: that with recomputation; where a layer frees so much.
_HOLES, _LAYER_HOLES, _RECOMPUTED = 230_000_000, 15_000_000, 0.45
#: What PyTorch's allocator has reserved on a GPU beyond what lives there, of what comes and goes: a fit to two runs on
#: an H200 (LoRA in bf16; 1.2B parameters, 4,096 tokens: 9.06 GB; 135M, 8,120 tokens: 5.85 GB), met within 3 %.
_SPARE = 0.24


@dataclass(frozen=True)
class Batch:
    """What a process computes at a time. Rows are taken as full, as one document, and as trained everywhere: the most.

    row_tokens: tokens of a packed row.   rows: of a micro-batch.
    """

    row_tokens: int
    rows: int = 1

    @property
    def tokens(self) -> int:
        return self.row_tokens * self.rows


@dataclass(frozen=True)
class Estimate:
    """held: all the time.   activations: of a micro-batch.   passing: while a quantized weight is used."""

    held: tuple[Held, ...]
    activations: Activations
    passing: int
    dtype: str
    on_gpu: bool = False

    @classmethod
    def of(
        cls, section: Peft | None, model: ModelConfig, precision: str, batch: Batch, *, on_gpu: bool = False
    ) -> Estimate:
        """precision: `train.precision`.

        on_gpu: leave out the process itself, which is not in the GPU's memory, and the heap.
        """
        dtype = memory.computed(model, precision)
        held = [*memory.held(section, model, precision)]
        if not on_gpu:
            held.append(Held("the process itself", "", PROCESS_BYTES))
        kept = activations(section, model, dtype, batch.tokens, batch.tokens, batch.row_tokens)
        return cls(tuple(held), kept, _dequantized(section, model, dtype), dtype, on_gpu)

    def rows(self, *, recompute: bool) -> Iterator[Held]:
        """Everything that is in memory at the peak."""
        yield from self.held
        yield Held("activations", self.dtype, self.activations.kept(recompute=recompute))
        passing = self.activations.passing(recompute=recompute) + self.passing
        yield Held("logits, or a layer backward", "", passing)
        if self.on_gpu:
            spare = _SPARE * (self.activations.kept(recompute=recompute) + passing)
            yield Held("spare blocks of the allocator", "", int(spare))
        else:
            yield Held("holes in the heap", "", self._holes(recompute=recompute))

    def _holes(self, *, recompute: bool) -> int:
        """What is freed between tensors that stay and does not serve the next ones: a fit to measurements, no law.

        posix_memalign, which torch allocates with, asks for a block larger by its alignment (glibc before 2.38), so
        that one of the very same size, freed, is too small, until the backward pass has freed what lies around it.
        Measured at 57M and 135M parameters, float32 and bfloat16, 2,048 and 4,096 tokens, with and without
        recomputation: 340 MB to 2.2 GB, 7 % more or less from run to run, more with every step of the first few. That
        twice the tokens lose no more is due to blocks above 32 MiB, which are mapped and given back.
        MALLOC_MMAP_THRESHOLD_=1048576 has all of them mapped: no holes, but bfloat16 steps take half again as long.
        """
        freed, layers = self.activations.freed, len(self.activations.layers)
        each = min(0.75 * freed, _LAYER_HOLES * BYTES[self.dtype]) * (_RECOMPUTED if recompute else 1)
        return int(min(4 * freed, _HOLES) + each * layers)

    def peak(self, *, recompute: bool) -> int:
        """Bytes."""
        return sum(row.nbytes for row in self.rows(recompute=recompute))


def _dequantized(section: Peft | None, model: ModelConfig, dtype: str) -> int:
    """The largest quantized weight while it is wide: float32 first, then in the dtype of the product."""
    if section is None:
        return 0
    sizes = (
        math.prod(targets.shape(model, name))
        for name in targets.linear_names(model.num_layers)
        if section.held(name) is not None
    )
    return max(sizes, default=0) * (BYTES["float32"] + BYTES[dtype])


@dataclass(frozen=True)
class Choice:
    """Whether layers are computed again for the backward pass, and what there is to say of it and of the memory.

    recompute: the decision.   reason: a line, '' where the configuration decided.   warning: '' where all fits.
    """

    recompute: bool
    reason: str
    warning: str

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        asked: str | None,
        available: int | None,
        section: Peft | None,
        batch: Batch,
        where: str = "",
    ) -> Choice:
        """asked: `train.recompute_granularity`; available: bytes for one process, None where nobody knows here.

        where: whose memory that is ("of this machine").
        """
        plain, less = (estimate.peak(recompute=recompute) for recompute in (False, True))
        recompute, reason = asked == "full", ""
        if asked == "auto" and available is None:
            reason = f"auto: decided where it runs; {size(plain)} without, {size(less)} with recomputation"
        elif asked == "auto" and available is not None:
            recompute = plain > available and less < plain
            than = "above" if plain > available else "within"
            reason = (
                f"auto: {'full' if recompute else 'none'}; the {size(plain)} expected without are {than} the "
                f"{size(available)} available{where}" + (f", with it {size(less)}" if recompute else "")
            )
        peak = less if recompute else plain
        if available is None or peak <= available:
            return cls(recompute, reason, "")
        helps = list(_helps(section, batch, None if recompute else less))
        advice = f". What helps: {', '.join(helps)}" if helps else ""
        warning = f"the expected peak of {size(peak)} is above the {size(available)} available{where}{advice}"
        return cls(recompute, reason, warning)


def _helps(section: Peft | None, batch: Batch, recomputed: int | None) -> Iterator[str]:
    """Settings that take less memory. recomputed: the peak with recomputation, None where that is on."""
    if batch.rows > 1:
        yield "train.micro_batch_size=1"
    if recomputed is not None:
        yield f"train.recompute_granularity=full (then {size(recomputed)})"
    if section is None:
        yield "an adapter (peft/megatron_bridge)"
    elif section.quantization is None and section.type != "qr_adaptor":
        yield "peft.quantization.type=nf4"
    yield "rows packed shorter (pack_size)"


_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def size(nbytes: int) -> str:
    """Decimal, as disks and documents count: 3.34 GB."""
    unit, name = next(((unit, name) for unit, name in _UNITS if nbytes >= unit), (1, "B"))
    return f"{nbytes / unit:.2f} {name}" if unit > 1 else f"{nbytes} B"
