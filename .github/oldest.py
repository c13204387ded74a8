"""Print a pip constraint for each dependency in pyproject.toml: the oldest version that is allowed, patches aside."""

import tomllib
from pathlib import Path

needs = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
for need in needs:
    name, _, version = need.partition(">=")
    print(f"{name}=={version}.*")
