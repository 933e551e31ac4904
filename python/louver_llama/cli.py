"""The command ``louver-llama``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .cli_options import add_bench_options, add_demo_options, add_info_options, add_run_options
from .errors import LibraryMismatchError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 after one line about bad input, 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(given, argparse.Namespace(arguments=given))
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _command(options.command)(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Nobody reads any more. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename is not None else error)
    except (ImportError, LibraryMismatchError, ValueError) as error:
        return _refuse(error)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"louver-llama: warning: {message}", file=sys.stderr)


def _refuse(why: object) -> int:
    print(f"louver-llama: error: {why}", file=sys.stderr)
    return 2


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    # Imported here, because llama.cpp is loaded with them and --help shall not wait for it.
    if name == "run":
        from .cli_run import run

        return run
    if name == "bench":
        from .bench import bench

        return bench
    if name == "info":
        from .cli_info import info

        return info
    from .demo import demo

    return demo


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_refuse(message))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from . import __version__

        print(f"louver-llama {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="louver-llama",
        description="Run GGUF models with Louver attention: of a long KV cache each step reads a fraction, "
        "and a certificate bounds what was left out.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | bench | info | demo")

    text = "generate text; the text goes to stdout, all else to stderr"
    add_run_options(commands.add_parser("run", help=text, description=text, allow_abbrev=False))
    text = "time stock attention, our dense attention and Louver in turn; the results go to stdout"
    add_bench_options(commands.add_parser("bench", help=text, description=text, allow_abbrev=False))
    text = "tell what is installed, what this machine has, and what Louver does with a model"
    add_info_options(commands.add_parser("info", help=text, description=text, allow_abbrev=False))
    text = (
        "read 7,000 tokens, then answer a question with stock attention and with Louver, in turn, and compare"
    )
    add_demo_options(commands.add_parser("demo", help=text, description=text, allow_abbrev=False))
    return parser


if __name__ == "__main__":
    sys.exit(main())
