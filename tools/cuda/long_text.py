"""English technical prose that every Python has: its manual's topics and the docstrings of the standard library.

python tools/cuda/long_text.py FILE
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics


def docstrings() -> list[str]:
    """Of all modules, classes and functions."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    return found


Path(sys.argv[1]).write_text("\n\n".join([*topics.values(), *docstrings()]))
