"""Render conversations as token ids, with a mask of the tokens that carry loss.

A message is a mapping with ``role`` (system, user, assistant) and ``content``. If the template has no variable for
reasoning, reasoning is written into the content, between ``<think>`` and ``</think>``. Only text of the template
becomes control tokens: a message that spells one is encoded as plain text. Exceptions in answers: ``<think>``,
``</think>`` and added tokens that the tokenizer does not declare special keep their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ring.data.text.chat_template import Text
from megatron_ring.data.text.control_text import free_mark
from megatron_ring.data.text.messages import REASONING, Conversation, Message
from megatron_ring.data.text.tokenizer import Tokenizer
from megatron_ring.data.text.tool_calls import fit_arguments
from megatron_ring.errors import DataError

_OF_RESULTS = ("name", "tool_call_id")
"""Keys of a tool's result that repeat what the call already contains."""

Sample = tuple[list[int], list[bool]]
"""Token ids, and for each whether it carries loss."""


def render_samples(tokenizer: Tokenizer, conversation: Conversation) -> list[Sample]:
    """A conversation as samples for fine-tuning: token ids, and for each whether it carries loss.

    The loss covers each answer from the end of its generation prompt to its stop token, inclusive: the model must learn
    to stop. The stop token is the template's, or the end of sequence if the template writes none. Prompt and answer
    are encoded separately, so that a prompt has the same ids here as in a rollout (:func:`render_prompt`).

    If the template only appends as a conversation grows, there is one sample. A template that rewrites earlier turns
    (for instance, drops their reasoning) gives one sample per learned answer: the conversation up to that answer, as
    the model will see it at inference.

    Example, with one token per word: ``user: "hi"``, ``assistant: "yes"`` gives
    ids of ``<role> HUMAN </role> hi <role> ASSISTANT </role> yes <eos>`` and mask ``0 0 0 0 0 0 0 1 1``.

    Raises:
        DataError: the template does not read a key of a message, the tools or a variable; or it refuses the messages,
            drops an answer's reasoning, or does not write an answer directly after its generation prompt.
    """
    rendered = _Rendered.of(tokenizer, conversation)
    for turn in rendered.turns:
        if turn.index not in conversation.unlearned:
            rendered.must_show_reasoning(turn)
    try:
        return [rendered.whole()]
    except _Rewritten:
        turns = [turn for turn in rendered.turns if turn.index not in conversation.unlearned]
        return [rendered.alone(turn) for turn in turns]


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Token ids of a conversation and the generation prompt, from which an answer is sampled.

    :func:`render_samples` begins with the same ids for the conversation with the answer.

    Raises:
        DataError: as :func:`render_samples`.
    """
    rendered = _Rendered.of(tokenizer, conversation)
    try:
        ids, _, done = rendered.answered()
        return ids + rendered.encode(_suffix(rendered.prompt, done))
    except _Rewritten:
        return rendered.encode(rendered.prompt)


class _Rewritten(DataError):
    """The template rewrites earlier turns when a conversation grows."""


@dataclass(frozen=True, slots=True)
class _Turn:
    index: int
    before: str
    """The conversation up to and including the answer's generation prompt."""
    after: str
    """The conversation with the answer as its last turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendered:
    """A conversation's texts, with marks in words that must not become control tokens (``mark`` is None without any)."""

    tokenizer: Tokenizer
    conversation: Conversation
    messages: Sequence[Message]
    mark: str | None
    turns: list[_Turn]
    prompt: str
    text: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, conversation: Conversation) -> _Rendered:
        _must_be_read(tokenizer, conversation)
        called = fit_arguments(
            conversation.messages, conversation.tools, lambda: tokenizer.template.argument_forms
        )
        conversation = replace(conversation, messages=called)
        messages, tools, names, mark = _guarded(tokenizer, conversation)
        answers = [i for i, message in enumerate(messages) if str(message.get("role")).lower() == "assistant"]
        whole: list[Text] = [(len(messages), True), (len(messages), False)]
        texts = tokenizer.render(
            messages,
            [text for i in answers for text in ((i, True), (i + 1, False))] + whole,
            tools=tools,
            template_kwargs=names,
        )
        *pairs, prompt, text = texts

        def without(number: int) -> str:
            others = [{**m, "content": ""} if i == number else m for i, m in enumerate(messages)]
            return tokenizer.render(others, whole[1:], tools=tools, template_kwargs=names)[0]

        _must_be_shown(messages, text, without)
        turns = [
            _Turn(i, *pair)
            for i, pair in zip(answers, zip(pairs[::2], pairs[1::2], strict=True), strict=True)
        ]
        return cls(
            tokenizer=tokenizer,
            conversation=conversation,
            messages=messages,
            mark=mark,
            turns=turns,
            prompt=prompt,
            text=text,
        )

    def whole(self) -> Sample:
        """All turns in one sample."""
        ids, mask, done = self.answered()
        tail = self.encode(_suffix(self.text, done))
        return ids + tail, mask + [False] * len(tail)

    def alone(self, turn: _Turn) -> Sample:
        """A sample whose last turn is ``turn``; the text before it is context without loss."""
        prompt_ids = self.encode(turn.before)
        answer_ids, _ = self.answer(turn)
        return prompt_ids + answer_ids, [False] * len(prompt_ids) + [True] * len(answer_ids)

    def answered(self) -> tuple[list[int], list[bool], str]:
        """Ids and mask up to the last answer's end, and the text of these ids."""
        ids: list[int] = []
        mask: list[bool] = []
        done = ""
        for turn in self.turns:
            prompt_ids = self.encode(_suffix(turn.before, done))
            answer_ids, rest = self.answer(turn)
            ids += prompt_ids + answer_ids
            mask += [False] * len(prompt_ids)
            mask += [turn.index not in self.conversation.unlearned] * len(answer_ids)
            # what a template writes after the stop token (Qwen's newline) belongs to the next turn
            done = turn.after[: len(turn.after) - len(rest)]
        return ids, mask, done

    def answer(self, turn: _Turn) -> tuple[list[int], str]:
        """Ids of the turn's answer with its stop token, and the text after them."""
        if not turn.after.startswith(turn.before):
            raise DataError(
                f"chat template does not write the answer of message {turn.index} directly after its generation prompt, "
                "so the answer's tokens cannot be found; correct the template, or set --chat-template-kwargs"
            )
        text = turn.after[len(turn.before) :]
        stops = self.tokenizer.stop_tokens
        start, token = min(
            ((text.find(token), token) for token in stops if token in text), default=(len(text), None)
        )
        end = start + len(token or "")
        stop_id = self.tokenizer.eos_id if token is None else stops[token]
        return [*self.encode(text[:start]), stop_id], text[end:]

    def encode(self, text: str) -> list[int]:
        """Token ids of a template's text; the end of sequence always becomes its one id."""
        first, *others = (self._plain(part) for part in text.split(self.tokenizer.eos_token))
        return first + [token for part in others for token in (self.tokenizer.eos_id, *part)]

    def _plain(self, text: str) -> list[int]:
        if self.mark is None or self.mark not in text:
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_marked(text, self.mark)

    def must_show_reasoning(self, turn: _Turn) -> None:
        message = self.messages[turn.index]
        shown = turn.after[len(turn.before) :]
        for thought in _thoughts(message):
            if thought not in shown:
                raise DataError(
                    f"chat template drops the reasoning of message {turn.index}; use another template, or remove the "
                    "reasoning"
                )


