"""The tables of docs/peft-methods.md that are counted: made by the code behind `steps params`, as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from steps.config.peft import names, section_class
from steps.dispatch.params import read
from steps.errors import ConfigError
from steps.shapes import targets
from steps.shapes.account import Account
from steps.shapes.estimate import size
from steps.shapes.model_config import ModelConfig
from steps.shapes.presets import preset, presets

#: What `steps params` takes, and how it is written.
MODELS = {
    "7B": "Llama-2-7B",
    "13B": "Llama-2-13B",
    "70B": "Llama-2-70B",
    "llama-3-8b": "Llama-3-8B",
    "mistral-7b": "Mistral-7B",
}
#: Model, settings, and what the documents say where it is not that.
COUNTS = (
    ("7B", "peft.type=canonical_lora peft.dim=16 peft.target_modules=[q_proj,v_proj]", "134M"),
    ("7B", "peft.type=canonical_lora peft.dim=8 peft.target_modules=[q_proj,v_proj]", ""),
    (
        "7B", "peft.type=canonical_lora peft.dim=16 peft.target_modules=[q_proj,k_proj,v_proj,o_proj]",
        "13,631,488 of 6,742,609,920",
    ),
    ("7B", "peft.type=canonical_lora peft.dim=16", ""),
    ("7B", "peft.dim=16", ""),
    ("7B", "peft.dim=32 peft.target_modules=[linear_qkv,linear_proj]", ""),
    (
        "7B", "peft.type=canonical_lora peft.dim=32 peft.target_modules=[q_proj,k_proj,v_proj,up_proj,down_proj]", "",
    ),
    ("7B", "peft.type=dora peft.dim=32 peft.target_modules=[linear_qkv,linear_fc1,linear_fc2]", ""),
    ("llama-3-8b", "peft.type=canonical_lora peft.dim=16 peft.target_modules=[q_proj,k_proj,v_proj,o_proj]", ""),
    ("mistral-7b", "peft.type=canonical_lora peft.dim=16 peft.target_modules=[q_proj,k_proj,v_proj,o_proj]", ""),
    ("llama-3-8b", "peft.type=canonical_lora peft.dim=16", ""),
    ("llama-3-8b", "peft.dim=16", ""),
)  # fmt: skip
BASE = ("weights of linears", "scales of linears", "embedding, output layer", "norms, biases")


def counts() -> Iterator[str]:
    """Parameters of adapters on known models."""
    yield from _header("model", "settings", "trained", "of all", "in the documents")
    for model, settings, wrong in COUNTS:
        total = _account(model, settings).total
        share = f"{100 * total.share:.4f} %"
        yield _line(MODELS[model], f"`{settings}`", f"{total.trainable:,}", share, wrong and f"wrong: {wrong}")


def shapes() -> Iterator[str]:
    """The shipped shapes."""
    yield from _header("shape", "parameters", "layers", "hidden", "heads", "groups", "ffn", "vocabulary")
    known: dict[ModelConfig, list[str]] = {}
    for name, model in presets().items():
        known.setdefault(model, []).append(name)
    for model, (first, *others) in known.items():
        told = f"`{first}`" + "".join(f", `{name.upper()}`" for name in others)
        sizes = (
            model.parameters, model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups,
            model.ffn_hidden_size, model.vocab_size,
        )  # fmt: skip
        yield _line(told, *(f"{number:,}" for number in sizes))


def methods() -> Iterator[str]:
    """Every method with its defaults on Llama-2-7B."""
    yield from _header("`peft.type`", "trained", "of all", "adapter, gradients, Adam", "total", "total on nf4")
    for name in names():
        plain = _account("7B", f"peft.type={name}")
        try:
            narrow = size(_account("7B", f"peft.type={name} peft.quantization.type=nf4").nbytes)
        except ConfigError:  # a method that quantizes by itself
            narrow = "-"
        total = plain.total
        own = size(plain.nbytes - _base(plain))
        share = f"{100 * total.share:.4f} %"
        yield _line(f"`{name}`", f"{total.trainable:,}", share, own, size(plain.nbytes), narrow)


def memory() -> Iterator[str]:
    """QLoRA's static memory: canonical LoRA of rank 16 on all linears."""
    yield from _header(
        "model", "base in bfloat16", "base in nf4", "of it embedding and output layer", "trained",
        "total, as here (16 bytes)", "total with 12 bytes",
    )  # fmt: skip
    settings = "peft.type=canonical_lora peft.dim=16"
    for model in ("7B", "13B", "70B"):
        wide = _account(model, settings)
        narrow = _account(model, f"{settings} peft.quantization.type=nf4")
        tables = next(row.nbytes for row in narrow.memory if row.what == "embedding, output layer")
        trained = narrow.total.trainable
        cells = (_base(wide), _base(narrow), tables)
        totals = (narrow.nbytes, _base(narrow) + 12 * trained)
        yield _line(MODELS[model], *map(size, cells), f"{trained:,}", *map(size, totals))


def unfused_dora() -> str:
    """DoRA of rank 32 on q, k, v, up and down as Hugging Face's modules have them."""
    model = preset("7B")
    assert model is not None
    section = section_class("dora")(dim=32)
    parts = ("linear_q", "linear_k", "linear_v", "linear_fc1_up", "linear_fc2")
    count = model.num_layers * sum(section.trainable(*targets.shape(model, part)) for part in parts)
    return f"{count:,} parameters ({100 * count / (model.parameters + count):.2f} %)"


def blocks() -> dict[str, str]:
    """Every block of the page by the name in its markers."""
    tables = {"counts": counts(), "shapes": shapes(), "methods": methods(), "memory": memory()}
    return {name: "\n".join(lines) + "\n" for name, lines in tables.items()} | {"unfused-dora": unfused_dora()}


def _account(model: str, settings: str) -> Account:
    found, asked = read(model, shlex.split(settings))
    return Account.of(asked.peft, found.model, "bfloat16")


def _base(account: Account) -> int:
    return sum(row.nbytes for row in account.memory if row.what in BASE)


def _header(*cells: str) -> Sequence[str]:
    return _line(*cells), _line(*["---"] * len(cells))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
