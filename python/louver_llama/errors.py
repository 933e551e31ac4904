"""What can go wrong that a caller may want to catch by name."""

from __future__ import annotations


class LibraryMismatchError(RuntimeError):
    """The llama.cpp in this process, or about to be loaded into it, is not the one we were built with."""


class ModelFileError(ValueError):
    """A model file that cannot be loaded; the message names the file and what is wrong with it."""


class ModelNotFoundError(ModelFileError, FileNotFoundError):
    """There is no such model file."""


class PromptTooLongError(ValueError):
    """More tokens than the context holds.

    ``n_tokens`` is how many there would be, ``n_ctx`` how many cells the context has. A prompt has to leave
    one cell free for the first token that is generated.
    """

    def __init__(self, n_tokens: int, n_ctx: int) -> None:
        super().__init__(n_tokens, n_ctx)
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx

    def __str__(self) -> str:
        return (
            f"the prompt has {self.n_tokens} tokens, but the context holds {self.n_ctx}: "
            "shorten the prompt or enlarge the context (n_ctx, on the command line -c)"
        )


class IndexFileError(ValueError):
    """An index file that cannot be read or written; the message names the file and what is wrong."""


class NotAnIndexError(IndexFileError):
    """The file is something else than an index."""


class IndexVersionError(IndexFileError):
    """The file was written by a later version."""


class TruncatedIndexError(IndexFileError):
    """The file ends early."""


class CorruptIndexError(IndexFileError):
    """A checksum or a field of the file is wrong."""


class IndexSystemError(IndexFileError, OSError):
    """The operating system refused to open, read, write or move the file."""
