"""A store that is killed, or full, at a chosen place of the writing of a checkpoint."""

from streamlearn.contract.errors import StoreFull
from streamlearn.contract.object_store import POINTER, FolderStore


class Killed(BaseException):
    """Not an Exception: nothing of ours may survive it, as nothing survives kill -9."""


class DyingStore(FolderStore):
    """Dies before or after the first call of one method on keys of one kind: the end of the key behind its last dot, or `latest`, the pointer."""

    die_at = None  # (method, kind, before | after)
    full = ()  # kinds of keys that find no room

    def _at(self, method, key, when):
        if self.die_at == (method, kind_of(key), when):
            raise Killed

    def put(self, key, data):
        if kind_of(key) in self.full:
            raise StoreFull("no space left", after_s=0.0)
        self._at("put", key, "before")
        super().put(key, data)
        self._at("put", key, "after")

    def delete(self, key):
        self._at("delete", key, "before")
        super().delete(key)
        self._at("delete", key, "after")


def kind_of(key):
    return "latest" if key == POINTER else key.rpartition(".")[2]
