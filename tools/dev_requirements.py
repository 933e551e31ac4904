"""Print what the `dev` extra of pyproject.toml asks for: make installs it without a build of ourselves."""

from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print("\n".join(project["optional-dependencies"]["dev"]))