def _thoughts(message: Message) -> Iterator[str]:
    """The reasoning of an answer, from its content and its keys, without the white space around it."""
    inside, _ = _split_reasoning(str(message.get("content")))
    for thought in (*inside, *(message[key] for key in REASONING if key in message)):
        if str(thought).strip():
            yield str(thought).strip()


def _split_reasoning(content: str) -> tuple[list[str], str]:
    """The texts between ``<think>`` and ``</think>``, and the rest of the content; without ``</think>`` it is all rest.

    Example: ``_split_reasoning("a<think>b</think>c") == (["b"], "ac")``.
    """
    # find() instead of a regular expression, which would be quadratic in the number of unclosed <think>
    thoughts: list[str] = []
    rest: list[str] = []
    start = 0
    while (begin := content.find("<think>", start)) >= 0 and (end := content.find("</think>", begin)) >= 0:
        rest.append(content[start:begin])
        thoughts.append(content[begin + len("<think>") : end])
        start = end + len("</think>")
    return thoughts, "".join([*rest, content[start:]])


def _suffix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise _Rewritten("chat template rewrites earlier turns when a conversation grows")
    return text[len(prefix) :]


def _must_be_read(tokenizer: Tokenizer, conversation: Conversation) -> None:
    """Refuse what the template would silently drop."""
    template = tokenizer.template
    if conversation.tools and not template.mentions("tools"):
        raise DataError(
            "tools are not read by this chat template; remove them, or use a template that writes them"
        )
    for name in conversation.template_kwargs:
        if not template.mentions(name):
            raise DataError(f"chat_template_kwargs: this chat template does not read {name}; drop it")
    for number, message in enumerate(conversation.messages):
        repeated = _OF_RESULTS if str(message.get("role")).lower() in ("tool", "function") else ()
        for key in message:
            if key not in ("role", "content", *REASONING, *repeated) and not template.reads(key):
                raise DataError(
                    f"message {number}: {key} is not read by this chat template; remove it, or use a template that "
                    "writes it"
                )


