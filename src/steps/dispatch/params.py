"""`steps params`: how many parameters an adapter on a model trains, and what memory that takes."""

import json as json_text
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import typer
from pydantic import Field

from steps.config import dotlist
from steps.config.base import Section, of_its_kind, section
from steps.config.peft import Peft
from steps.config.training import Precision
from steps.config.validate import check_section, source_of
from steps.dispatch import complete, render
from steps.dispatch.accounts import text
from steps.errors import ConfigError, Problem, StepsError
from steps.shapes.account import Account, misfits
from steps.shapes.estimate import Batch
from steps.shapes.find import Found, find

#: Stands for the length of the run: here it may be as long as a method wants.
_ITERS = 2**31
#: Settings that are always told, given or not.
_TOLD = ("type", "dim", "target_modules")


class Train(Section):
    """Of `train` what decides on memory."""

    precision: Precision = Field("auto", description="Dtype the base computes in")
    micro_batch_size: int = Field(1, ge=1, description="Packed rows in one forward pass of one process")
    recompute_granularity: Literal["full"] | None = Field(
        None, description="full: keep only each layer's input for the backward pass"
    )


class Recipe(Section):
    """Of `recipe` what decides on memory."""

    seq_length: int | None = Field(None, ge=2, description="Tokens in a packed row; left out: no activations")


class Asked(Section):
    """What can be asked: sections of peft/megatron_bridge, under their names there."""

    peft: of_its_kind(Peft) = section("The adapter method")  # type: ignore[valid-type]
    train: Train = section("Precision, rows at a time")
    recipe: Recipe = section("Length of the rows")


def params(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="7B, 13B, 70B or another shipped shape; a model directory or config.json; a Hub id.",
            autocompletion=complete.shapes,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings: peft.type=, peft.dim=, …, train.precision=, recipe.seq_length= (adds activations).",
            autocompletion=complete.asked,
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count an adapter's parameters on a model, and the memory that training it takes. Nothing is loaded.

    Exact but for what depends on the rows, which recipe.seq_length= adds: the expected peak of a process.
    """
    found, asked = read(model, overrides or ())
    train, length = asked.train, asked.recipe.seq_length
    batch = None if length is None else Batch(length, train.micro_batch_size)
    account = Account.of(asked.peft, found.model, train.precision, batch, asked=train.recompute_granularity)
    if json:
        told = {"model": {"name": model, "source": found.where, **found.model.to_dict()}}
        print(json_text.dumps({**told, "peft": asked.peft.model_dump(), **account.to_dict()}, indent=2, default=str))
        return
    print("\n".join([render.bold(model), *_heading(found, asked.peft), *text(account)]))


def read(model: str, overrides: Sequence[str]) -> tuple[Found, Asked]:
    """The model and the settings. Raises StepsError with everything that is wrong with either."""
    data: dict[str, Any] = {}
    sources: dict[str, str] = {}
    dotlist.apply(data, sources, dotlist.parse(overrides))
    asked, problems = check_section(Asked, data, sources, "")
    if asked is not None:
        problems += [_with_source(problem, sources) for problem in asked.peft.check(_ITERS)]
    try:
        found = find(model)
    except StepsError as error:
        raise type(error)([*error.problems, *problems]) from error
    if asked is not None and not problems:
        problems = [_with_source(problem, sources) for problem in misfits(asked.peft, found.model)]
    if problems:
        raise ConfigError(problems)
    assert asked is not None
    return found, asked


def _with_source(problem: Problem, sources: dict[str, str]) -> Problem:
    return Problem(**{**vars(problem), "source": problem.source or source_of(problem.where, sources)})


def _heading(found: Found, peft: Peft) -> Iterator[str]:
    """What was counted: the shape and the settings, on a few lines."""
    model = found.model
    heads = f"{model.num_attention_heads} heads in {model.num_query_groups} groups of {model.kv_channels} channels"
    yield f"{model.family}, {model.params_dtype}, from {found.where}"
    yield f"{model.num_layers} layers, hidden {model.hidden_size}, {heads}, ffn {model.ffn_hidden_size}"
    told = {*_TOLD, *peft.model_fields_set} - (set() if peft.targets_asked else {"target_modules"})
    values = {name: getattr(peft, name) for name in type(peft).model_fields if name in told}
    line = "peft: " + ", ".join(f"{name} {_told(value)}" for name, value in values.items())
    yield from textwrap.wrap(line, render.width(), subsequent_indent="    ", break_long_words=False)


def _told(value: Any) -> str:
    if isinstance(value, Section):
        return "{" + ", ".join(f"{name} {_told(getattr(value, name))}" for name in type(value).model_fields) + "}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else render.show_value(value)
