"""The exact commands that pull a snapshot, for the page."""

import html
from urllib.parse import urlsplit

from aiohttp import web

from streamlearn.contract.config_serve import HOST, ServeConfig


def base(request: web.Request, config: ServeConfig) -> str:
    """How others reach this server: as the configuration says, else as this request did."""
    if config.url:
        return config.url
    host = request.headers.get("Host", "")
    return f"http://{host if HOST.fullmatch(host) else f'{config.address}:{config.port}'}"


def commands(url: str, repository: str, tag: str, *, private: bool, in_timm: bool) -> str:
    """HTML.  `tag`: a tag or a digest."""
    plain, host = url.startswith("http://"), urlsplit(url).netloc
    at = f"{host}/{repository}{'@' if tag.startswith('sha256:') else ':'}{tag}"
    revision = tag[7:47] if tag.startswith("sha256:") else tag
    hub = f"HF_ENDPOINT={url}" + (" HF_TOKEN=$TOKEN" if private else "")
    ours = ("STREAMLEARN__SNAPSHOTS__PLAIN_HTTP=true " if plain else "") + (
        "STREAMLEARN__SNAPSHOTS__USERNAME=me STREAMLEARN_REGISTRY_PASSWORD=$TOKEN " if private else ""
    )
    found = [
        (
            "streamlearn",
            f"{ours}streamlearn snapshots pull {tag} ./model \\\n  --registry oci://{host}/{repository}",
        ),
        (
            "skopeo",
            (f"skopeo login{' --tls-verify=false' if plain else ''} -u me -p $TOKEN {host}\n" if private else "")
            + f"skopeo copy{' --src-tls-verify=false' if plain else ''} docker://{at} \\\n  oci:./model-layout:{revision}",
        ),
        (
            "oras",
            (f"oras login{' --plain-http' if plain else ''} -u me -p $TOKEN {host}\n" if private else "")
            + f"oras pull{' --plain-http' if plain else ''} {at} -o ./model",
        ),
        (
            "huggingface_hub",
            f"{hub} python -c '\nfrom huggingface_hub import snapshot_download\n"
            f'print(snapshot_download("{repository}", revision="{revision}"))\'',
        ),
    ]
    if in_timm:
        call = f'timm.create_model("hf-hub:{repository}@{revision}", pretrained=True)'
        found.append(("timm", f"{hub} python -c '\nimport timm\nmodel = {call}'"))
    return "".join(f"<p class=to>{name}</p><pre>{html.escape(text)}</pre>" for name, text in found)
