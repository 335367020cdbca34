"""A store seen through another: what is written goes on top, and the one beneath is only ever read.  A branch of a run learns from the trunk's shards."""

from pathlib import Path

from streamlearn.contract.errors import NotFound
from streamlearn.contract.object_store import ObjectStore


class OverlayStore:
    """`top` wins where both hold a key.  What only `beneath` holds cannot be deleted."""

    def __init__(self, top: ObjectStore, beneath: ObjectStore):
        self.top, self.beneath = top, beneath

    def put(self, key: str, data: bytes) -> None:
        self.top.put(key, data)

    def put_file(self, key: str, path: Path) -> None:
        self.top.put_file(key, path)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            self.beneath.size(key)
        except NotFound:
            return self.top.put_if_absent(key, data)
        return False

    def get(self, key: str) -> bytes:
        try:
            return self.top.get(key)
        except NotFound:
            return self.beneath.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            return self.top.get_range(key, start, length)
        except NotFound:
            return self.beneath.get_range(key, start, length)

    def get_file(self, key: str, path: Path) -> None:
        try:
            self.top.get_file(key, path)
        except NotFound:
            self.beneath.get_file(key, path)

    def size(self, key: str) -> int:
        try:
            return self.top.size(key)
        except NotFound:
            return self.beneath.size(key)

    def modified(self, key: str) -> float:
        try:
            return self.top.modified(key)
        except NotFound:
            return self.beneath.modified(key)

    def list(self, prefix: str) -> list[str]:
        return sorted({*self.top.list(prefix), *self.beneath.list(prefix)})

    def delete(self, key: str) -> None:
        self.top.delete(key)
