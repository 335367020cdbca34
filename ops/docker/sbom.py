"""Print a CycloneDX 1.5 bill of the Python packages that this interpreter has: name, version, licence, package URL.  No network, no clock."""

import json
import re
import sys
from importlib.metadata import Distribution, distributions


def component(found: Distribution) -> dict[str, object]:
    name, about = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(), found.metadata
    licence = about.get("License-Expression") or about.get("License") or ""
    part: dict[str, object] = {
        "type": "library",
        "name": name,
        "version": found.version,
        "purl": f"pkg:pypi/{name}@{found.version}",
        "bom-ref": f"{name}@{found.version}",
    }
    if licence and "\n" not in licence:  # some packages put the whole text there
        part["licenses"] = [{"license": {"name": licence}}]
    return part


def bill() -> dict[str, object]:
    parts = {str(part["bom-ref"]): part for part in map(component, distributions())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "streamlearn", "bom-ref": "streamlearn-image"}},
        "components": [parts[key] for key in sorted(parts)],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
