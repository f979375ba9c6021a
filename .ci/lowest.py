"""Print the lowest versions that pyproject.toml allows, as requirements for pip.

    lowest.py [EXTRA]...

Lists the dependencies of the service and those of the extras. PyTorch is left out: PyPI has no
small build of its older releases, so the one that is installed already is used.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

EXCEPT = {"torch"}


def lowest(line: str) -> str:
    """Return a requirement with its lower bound as the only version."""
    requirement = Requirement(line)
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}=={bound}{marker}"


def main() -> None:
    """Print the requirements."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lines = list(project["dependencies"])
    for extra in sys.argv[1:]:
        lines += project["optional-dependencies"][extra]
    for line in lines:
        if Requirement(line).name not in EXCEPT:
            sys.stdout.write(f"{lowest(line)}\n")


if __name__ == "__main__":
    main()
