"""What a snapshot is called in a registry: media types, annotations, tags.  Without torch, for whoever only looks or copies."""

MODEL = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHTS, SETTINGS, DOC = (f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc"))
TITLE, FILEPATH, FILE_META = "org.opencontainers.image.title", "org.cncf.model.filepath", "org.cncf.model.file.metadata+json"
LINEAGE = "org.streamlearn."
EPOCH = "1970-01-01T00:00:00Z"  # of a snapshot that has learnt nothing
KINDS = {"model.safetensors": WEIGHTS, "config.json": SETTINGS, "metrics.json": DOC, "README.md": DOC}


def version(step: int) -> str:
    """The immutable tag of a step."""
    return f"0.{step}.0"
