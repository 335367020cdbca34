"""Write the secrets of docker-compose.yml, random, each into a file of its own; what is there already stays.

The folder is open to its owner only, so nobody else on the host gets at the files; the files themselves can be read by the users inside the
containers that they are mounted into, which is why they are 0644 there.
"""

import base64
import ctypes
import ctypes.util
import json
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"
USER = "streamlearn"
BCRYPT64 = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
)


def bcrypt(password: str) -> str:
    """As registries want it in htpasswd files.  Raises OSError where the system's libcrypt cannot."""
    library = ctypes.CDLL(ctypes.util.find_library("crypt") or "libcrypt.so.1")
    library.crypt.restype, library.crypt.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_char_p]
    salt = b"$2b$10$" + base64.b64encode(secrets.token_bytes(16)).translate(BCRYPT64)[:22]
    hashed: bytes | None = library.crypt(password.encode(), salt)
    if hashed is None or not hashed.startswith(b"$2b$"):
        raise OSError("this system's libcrypt has no bcrypt; write ops/docker/secrets/registry_htpasswd with `htpasswd -Bbn`")
    return hashed.decode()


def identities(key: str, secret: str) -> str:
    """SeaweedFS' own form: one identity, which may do all in the bucket and make it."""
    credentials = [{"accessKey": key, "secretKey": secret}]
    return json.dumps({"identities": [{"name": USER, "credentials": credentials, "actions": ["Admin"]}]}, indent=1)


def contents() -> dict[str, dict[str, str]]:
    """What belongs together is written together: group -> file -> text."""
    key, secret, password = secrets.token_hex(10), secrets.token_urlsafe(30), secrets.token_urlsafe(24)
    return {
        "s3": {
            "s3_identities.json": identities(key, secret),
            "s3_credentials": f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n",
        },
        "registry": {"registry_password": password + "\n", "registry_htpasswd": f"{USER}:{bcrypt(password)}\n"},
        "serve": {"serve_tokens": f"reader {secrets.token_urlsafe(32)}\n"},
        "grafana": {"grafana_admin_password": secrets.token_urlsafe(24) + "\n"},
    }


def write(folder: Path = FOLDER) -> list[str]:
    """The groups that were written."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    written = []
    for group, files in contents().items():
        if all((folder / name).exists() for name in files):
            continue
        written.append(group)
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o644)
    return written


if __name__ == "__main__":
    made = write()
    sys.stdout.write(f"{FOLDER}: {'wrote ' + ', '.join(made) if made else 'nothing to do'}\n")
