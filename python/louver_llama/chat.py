"""The model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._libraries import llama_cpp
from .llama import Llama


def chat_tokens(llm: Llama, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the assistant is to answer.

    messages: each with a "role" ("system", "user", "assistant") and a "content".

    Raises ValueError for a model file without a chat template.
    """
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        raise ValueError(f"{llm.model_path}: the model file has no chat template")
    vocabulary: Any = llama_cpp.llama_model_get_vocab(llm.model)

    def text(token: int) -> str:
        return llama_cpp.llama_vocab_get_text(vocabulary, token).decode() if token >= 0 else ""

    formatter = Jinja2ChatFormatter(
        template=template, eos_token=text(llm.token_eos()), bos_token=text(llm.token_bos())
    )
    prompt = formatter(messages=list(messages)).prompt  # type: ignore[arg-type]
    return llm.tokenize(prompt.encode(), add_bos=False, special=True)


def is_end(llm: Llama, token: int) -> bool:
    """Whether ``token`` ends the model's answer."""
    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llm.model), token))
