"""How far a benchmark is, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[int], None]


class Watch:
    """A bar for the whole run and one for its stage at hand; where there is no terminal, a line per stage.

    shown: None for "where ``console`` is a terminal".
    """

    def __init__(self, console: Console, shown: bool | None, n_stages: int) -> None:
        self._console = console
        self._lines = bool(shown) and not console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        # Refreshed by hand: a thread that draws would take a processor from what is being timed.
        self._progress = Progress(
            *columns,
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal or shown is False,
        )
        self._all = self._progress.add_task("all", total=n_stages)
        self._stage = self._progress.add_task("")

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Leave a line that stays."""
        self._console.print(text, style="dim", soft_wrap=True)

    @contextmanager
    def stage(self, name: str, n_tokens: int) -> Iterator[Advance]:
        """One part of the run; gives a function to be told how many more tokens were evaluated."""

        def advance(n: int) -> None:
            self._progress.advance(self._stage, n)
            self._progress.refresh()

        if self._lines:
            self.note(name)
        self._progress.reset(self._stage, description=name, total=n_tokens)
        self._progress.refresh()
        yield advance
        self._progress.advance(self._all)
