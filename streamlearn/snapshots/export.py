"""A snapshot for other frameworks: one new folder each.

  1. stage    every file, in a hidden folder beside the one asked for
  2. rename   it into place                                                    <- THE COMMIT POINT

Killed before 2, a folder `.<name>.<random>.tmp` lies there that nobody reads.  What is there already is replaced only when asked, and
only if it is an export itself: a folder with any other file in it is never touched.

    timm            model.safetensors, config.json: timm's `local-dir:` and `hf-hub:`, and transformers (TimmWrapper)
    pycls           model.pyth, config.yaml: pycls.core.checkpoint.load_checkpoint into pycls.core.builders.build_model()
    vissl           model.torch: classy_state_dict/base_model/model/trunk, as the public SEER checkpoints; config.yaml: the trunk
    onnx            model.onnx; batch, height and width are free
    torch-export    model.pt2: torch.export.load; the same
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from streamlearn.contract import durable
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import Registry
from streamlearn.learn.backbones.regnet import REGNETY, SE_RATIO, STEMS
from streamlearn.snapshots import keys
from streamlearn.snapshots.artifact import LINEAGE, TITLE, version
from streamlearn.snapshots.card import with_results
from streamlearn.snapshots.package import pretty
from streamlearn.snapshots.publish import results, step_of
from streamlearn.snapshots.trunk import filled, in_pycls, norm_of, read_settings, read_weights

CARRIED = ("metrics.json", "README.md")  # of every export
FILES = {
    *CARRIED,
    "config.json",
    "config.yaml",
    "model.safetensors",
    "model.pyth",
    "model.torch",
    "model.onnx",
    "model.onnx.data",
    "model.pt2",
}
EXTRA = "pip install 'streamlearn[export]'"


@dataclass(frozen=True)
class Source:
    """A snapshot at hand: what every format is made from."""

    settings: Mapping[str, Any]
    weights: Mapping[str, Tensor]  # pycls's names
    where: str  # for complaints

    @property
    def backbone(self) -> str:
        return str(self.settings["streamlearn"]["backbone"])

    @property
    def stem(self) -> str:
        return str(self.settings["streamlearn"]["stem"])

    @property
    def norm(self) -> str:
        return norm_of(self.settings)

    @property
    def size(self) -> int:
        return int(self.settings["pretrained_cfg"]["input_size"][-1])

    def trunk(self) -> nn.Module:
        return filled(self.settings, self.weights, self.where).eval()


@dataclass(frozen=True)
class Format:
    """One kind of export."""

    write: Callable[[Source, Path, int], None]  # source, folder, classes
    library: str  # as Hugging Face calls it
    loading: str  # how to load it, a shell-safe line of Python for each line; {folder} is where it lies


def export(
    registry: Registry, reference: str, folder: Path | None, to: str, *, force: bool = False, classes: int = 1000
) -> tuple[Path, str]:
    """(the folder, how to load what lies there).  `folder` None: `<name>-<version>-<to>`, here.

    Raises ConfigError where the format cannot hold the model or the folder is taken, NotFound, Corrupt.
    """
    descriptor, manifest = registry.manifest(reference)
    marks = manifest.get("annotations", {})
    tag = version(step_of(registry, descriptor.digest))
    folder = folder or Path(f"{marks.get(LINEAGE + 'name', 'snapshot')}-{tag}-{to}")
    free(folder, force)
    blobs = {layer["annotations"][TITLE]: layer["digest"] for layer in manifest["layers"]}
    staged = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.tmp")
    staged.mkdir(parents=True)
    pulled = staged / ".pulled"  # read from, and gone before the folder is seen
    try:
        settings = read_settings(registry.read_blob(blobs["config.json"]), reference)
        registry.copy_blob(blobs["model.safetensors"], pulled)
        source = Source(settings, in_pycls(read_weights(pulled)), reference)
        FORMATS[to].write(source, staged, classes)
        pulled.unlink()
        registry.copy_blob(blobs["metrics.json"], staged / "metrics.json")
        library, loading = FORMATS[to].library, FORMATS[to].loading
        told = with_results(
            registry.read_blob(blobs["README.md"]).decode(),
            results(registry, descriptor.digest),
            tag,
            library=library,
            loading=f"```python\n{loading.format(folder='.', size=source.size)}\n```",
        )
        (staged / "README.md").write_text(told, encoding="utf-8")
        for path in staged.iterdir():
            path.chmod(0o644)  # whatever the umask: other users load it too
        durable.publish_folder(staged, folder, replace=force)
    except FileExistsError:
        raise _taken(folder) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder, loading.format(folder=folder, size=source.size)


def free(folder: Path, force: bool) -> None:
    """Raises ConfigError unless `folder` may be written."""
    if not (folder.exists() or folder.is_symlink()):
        return
    if not force:
        raise _taken(folder)
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder of its own; --force replaces only an export; name another folder")
    others = sorted(p.name for p in folder.iterdir() if p.name not in FILES or not p.is_file())
    if others:
        raise ConfigError(
            f"{folder}: holds {', '.join(others[:3])}, which no export writes; --force replaces only an export; name another folder"
        )


def _taken(folder: Path) -> ConfigError:
    return ConfigError(f"{folder}: exists already; name another folder, or replace it with --force")


def _known_elsewhere(source: Source, to: str) -> None:
    """Raises ConfigError where the names would be right and the network another: nobody else standardises these weights."""
    if source.norm != "bn":
        raise ConfigError(
            f"--to {to}: {source.where} has model.norm = {source.norm!r} (GroupNorm, standardised weights), and {to} has no such RegNet: it would "
            "compute something else from these weights, or refuse them; --to onnx or torch-export can hold it"
        )


def _timm(source: Source, folder: Path, classes: int) -> None:
    _known_elsewhere(source, "timm")
    architecture = keys.timm_architecture(source.backbone, source.stem)
    if not architecture:
        why = f"no {source.backbone}" if source.backbone not in keys.TIMM else f"no {source.stem} stem (its own has a stride of 2)"
        raise ConfigError(f"--to timm: timm has {why}, so it cannot load {source.where}; --to pycls, onnx or torch-export can hold it")
    named = {keys.to_timm(name): weight for name, weight in source.weights.items()}
    settings = json.loads(json.dumps(source.settings))
    settings["architecture"], settings["streamlearn"]["keys"] = architecture, "timm"
    _save(named, folder / "model.safetensors")
    (folder / "config.json").write_bytes(pretty(settings))


def _pycls(source: Source, folder: Path, classes: int) -> None:
    """load_checkpoint is strict, so the file has a classifier too: zeros, which says nothing and can be trained."""
    _known_elsewhere(source, "pycls")
    stages = REGNETY[source.backbone]
    weights = {
        name: weight.clone() for name, weight in source.weights.items()
    }  # not views of one mapped file, which torch.save keeps whole
    weights["head.fc.weight"] = torch.zeros(classes, stages.widths[-1])
    weights["head.fc.bias"] = torch.zeros(classes)
    anynet = {
        "STEM_TYPE": STEMS[source.stem],
        "STEM_W": stages.stem_width,
        "BLOCK_TYPE": "res_bottleneck_block",
        "DEPTHS": list(stages.depths),
        "WIDTHS": list(stages.widths),
        "STRIDES": list(stages.strides),
        "BOT_MULS": [1.0] * len(stages.depths),
        "GROUP_WS": list(stages.group_widths),
        "SE_ON": True,
        "SE_R": SE_RATIO,
    }
    config = pretty({"MODEL": {"TYPE": "anynet", "NUM_CLASSES": classes}, "ANYNET": anynet}).decode()  # JSON is YAML
    torch.save({"epoch": 0, "model_state": weights, "optimizer_state": {}, "cfg": config}, folder / "model.pyth")
    (folder / "config.yaml").write_text(config)


def _vissl(source: Source, folder: Path, classes: int) -> None:
    _known_elsewhere(source, "vissl")
    stages = REGNETY[source.backbone]
    regnet = {
        "name": "anynet",
        "stem_type": STEMS[source.stem],
        "stem_width": stages.stem_width,
        "depths": list(stages.depths),
        "widths": list(stages.widths),
        "strides": list(stages.strides),
        "bottleneck_multipliers": [1.0] * len(stages.depths),
        "group_widths": list(stages.group_widths),
        "se_ratio": SE_RATIO,
    }
    (folder / "config.yaml").write_bytes(pretty({"config": {"MODEL": {"TRUNK": {"NAME": "regnet", "REGNET": regnet}}}}))
    trunk = {keys.to_vissl(name): weight.clone() for name, weight in source.weights.items()}
    state = {"base_model": {"model": {"trunk": trunk, "heads": {}}}}
    torch.save({"type": "consolidated", "classy_state_dict": state}, folder / "model.torch")


def _onnx(source: Source, folder: Path, classes: int) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as e:
        raise ConfigError(f"--to onnx: the package {e.name} is not installed: {EXTRA}") from e
    path = folder / "model.onnx"
    program = torch.onnx.export(_program(source), input_names=["images"], output_names=["features"], dynamo=True, verbose=False)
    assert program is not None  # None only for the old exporter
    program.save(path, external_data=sum(w.nbytes for w in source.weights.values()) > 2**30)  # one protobuf holds 2 GiB at most
    model = onnx.load(path, load_external_data=False)
    (images,), (features,) = model.graph.input, model.graph.output
    names = {d.dim_param: name for d, name in zip(images.type.tensor_type.shape.dim, ("batch", "", "height", "width"), strict=True) if name}
    for value in (images, features):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names[dim.dim_param]
    del model.graph.value_info[:]  # shapes of what is between, under the old names; every reader infers them
    onnx.save(model, path)
    onnx.checker.check_model(path)


def _torch_export(source: Source, folder: Path, classes: int) -> None:
    torch.export.save(_program(source), folder / "model.pt2")


def _program(source: Source) -> torch.export.ExportedProgram:
    """The trunk as a graph, whose batch, height and width are free."""
    free_BHW = {0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    example = torch.zeros(2, 3, source.size, source.size)  # two: a batch of one would be taken for a constant
    trunk = source.trunk().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch.export.save doubts other strides
    return torch.export.export(trunk, (example,), dynamic_shapes=(free_BHW,))


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file({name: weights[name].contiguous() for name in sorted(weights)}, path, metadata={"format": "pt"})


FORMATS = {
    "timm": Format(
        _timm,
        "timm",
        'import timm, torch\ntrunk = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        "features = trunk(torch.zeros(1, 3, {size}, {size}))",
    ),
    "vissl": Format(
        _vissl,
        "vissl",
        "# VISSL: config.MODEL.WEIGHTS_INIT.PARAMS_FILE={folder}/model.torch config.MODEL.WEIGHTS_INIT.STATE_DICT_KEY_NAME=classy_state_dict\n"
        'import torch\nstate = torch.load("{folder}/model.torch", weights_only=True)\n'
        'trunk = state["classy_state_dict"]["base_model"]["model"]["trunk"]',
    ),
    "pycls": Format(
        _pycls,
        "pycls",
        "from pycls.core import builders, checkpoint\nfrom pycls.core.config import cfg\n"
        'cfg.merge_from_file("{folder}/config.yaml")\nmodel = builders.build_model()\ncheckpoint.load_checkpoint("{folder}/model.pyth", model)',
    ),
    "onnx": Format(
        _onnx,
        "onnx",
        "import numpy, onnxruntime\n"
        'session = onnxruntime.InferenceSession("{folder}/model.onnx")\n'
        '(features,) = session.run(None, {{"images": numpy.zeros((1, 3, {size}, {size}), "float32")}})',
    ),
    "torch-export": Format(
        _torch_export,
        "pytorch",
        'import torch\ntrunk = torch.export.load("{folder}/model.pt2").module()\nfeatures = trunk(torch.zeros(1, 3, {size}, {size}))',
    ),
}
