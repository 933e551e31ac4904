"""Louver attention for llama.cpp: of a long KV cache a fraction is read, and a certificate bounds the rest.

``Llama`` is a ``llama_cpp.Llama`` in all else. It and llama.cpp's libraries are loaded when it is first
named, so that importing this package stays cheap. ``Index``, ``oracles`` and ``attention`` are the index by itself,
on arrays; they need no llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .config import LouverConfig
from .errors import (
    CorruptIndexError,
    IndexFileError,
    IndexSystemError,
    IndexVersionError,
    LibraryMismatchError,
    ModelFileError,
    ModelNotFoundError,
    NotAnIndexError,
    PromptTooLongError,
    TruncatedIndexError,
)

if TYPE_CHECKING:
    from . import oracles
    from .index import Index
    from .llama import Llama
    from .matches import Certificate, Match, Matches, Selection
    from .sparse import attention

    __version__: str

__all__ = [
    "Certificate",
    "CorruptIndexError",
    "Index",
    "IndexFileError",
    "IndexSystemError",
    "IndexVersionError",
    "LibraryMismatchError",
    "Llama",
    "LouverConfig",
    "Match",
    "Matches",
    "ModelFileError",
    "ModelNotFoundError",
    "NotAnIndexError",
    "PromptTooLongError",
    "Selection",
    "TruncatedIndexError",
    "__version__",
    "attention",
    "oracles",
]

# Where what is loaded late comes from.
_LATE = {
    "Certificate": "matches",
    "Index": "index",
    "Llama": "llama",
    "Match": "matches",
    "Matches": "matches",
    "Selection": "matches",
    "attention": "sparse",
}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(import_module(f".{_LATE[name]}", __name__), name)
    if name == "oracles":
        return import_module(".oracles", __name__)
    if name == "__version__":
        from importlib.metadata import version

        return version("louver-llama")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
