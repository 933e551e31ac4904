"""Print what the `dev` extra of pyproject.toml asks for, so that make can install it without building us again."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print("\n".join(project["optional-dependencies"]["dev"]))
