"""NeMo-RL's adapter blocks, `policy.megatron_cfg.peft` and `policy.dtensor_cfg.lora_cfg`, as our `peft` section.

What they mean is taken from github.com/NVIDIA-NeMo/RL: nemo_rl/models/policy/__init__.py (MegatronPeftConfig,
LoRAConfig), examples/configs/sft.yaml, docs/guides/lora.md, nemo_rl/models/megatron/setup.py; and from NeMo-Automodel's
nemo_automodel/components/_peft (PeftConfig, LinearLoRA, ModuleMatcher):

- Both train LoRA, scaled by alpha / dim. megatron_cfg.peft is Megatron-Bridge's LoRA on fused linears: our lora.
  lora_cfg adapts Hugging Face modules (`q_proj`) one by one: our canonical_lora. Neither has another method.
  Releases from 0.8 on call dtensor_cfg automodel_cfg.
- NeMo-RL has no default for most fields: a configuration says all of them. One that is left out is ours here. That
  holds for `enabled` too, which counts as true: this step always trains adapters.
- lora_A_init: xavier is drawn xavier normal, every other word kaiming uniform with a = sqrt(5), which is our kaiming.
- lora_dtype: null (YAML files there also say None) is the base's dtype in megatron_cfg.peft; in lora_cfg it is always
  overwritten with float32.
- Empty target_modules adapt every linear of the model, the output layer too; here every linear of the layers.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, create_model

from steps.config.base import Section
from steps.config.foreign import Claim, Reading
from steps.config.peft import section_class
from steps.config.validate import check_section, keys, show, source_of
from steps.errors import Problem

POLICY = "policy"


@dataclass(frozen=True)
class Block:
    """One of the blocks.

    method: the `peft.type` it stands for.
    fields: their name -> our key of the same meaning and the same values, types and ranges.
    own:    their name -> annotation, of the fields that are ours under no name.
    """

    config: str
    name: str
    method: str
    fields: Mapping[str, str]
    own: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{POLICY}.{self.config}.{self.name}"

    def schema(self) -> type[Section]:
        """The block as a typed section: what the fields take is what our keys take."""
        ours = keys(section_class(self.method))
        same: dict[str, Any] = {name: (ours[key].annotation, ours[key]) for name, key in self.fields.items()}
        extra: dict[str, Any] = {name: (annotation, Field(None)) for name, annotation in self.own.items()}
        return create_model(self.name, __base__=Section, **same, **extra)


_SAME = {name: name for name in ("target_modules", "exclude_modules", "dim", "alpha", "dropout", "dropout_position")}
_MEGATRON = Block(
    "megatron_cfg", "peft", "lora",
    {**_SAME, "lora_A_init_method": "lora_A_init_method", "lora_B_init_method": "lora_B_init_method",
     "lora_dtype": "lora_dtype"},
    {"enabled": bool, "a2a_experimental": bool, "share_expert_adapters": bool, "restore_from": str | None},
)  # fmt: skip
_DTENSOR, _AUTOMODEL = (
    Block(
        config, "lora_cfg", "canonical_lora", {**_SAME, "match_all_linear": "match_all_linear"},
        {"enabled": bool, "lora_A_init": Literal["xavier", "uniform"], "use_triton": bool,
         "lora_dtype": str | None, "restore_from": str | None},
    )
    for config in ("dtensor_cfg", "automodel_cfg")
)  # fmt: skip
BLOCKS = (_MEGATRON, _DTENSOR, _AUTOMODEL)

#: Fields without effect, and why.
_IDLE = {
    "use_triton": "has no effect here: the engine chooses its kernels",
    "a2a_experimental": "has no effect in the torch engine, which shards no matrix; for Megatron-Bridge there is "
    "peft.a2a_experimental",
    "share_expert_adapters": "has no effect here: it is for mixtures of experts",
}
#: What else NeMo-RL's files say, and the key that says it here.
_ELSEWHERE = {
    "policy.model_name": "checkpoint.pretrained_checkpoint",
    "policy.tokenizer": "tokenizer.model of data_prep/sft_packing",
    "policy.train_global_batch_size": "train.global_batch_size",
    "policy.train_micro_batch_size": "train.micro_batch_size",
    "policy.max_total_sequence_length": "recipe.seq_length",
    "policy.precision": "train.precision",
    "policy.max_grad_norm": "optimizer.clip_grad",
    "policy.optimizer": "optimizer",
    "policy.scheduler": "scheduler",
    "policy.megatron_cfg.optimizer": "optimizer",
    "policy.megatron_cfg.scheduler": "scheduler",
    "policy.megatron_cfg.tensor_model_parallel_size": "recipe.tensor_model_parallel_size",
    "policy.megatron_cfg.pipeline_model_parallel_size": "recipe.pipeline_model_parallel_size",
    "policy.megatron_cfg.context_parallel_size": "recipe.context_parallel_size",
    "policy.megatron_cfg.expert_model_parallel_size": "recipe.expert_model_parallel_size",
    "sft": "train",
    "checkpointing": "checkpoint",
    "data": "dataset",
    "cluster": "run.env",
}
#: Sections of NeMo-RL's files beside `policy`, where their name is none of ours; and its part of `logger`.
_SECTIONS = (
    "sft", "dpo", "grpo", "rm", "ppo", "distillation", "loss_fn", "env", "checkpointing", "data", "cluster",
)  # fmt: skip
_LOGGER = (
    "log_dir", "wandb_enabled", "tensorboard_enabled", "mlflow_enabled", "swanlab_enabled", "monitor_gpus", "wandb",
    "swanlab", "tensorboard", "mlflow", "gpu_monitoring", "num_val_samples_to_print",
)  # fmt: skip
_NAMED_AT_MOST = 8


def read(data: Mapping[str, Any], sources: Mapping[str, str]) -> Reading:
    """What a `policy` section, as NeMo-RL has it, says of the adapters. Everything else in it is told and left out."""
    if POLICY not in data:
        return Reading()
    reading, policy = Reading(taken=[POLICY]), data[POLICY]
    if policy is not None and not isinstance(policy, Mapping):
        what = f"{show(policy, POLICY)} is not a section with keys"
        reading.problems.append(Problem(POLICY, what, source=source_of(POLICY, sources)))
        return reading
    configs = {block.config: _mapping((policy or {}).get(block.config)) for block in BLOCKS}
    block = _chosen(configs, sources, reading)
    if block is not None:
        _read_block(block, configs[block.config][block.name], sources, reading)
    reading.problems += _misspelled(policy or {}, sources)
    _leave(data, policy or {}, block, reading)
    return reading


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _chosen(configs: Mapping[str, Mapping[str, Any]], sources: Mapping[str, str], reading: Reading) -> Block | None:
    """The block that counts: the enabled one, of several the one whose backend is enabled."""
    there = [block for block in BLOCKS if configs[block.config].get(block.name) is not None]
    on = []
    for block in there:
        content = configs[block.config][block.name]
        if not isinstance(content, Mapping):
            what = f"{show(content, block.key)} is not a section with keys"
            reading.problems.append(Problem(block.key, what, source=source_of(block.key, sources)))
        elif content.get("enabled") is False:
            reading.notes.append(f"{block.key}: not read, its enabled is false")
        else:
            on.append(block)
    backends = {block.config: configs[block.config].get("enabled") for block in on}
    for config, enabled in backends.items():
        if enabled is not None and not isinstance(enabled, bool):
            key = f"{POLICY}.{config}.enabled"
            what = f"{show(enabled, key)} is not true or false"
            reading.problems.append(Problem(key, what, source=source_of(key, sources)))
    found = [block for block in on if backends[block.config] is True]
    found = found or [block for block in on if backends[block.config] is not False]
    if len(found) == 1:
        reading.notes += [
            f"{block.key}: not read, {POLICY}.{found[0].config} is the backend" for block in on if block != found[0]
        ]
        return found[0]
    if found:
        which = " and ".join(block.key for block in found)
        off = " or ".join(f"{POLICY}.{block.config}.enabled=false" for block in found)
        what = f"{which} are both enabled, and which of the two counts is not said"
        source = source_of(found[0].key, sources)
        reading.problems.append(Problem(POLICY, what, source=source, hint=f"Set {off}."))
    if there and not on:
        reading.notes.append("this step always trains adapters: as the peft section says")
    for block in on if not found else ():
        what = f"is enabled, but its backend is not: {POLICY}.{block.config}.enabled is false"
        hint = f"Set {POLICY}.{block.config}.enabled=true, or {block.key}.enabled=false."
        reading.problems.append(Problem(block.key, what, source=source_of(block.key, sources), hint=hint))
    return None


def _read_block(block: Block, content: Mapping[str, Any], sources: Mapping[str, str], reading: Reading) -> None:
    """The claims of the chosen block."""
    content = {name: _plain(name, value) for name, value in content.items()}
    _, problems = check_section(block.schema(), content, sources, block.key)
    reading.problems += problems
    reading.notes.append(f"{block.key}: read as peft, type {block.method}")
    said_at = f"{block.key}.enabled" if "enabled" in content else block.key
    reading.claims.append(Claim("peft.type", block.method, said_at))
    wrong = {problem.where for problem in problems}
    for name, value in content.items():
        written = f"{block.key}.{name}"
        if name == "enabled" or any(where == written or where.startswith(f"{written}.") for where in wrong):
            continue
        if name in block.fields:
            reading.claims.append(Claim(f"peft.{block.fields[name]}", value, written))
        elif name == "lora_A_init":
            reading.claims.append(Claim("peft.lora_A_init_method", {"uniform": "kaiming"}.get(value, value), written))
        elif name == "restore_from" and value is not None:
            what = "starting from the adapter of another run is not supported"
            hint = "Leave it null. A run of the same settings goes on from checkpoint.load."
            reading.problems.append(Problem(written, what, source=source_of(written, sources), hint=hint))
        reading.notes += (f"{written}: {told}" for told in _told(block, name, value))


def _plain(name: str, value: Any) -> Any:
    """A value as YAML would have it: None is null, no list is an empty one, torch.bfloat16 is bfloat16."""
    if name in ("target_modules", "exclude_modules"):
        return [] if value in (None, "None") else value
    if name == "lora_dtype" and isinstance(value, str):
        plain = value.removeprefix("torch.")
        return {"None": None, "bf16": "bfloat16", "fp32": "float32", "float": "float32"}.get(plain, plain)
    return None if name == "restore_from" and value == "None" else value


def _told(block: Block, name: str, value: Any) -> Iterable[str]:
    """What is worth saying of a field beyond its value."""
    if name in _IDLE:
        yield _IDLE[name]
    elif name == "lora_A_init" and value == "uniform":
        yield "uniform is kaiming uniform, which is called kaiming here"
    elif name == "lora_dtype" and block is not _MEGATRON:
        yield "has no effect, there as here: these adapters are float32"
    elif name == "lora_dtype" and value is None:
        yield "null is the base's dtype in NeMo-RL; here the adapter's parameters are float32"
    elif (name == "match_all_linear" and value is True) or (
        block is _MEGATRON and name == "target_modules" and not value
    ):
        yield "means every linear of the layers; the output layer, which NeMo-RL adapts too, stays as it is"


def _misspelled(policy: Mapping[str, Any], sources: Mapping[str, str]) -> Iterable[Problem]:
    """A block that is meant and would be passed over as one of NeMo-RL's many other keys."""
    right = {block.config: block for block in BLOCKS}
    for config, content in policy.items():
        block = right.get(config)
        for name in _mapping(content) if block else ():
            assert block is not None
            if name != block.name and (name in ("peft", "lora_cfg", "lora") or _close(name, [block.name])):
                key = f"{POLICY}.{config}.{name}"
                yield Problem(key, "unknown key", source=source_of(key, sources), hint=f"Did you mean {block.key}?")
        if block is None and _mapping(content).keys() & {"peft", "lora_cfg"} and (close := _close(config, list(right))):
            key = f"{POLICY}.{config}"
            yield Problem(key, "unknown key", source=source_of(key, sources), hint=f"Did you mean {POLICY}.{close}?")


