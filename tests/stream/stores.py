"""A folder store over a road that can be blocked: for all of it, or for some keys."""

import threading
from collections import Counter

from streamlearn.contract.errors import Retryable
from streamlearn.contract.object_store import FolderStore

LIMIT_S = 60.0


class Road(FolderStore):
    def __init__(self, root):
        super().__init__(root)
        self.down = False  # every request fails
        self.stalled = ""  # requests for keys with this in them hang ...
        self.open, self.hanging = threading.Event(), threading.Event()  # ... until the one is set, and set the other
        self.asked = Counter()  # whole downloads begun, by key
        self.failed = threading.Event()

    def size(self, key):
        self._pass(key)
        return super().size(key)

    def get(self, key):
        self._pass(key)
        return super().get(key)

    def put_if_absent(self, key, data):
        self._pass(key)
        return super().put_if_absent(key, data)

    def get_range(self, key, start, length):
        self.asked[key] += start == 0
        self._pass(key)
        if self.stalled and self.stalled in key:
            self.hanging.set()
            assert self.open.wait(LIMIT_S)
        return super().get_range(key, start, length)

    def _pass(self, key):
        if self.down:
            self.failed.set()
            raise Retryable(f"{key}: the store is down", after_s=0.02)
