"""What an adapter on a model comes to, by arithmetic on the shapes. Free of torch.

Parameters, and the bytes that are held all the time, are exact; the peak is an estimate (estimate.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from steps.config.peft import Layer, Peft
from steps.errors import Problem, Setting
from steps.shapes import memory, targets
from steps.shapes.estimate import Batch, Choice, Estimate
from steps.shapes.memory import Held
from steps.shapes.model_config import ModelConfig


def misfits(section: Peft, model: ModelConfig) -> Iterator[Problem]:
    """What keeps an adapter from being put on a model: targets that mean nothing, a rank above the matrix, …"""
    names = targets.chosen(section, model.num_layers)
    kinds = {name.rpartition(".")[2]: targets.shape(model, name) for name in names}
    found = [*targets.faults(section, model.num_layers), *section.misfits(kinds)]
    if not found:
        found += section.layer_misfits(layers(section, model))
    for fault in found:
        yield Setting(**vars(fault))


def trainable(section: Peft, model: ModelConfig) -> int:
    """Parameters that are trained."""
    names = targets.chosen(section, model.num_layers)
    return section.shared_trainable() + sum(
        section.trainable_at(targets.layer(name), *targets.shape(model, name)) for name in names
    )


@dataclass(frozen=True)
class Kind:
    """All modules of one kind, over all layers.

    shape:      of the weight of one; () where it has several.
    count:      modules of the kind, and adapted: those that get an adapter.
    parameters: of the base, in all of them.   trainable: of their adapters, or of themselves.
    added:      whether what is trained comes on top of the base's parameters.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    adapted: int
    parameters: int
    trainable: int
    added: bool = True

    @property
    def is_linear(self) -> bool:
        """Whether an adapter could be put on it."""
        return self.name.startswith("linear_")

    @property
    def share(self) -> float:
        """What is trained, of all parameters with the adapter's own: as peft's print_trainable_parameters has it."""
        return self.trainable / (self.parameters + self.trainable * self.added)


@dataclass(frozen=True)
class Account:
    """Parameters by kind of module, in the order of computation, and what is held in memory by each process.

    memory:    what is there at the peak, if the rows are known, or else what is held all the time; empty where another
               engine than ours decides it.
    notes:     under which assumptions.   warnings: what may go wrong.
    recompute: whether layers are computed again for the backward pass; None where nothing is known of the rows.
    """

    kinds: tuple[Kind, ...]
    memory: tuple[Held, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    recompute: bool | None = None
    tokens_per_step: int | None = None

    @classmethod
    def of(
        cls,
        section: Peft | None,
        model: ModelConfig,
        precision: str | None = None,
        batch: Batch | None = None,
        *,
        asked: str | None = None,
        available: int | None = None,
        rows_per_step: int | None = None,
    ) -> Account:
        """The account of an adapter that fits the model (see `misfits`); section None: of training the model itself.

        precision:     `train.precision` of our engine; None leaves memory out.
        batch:         None leaves out what depends on the rows.   rows_per_step: `train.global_batch_size`.
        asked:         `train.recompute_granularity`.   available: bytes for one process, None where nobody knows.
        """
        rows = tuple(kinds(section, model))
        tokens = None if batch is None or rows_per_step is None else batch.row_tokens * rows_per_step
        if precision is None:
            return cls(rows, tokens_per_step=tokens)
        notes = [*memory.notes(section, model, precision)]
        if batch is None:
            return cls(rows, tuple(memory.held(section, model, precision)), ("activations come on top", *notes))
        estimate = Estimate.of(section, model, precision, batch)
        choice = Choice.of(estimate, asked, available, section, batch)
        if choice.reason:
            notes.append(f"train.recompute_granularity={choice.reason}")
        return cls(
            rows, tuple(estimate.rows(recompute=choice.recompute)), tuple(notes),
            (choice.warning,) if choice.warning else (), choice.recompute, tokens,
        )  # fmt: skip

    @property
    def total(self) -> Kind:
        """Everything together; adapted and counted are the linears."""
        linears = [kind for kind in self.kinds if kind.is_linear]
        return Kind(
            "total",
            (),
            sum(kind.count for kind in linears),
            sum(kind.adapted for kind in linears),
            sum(kind.parameters for kind in self.kinds),
            sum(kind.trainable for kind in self.kinds),
            added=any(kind.added for kind in self.kinds),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(held.nbytes for held in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "parameters": [{**asdict(kind), "share": kind.share} for kind in (*self.kinds, self.total)],
            "memory": [asdict(held) for held in self.memory],
            "memory_bytes": self.nbytes,
            "recompute": self.recompute,
            "tokens_per_step": self.tokens_per_step,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def kinds(section: Peft | None, model: ModelConfig) -> Iterator[Kind]:
    """The account by kind of module. Fused linears are told by their parts where the method adapts those."""
    layers, hidden, table = model.num_layers, model.hidden_size, model.vocab_size * model.hidden_size

    def plain(name: str, shape: tuple[int, ...], count: int, parameters: int) -> Kind:
        """A kind that no adapter is put on."""
        if section is None:
            return Kind(name, shape, count, count, parameters, parameters, added=False)
        return Kind(name, shape, count, 0, parameters, 0)

    chosen = [] if section is None else targets.chosen(section, layers)
    yield plain("embedding", (model.vocab_size, hidden), 1, table)
    canonical = section is not None and section.canonical
    for last in (name.rpartition(".")[2] for name in targets.linear_names(1, canonical=canonical)):
        shape = targets.shape(model, last)
        parameters = layers * shape[0] * shape[1]
        if section is None:
            yield plain(last, shape, layers, parameters)
            continue
        adapted = [targets.layer(name) for name in chosen if name.rpartition(".")[2] == last]
        trained = sum(section.trainable_at(layer, *shape) for layer in adapted)
        yield Kind(last, shape, layers, len(adapted), parameters, trained)
    if model.add_qkv_bias:
        yield plain("biases", (model.qkv_size,), layers, layers * model.qkv_size)
    yield plain("norms", (), 2 * layers * (1 + model.qk_layernorm) + 1, model.norm_parameters)
    if not model.share_embeddings_and_output_weights:
        yield plain("output_layer", (model.vocab_size, hidden), 1, table)
    if section is not None and (shared := section.shared_trainable()):
        yield Kind("shared", (), 1, 1, 0, shared)


def layers(section: Peft, model: ModelConfig) -> list[Layer]:
    """The linears of each layer, and what of them the section adapts."""
    linears = [targets.shape(model, name) for name in targets.linear_names(1)]
    adapted: list[list[tuple[int, int]]] = [[] for _ in range(model.num_layers)]
    for name in targets.chosen(section, model.num_layers):
        adapted[targets.layer(name)].append(targets.shape(model, name))
    return [Layer(linears, shapes) for shapes in adapted]
