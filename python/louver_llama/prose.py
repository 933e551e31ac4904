"""Real English for demo and measurements: Python's language reference, out of the standard library."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"\*\*|\*(?=\w)|(?<=\w)\*|\"(?=\S)|(?<=\S)\"| \[\d+\]")


def language_reference() -> str:
    """The paragraphs of running text, each once, without code, grammar and markup; about 43,000 tokens.

    Raises ImportError where Python was installed without pydoc_data.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ImportError(
            "the text comes from pydoc_data of Python's standard library, which this Python lacks"
        ) from None
    paragraphs = (
        " ".join(paragraph.split()) for topic in sorted(topics) for paragraph in topics[topic].split("\n\n")
    )
    return "\n\n".join(dict.fromkeys(_MARKUP.sub("", text) for text in paragraphs if _is_prose(text)))


def _is_prose(paragraph: str) -> bool:
    return (
        paragraph[:1].isupper()
        and paragraph.endswith(".")
        and "::=" not in paragraph
        and ">>>" not in paragraph
    )
