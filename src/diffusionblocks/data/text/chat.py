"""Conversations: rows of messages through a tokenizer's own chat template, and which of their tokens are answers.

Answers are what the assistant says, with the tokens that end its turn. Prompt and answers are tokenised apart: at
inference too the answer begins where the prompt's tokens end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusionblocks.data.text.rows import text_of
from diffusionblocks.data.text.tokenizers import HuggingFace, Tokenizer
from diffusionblocks.errors import UserError

Conversation = list[dict[str, str]]  # role and content
FORMATS = ("auto", "text", "messages", "prompt")
ASSISTANT = "assistant"


class Encoded(NamedTuple):
    """ids: uint32 [T]. answers: bool [T], where the loss is."""

    ids: np.ndarray
    answers: np.ndarray


def format_of(names: Sequence[str], text_key: str, messages_key: str, where: str) -> str:
    """What a row with these columns holds. Raises UserError when that cannot be told."""
    if text_key in names:
        return "text"
    if messages_key in names:
        return "messages"
    if {"prompt", "completion"} <= set(names):
        return "prompt"
    raise UserError(
        f"{where} has no column {text_key!r} (data.text_key), {messages_key!r} (data.messages_key) or 'prompt' and "
        f"'completion'; it has {', '.join(names) or 'none'}"
    )


def columns_of(kind: str, text_key: str, messages_key: str) -> list[str]:
    """The columns that a format reads."""
    return {"text": [text_key], "messages": [messages_key], "prompt": ["prompt", "completion"]}[kind]


def conversation(
    row: Mapping[str, Any], kind: str, messages_key: str, where: str, errors: str = "strict"
) -> Conversation:
    """The messages of a row. errors: see `text_of`. Raises UserError for what is none."""
    if kind == "messages":
        return _messages(row[messages_key], where, errors)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        first = _messages(prompt, where, errors)
    else:
        first = [{"role": "user", "content": text_of(prompt, "the prompt", where, errors)}]
    if isinstance(completion, list):
        return [*first, *_messages(completion, where, errors)]
    return [*first, {"role": ASSISTANT, "content": text_of(completion, "the completion", where, errors)}]


def _messages(found: Any, where: str, errors: str) -> Conversation:
    if not isinstance(found, list) or not all(
        isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in found
    ):
        raise UserError(f"{where}: messages must be a list of {{role, content}}, got {ascii(found)[:60]}")
    for one in found:
        for name in ("role", "content"):
            if not isinstance(one[name], str):
                raise UserError(f"{where}: the {name} of a message must be text, got {ascii(one[name])[:60]}")
    return [{name: text_of(one[name], f"the {name}", where, errors) for name in ("role", "content")} for one in found]


def template_of(tokenizer: Tokenizer) -> Any:
    """The Hugging Face tokenizer with a chat template. Raises UserError when there is none."""
    if not isinstance(tokenizer, HuggingFace) or not tokenizer.own.chat_template:
        name = tokenizer.name if isinstance(tokenizer, HuggingFace) else type(tokenizer).__name__.lower()
        raise UserError(
            f"the tokenizer {name!r} has no chat template, which conversations need: take the instruct version of the "
            "model, or set chat_template in its tokenizer_config.json"
        )
    return tokenizer.own


def encode(messages: Conversation, tokenizer: Tokenizer, where: str) -> Encoded:
    """A conversation as tokens. Raises UserError where the tokenizer has no chat template, or the template refuses
    it."""
    own = template_of(tokenizer)
    whole = _rendered(own, messages, where)
    spans = _answers(own, messages, whole, where)
    ids: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    place = 0
    for start, end in [*spans, (len(whole), len(whole))]:
        for text, answer in ((whole[place:start], False), (whole[start:end], True)):
            if text:
                ids.append(tokenizer.encode(text))
                answers.append(np.full(len(ids[-1]), answer))
        place = end
    if not ids:
        return Encoded(np.zeros(0, np.uint32), np.zeros(0, bool))
    return Encoded(np.concatenate(ids), np.concatenate(answers))


def question(text: str, tokenizer: Tokenizer) -> str:
    """What a user asks, as the text that an answer begins after."""
    return _rendered(template_of(tokenizer), [{"role": "user", "content": text}], "the prompt", asked=True)


def _answers(own: Any, messages: Conversation, whole: str, where: str) -> list[tuple[int, int]]:
    """Where in the whole text the assistant's turns are.

    Some templates tell an earlier turn otherwise once there is a later one (they leave out what was thought): then only
    the last turn is an answer.
    """
    found = []
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _rendered(own, messages[:index], where, asked=True) if index else ""
        after = _rendered(own, messages[: index + 1], where)
        if index and whole.startswith(before) and whole.startswith(after) and len(after) > len(before):
            found.append((len(before), len(after)))
    return found


def _rendered(own: Any, messages: Conversation, where: str, asked: bool = False) -> str:
    try:
        return str(own.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked))
    except Exception as error:  # a template is a program and may raise anything (a role it does not know)
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{where}: the tokenizer's chat template refuses the conversation: {reason}") from None