def _close(word: str, known: list[str]) -> str:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), "")


def _leave(data: Mapping[str, Any], policy: Mapping[str, Any], block: Block | None, reading: Reading) -> None:
    """Take out what is NeMo-RL's and say so: with the key that says it here, or all the rest in one line."""
    rest = [f"{POLICY}.{name}" for name in policy if block is None or name != block.config]
    if block is not None:
        mine = f"{POLICY}.{block.config}"
        rest += [f"{mine}.{name}" for name in policy[block.config] if name not in ("enabled", block.name)]
    outside = [name for name in _SECTIONS if name in data]
    outside += [f"logger.{name}" for name in _LOGGER if name in _mapping(data.get("logger"))]
    reading.taken += outside
    reading.unread += [*rest, *outside]
    told = [key for key in (*rest, *outside) if key in _ELSEWHERE]
    reading.notes += [f"{key}: has no effect here; {_ELSEWHERE[key]} says that" for key in told]
    backends = {f"{POLICY}.{other.config}" for other in BLOCKS}  # whose block, if they have one, was told already
    others = [key for key in (*rest, *outside) if key not in _ELSEWHERE and key not in backends]
    if others:
        named = ", ".join(others[:_NAMED_AT_MOST])
        more = f" and {len(others) - _NAMED_AT_MOST} more" if len(others) > _NAMED_AT_MOST else ""
        reading.notes.append(f"{named}{more}: NeMo-RL's own, without effect here")