def _must_be_shown(messages: Sequence[Message], text: str, without: Callable[[int], str]) -> None:
    """Refuse a template whose ``text`` is the same ``without`` the content of a message: it ignores that message."""
    for number, message in enumerate(messages):
        content = _split_reasoning(str(message["content"]))[1].strip()
        if content in text:
            continue
        try:
            dropped = without(number) == text
        except DataError:
            # the template refuses an empty content, so it reads the content
            continue
        if dropped:
            raise DataError(
                f"chat template drops the content of message {number} (role {message['role']}); remove it, or use a "
                "template that writes it"
            )


def _guarded(
    tokenizer: Tokenizer, conversation: Conversation
) -> tuple[list[Message], list[Any] | None, dict[str, Any], str | None]:
    """Messages, tools and variables as the template gets them, and the mark used in them, if any."""
    strict, lenient = tokenizer.control_text
    everything = list(_texts([conversation.messages, conversation.tools, conversation.template_kwargs]))
    mark = free_mark(everything)

    def plain(value: Any) -> Any:
        return _mapped(value, lambda text: strict.guard(text, mark))

    named = next((key for key in REASONING if tokenizer.template.reads(key)), None)
    messages: list[Message] = []
    for number, message in enumerate(conversation.messages):
        guarded = {key: plain(value) for key, value in message.items()}
        if str(message.get("role")).lower() == "assistant":
            guarded["content"] = lenient.guard(message["content"], mark)
        thought = guarded.pop(REASONING[0], None)
        if thought is not None and named is not None:
            guarded[named] = thought
        elif thought is not None:
            if "<think>" in message["content"] or "</think>" in message["content"]:
                raise DataError(
                    f"message {number} has its reasoning twice, in its content and under a key; keep one"
                )
            guarded["content"] = f"<think>{thought}</think>{guarded['content']}"
        messages.append(guarded)
    tools = plain(conversation.tools)
    names = {name: plain(value) for name, value in conversation.template_kwargs.items()}
    used = any(mark in text for text in _texts([messages, tools, names]))
    return messages, tools, names, mark if used else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _mapped(value: Any, change: Any) -> Any:
    """``value`` with every string in it changed, keys included: a function's argument may have any name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value
