"""Louver attention for llama.cpp: of a long KV cache a fraction is read, and a certificate bounds the rest.

``Llama`` is a ``llama_cpp.Llama`` in all else. It and llama.cpp's libraries are loaded when it is first
named, so that importing this package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import LouverConfig
from .errors import LibraryMismatchError, ModelFileError, ModelNotFoundError, PromptTooLongError

if TYPE_CHECKING:
    from .llama import Llama

    __version__: str

__all__ = [
    "LibraryMismatchError",
    "Llama",
    "LouverConfig",
    "ModelFileError",
    "ModelNotFoundError",
    "PromptTooLongError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "Llama":
        from .llama import Llama

        return Llama
    if name == "__version__":
        from importlib.metadata import version

        return version("louver-llama")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
