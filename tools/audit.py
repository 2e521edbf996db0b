"""Look for known vulnerabilities in the packages of this environment (`make audit`).

    .venv/bin/python tools/audit.py PIP_AUDIT

Runs the program PIP_AUDIT over the packages installed for this Python. Exits with 1 where a package has a known
vulnerability. An index without its database answers that it does not know the packages, which is reported as not
checked: silence about a package is not a clean record.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from typing import Any


def report(dependencies: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Lines to print for pip-audit's list of dependencies, and whether one of them is vulnerable."""
    lines = []
    for package in dependencies:
        for advisory in package.get("vulns", []):
            fixed = ", ".join(advisory["fix_versions"]) or "no release yet"
            lines.append(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    skipped = [package["name"] for package in dependencies if "skip_reason" in package]
    if len(skipped) == len(dependencies):
        return ["the database of vulnerabilities could not be reached: nothing was checked"], False
    vulnerable = bool(lines)
    lines.append(f"{len(dependencies) - len(skipped)} packages checked, {len(lines)} known vulnerabilities")
    if skipped:
        lines.append(f"not checked, as the database does not know them: {', '.join(skipped)}")
    return lines, vulnerable


def main(program: str) -> int:
    folder = sysconfig.get_paths()["purelib"]
    command = [program, "--progress-spinner=off", "--skip-editable", "--format=json", "--path", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        if "ConnectionError" not in done.stderr and "Timeout" not in done.stderr:
            sys.exit(done.stderr or f"{program} printed nothing")
        dependencies = []
    lines, vulnerable = report(dependencies)
    print("\n".join(lines))
    return int(vulnerable)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
