"""One transfer in a process of its own, to be killed or measured: python -m tests.adapters.oci_client push|pull URL SPOOL FILE [DIGEST]

Prints the digest and its greatest memory in MB.
"""

import logging
import resource
import sys
from pathlib import Path

from streamlearn.adapters.oci_registry import OciRegistry
from streamlearn.contract.config_snapshots import SnapshotsConfig

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    act, url, spool, file, *digest = sys.argv[1:]
    registry = OciRegistry(SnapshotsConfig(registry=url, plain_http=True, chunk_bytes=2**22), Path(spool))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if act == "push":
        digest = [registry.put_file(Path(file), "a/b").digest]
    else:
        registry.copy_blob(digest[0], Path(file))
    print(digest[0], before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
