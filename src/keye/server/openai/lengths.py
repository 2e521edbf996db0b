"""Whether the texts of a conversation can fit the context at all, found out before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from keye.api import Keye
from keye.chat.messages import Message
from keye.chat.template import count_marks
from keye.errors import ContextError


def check_length(model: Keye, messages: Sequence[Message]) -> None:
    """`ContextError` where the context cannot hold the texts of `messages`, by a lower bound of their tokens. Marks in
    replies are tokens of their own, however short."""
    limit, least = model.config.text.max_position_embeddings, 0
    for message in messages:
        for part in message.parts:
            if isinstance(part, str) and message.role == "assistant":
                part = part.rpartition("</think>")[2]  # what was thought before may be left out
                least += max(model.tokenizer.least_tokens(part), count_marks(part, limit))
            elif isinstance(part, str):
                least += model.tokenizer.least_tokens(part)
        if least > limit:
            raise ContextError(f"the prompt takes at least {least} tokens, but the context holds {limit}; send less")
