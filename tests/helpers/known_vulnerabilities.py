"""What pip-audit found, in one line: ``python tests/helpers/known_vulnerabilities.py REPORT.json``.

pip-audit ends with code 0 where it could ask nobody. Here that is told apart from versions without known
vulnerabilities: exits with 1 where there are some, with 0 otherwise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Exit code and line for a report of ``pip-audit --format json``."""
    packages = report.get("dependencies", [])
    asked = [one for one in packages if "vulns" in one]
    found = [f"{one['name']} {one['version']} ({bug['id']})" for one in asked for bug in one["vulns"]]
    if found:
        return 1, f"known vulnerabilities: {', '.join(found)}"
    if not asked:
        return 0, "not audited: no vulnerability service could be asked"
    skipped = len(packages) - len(asked)
    return 0, f"no known vulnerabilities in {len(asked)} packages" + (f"; {skipped} not audited" if skipped else "")


def main() -> None:
    try:
        report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    code, line = verdict(report)
    print(line)
    sys.exit(code)


if __name__ == "__main__":
    main()
