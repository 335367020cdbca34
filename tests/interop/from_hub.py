"""Run by test_frameworks.py, as in_frameworks.py: what timm and transformers load by name from HF_ENDPOINT.

python from_hub.py FOLDER REPOSITORY REVISION      with FOLDER/images.pt and features.pt.  Prints differences, as JSON.
"""

import json
import sys
from pathlib import Path

import timm
import torch
import transformers


def main(folder: Path, repository: str, revision: str) -> dict[str, float]:
    images = torch.load(folder / "images.pt", weights_only=True).to(memory_format=torch.channels_last)
    want = torch.load(folder / "features.pt", weights_only=True)
    name = f"hf-hub:{repository}" + ("" if revision == "main" else f"@{revision}")
    found = {
        "timm": timm.create_model(name, pretrained=True),
        "transformers": transformers.AutoModel.from_pretrained(repository, revision=revision),
    }
    differences = {}
    with torch.inference_mode():
        for key, model in found.items():
            out = model.eval().to(memory_format=torch.channels_last)(images)
            differences[key] = float((getattr(out, "pooler_output", out).flatten(1) - want).abs().max())
    return differences


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
