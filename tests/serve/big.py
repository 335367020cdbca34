"""The role in a process of its own, to be measured: python -m tests.serve.big LAYOUT

Serves until a line comes in; prints its port, and at the end its greatest memory in MB before and after.
"""

import resource
import sys
from pathlib import Path

from streamlearn.contract.registry import OciLayout
from tests.serve.serving import serving

if __name__ == "__main__":
    with serving(OciLayout(Path(sys.argv[1]))) as served:
        served.ask("/v2/")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(served.host, flush=True)
        sys.stdin.readline()
        print(before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)
