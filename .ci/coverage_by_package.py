"""Shares of lines and branches that the tests ran, a row for each package, of what `coverage json` writes."""

import json
import sys
from collections import Counter
from pathlib import Path


def _share(covered: int, all: int) -> str:
    return f"{100 * covered / all:5.1f} % of {all:6,}" if all else ""


packages: dict[str, Counter[str]] = {}
for name, file in json.load(sys.stdin)["files"].items():
    folders = Path(name).parts[:-1]
    inside = folders[folders.index("vitquant") + 1 :]
    for package in (inside[0] if inside else "modules of no package", "all"):
        packages.setdefault(package, Counter()).update(file["summary"])
print(f"{'package':22} {'lines':>17} {'branches':>17}")
for package, of in sorted(packages.items(), key=lambda each: (each[0] == "all", each[0])):
    lines = _share(of["covered_lines"], of["num_statements"])
    print(f"{package:22} {lines:>17} {_share(of['covered_branches'], of['num_branches']):>17}")
