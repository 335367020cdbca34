"""Run by test_frameworks.py in an environment that has timm and transformers and nothing of ours.  Prints what it found, as JSON.

python in_frameworks.py FOLDER      with FOLDER/{timm,vissl}, as exported, and images.pt, features.pt, trunks.json
"""

import json
import sys
from pathlib import Path

import timm
import torch
import transformers
from timm.models.regnet import _filter_fn  # timm's own reading of VISSL's checkpoints


def main(folder: Path) -> dict[str, object]:
    images = torch.load(folder / "images.pt", weights_only=True).to(memory_format=torch.channels_last)
    want = torch.load(folder / "features.pt", weights_only=True)

    def difference(model: torch.nn.Module) -> float:
        model = model.eval().to(memory_format=torch.channels_last)
        out = model(images)
        return float((getattr(out, "pooler_output", out).flatten(1) - want).abs().max())

    with torch.inference_mode():
        model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True)
        wrapped, loading = transformers.AutoModel.from_pretrained(folder / "timm", output_loading_info=True)
        vissl = timm.create_model(model.default_cfg["architecture"], num_classes=0)
        vissl.load_state_dict(_filter_fn(torch.load(folder / "vissl" / "model.torch", weights_only=True)), strict=True)
        found = {"timm": difference(model), "transformers": difference(wrapped), "vissl, as timm reads it": difference(vissl)}
    data = timm.data.resolve_model_data_config(model)
    shapes = {}
    with torch.device("meta"):
        for name in json.loads((folder / "trunks.json").read_text()):
            trunk = timm.create_model(name, num_classes=0)
            shapes[name] = {key: list(tensor.shape) for key, tensor in trunk.state_dict().items()}
    return {
        "difference": found,
        "kind": type(wrapped).__name__,
        "loading": {key: sorted(map(str, value)) for key, value in loading.items()},
        "data": {key: data[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation")},
        "shapes": shapes,
        "versions": {m.__name__: m.__version__ for m in (timm, transformers, torch)},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
