"""Where the model's answers stand in a rendered conversation.

Two ways, both exact or refused:

- The template marks answers itself, with `{% generation %}`.
- Otherwise by prefixes. Answer i is what stands between the prompt the model would get,
  render(messages[:i], add_generation_prompt=True), and render(messages[:i + 1]); both must be literal prefixes of the
  whole. An answer that the template shows differently later on (Qwen3 takes the thinking out of earlier turns) is not
  what the model would have said at that point: it stays as context and is not trained.

Rendering a prefix per answer costs more than tokenizing when conversations are long. Most templates walk through the
messages once and never look ahead; then every prefix is known from one rendering (`_streamed`). The watch on what the
template reads makes sure of that, conversation by conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steps.engine.data.chat import Conversation, DroppedError
from steps.engine.data.template import TEMPLATE_ERRORS, ChatTemplate
from steps.engine.data.watch import Watch, WatchedMessages

Span = tuple[int, int]


@dataclass
class Answers:
    """A rendered conversation with its trained answers. rewritten: answers left out because the text changes later."""

    text: str
    spans: list[Span] = field(default_factory=list)
    rewritten: int = 0


def find_answers(
    template: ChatTemplate, conversation: Conversation, marks: tuple[str, str] | None = None, *, stream: bool = True
) -> Answers:
    """Render a conversation and find the answers to train, as character spans in order.

    marks:  two characters that do not occur in the conversation, for templates with `{% generation %}`.
    stream: allow the one-pass way; False renders every prefix.
    Raises DroppedError when the template refuses the conversation or its blocks do not fit the weights.
    """
    try:
        if template.has_generation:
            return _generated(template, conversation, marks)
        if stream and (answers := _streamed(template, conversation)) is not None:
            return answers
        return _prefixes(template, conversation)
    except TEMPLATE_ERRORS as error:
        raise DroppedError("template_error", str(error)) from error


def _generated(template: ChatTemplate, conversation: Conversation, marks: tuple[str, str] | None) -> Answers:
    rendered = template.render_spans(conversation.messages, conversation.tools, marks)
    answers = [
        trained
        for message, trained in zip(conversation.messages, conversation.trained, strict=True)
        if message["role"] == "assistant"
    ]
    if len(answers) == len(rendered.spans):
        wanted = [span for span, trained in zip(rendered.spans, answers, strict=True) if trained]
    elif all(answers):
        wanted = rendered.spans
    elif not any(answers):
        wanted = []
    else:
        raise DroppedError("weights_need_one_span_per_answer")
    return Answers(rendered.text, [span for span in wanted if span[1] > span[0]])


def _prefixes(template: ChatTemplate, conversation: Conversation) -> Answers:
    messages, tools = conversation.messages, conversation.tools
    answers = Answers(template.render(messages, tools))
    for index, trained in enumerate(conversation.trained):
        if not trained:
            continue
        last = index == len(messages) - 1
        try:
            prompt = template.render(messages[:index], tools, add_generation_prompt=True)
            through = answers.text if last else template.render(messages[: index + 1], tools)
        except TEMPLATE_ERRORS:  # the template takes the whole conversation, but not this part of it
            answers.rewritten += 1
            continue
        if answers.text.startswith(prompt) and answers.text.startswith(through) and len(through) > len(prompt):
            answers.spans.append((len(prompt), len(through)))
        else:
            answers.rewritten += 1
    return answers


def _streamed(template: ChatTemplate, conversation: Conversation) -> Answers | None:
    """The same answers as `_prefixes`, from one rendering; None where that cannot be told."""
    first = next((index for index, trained in enumerate(conversation.trained) if trained), None)
    if first == 0:  # what stands before the first message is not seen while watching
        return None
    watch, blocks = Watch(conversation.messages), []
    try:
        for block in template.stream(WatchedMessages(watch), conversation.tools):
            blocks.append(block)
            watch.written += len(block)
    except TEMPLATE_ERRORS:  # perhaps only because it was given no real list
        return None
    rendered = "".join(blocks)
    if watch.looked_ahead or template.looked_ahead or watch.boundaries.get(len(watch.messages)) != len(rendered):
        return None
    answers = Answers(rendered)
    if first is None:
        return answers
    begin = watch.boundaries.get(first)
    if begin is None:  # the walk began behind it
        return None
    prompt = template.render(conversation.messages[:first], conversation.tools, add_generation_prompt=True)
    header = prompt[begin:]
    if prompt[:begin] != rendered[:begin]:
        return None
    for index in (index for index, trained in enumerate(conversation.trained) if trained):
        start, end = watch.boundaries[index] + len(header), watch.boundaries[index + 1]
        if end <= start or not rendered.startswith(header, watch.boundaries[index]):
            return None
        answers.spans.append((start, end))
    return answers
