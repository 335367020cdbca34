"""For bench.registry: a wire to a registry that counts what passes and stops where it is told."""

import contextlib
import socket
import threading
import time

from tests.adapters.oci import Choke


class Wire(Choke):
    """Passes everything on, both ways; `passed` counts; after the told number of bytes it holds everything still and sets `choked`."""

    def __init__(self, host: str):
        name, port = host.split(":")
        super().__init__((name, int(port)))
        self.passed, self.limit, self.lock = 0, -1, threading.Lock()

    def __enter__(self) -> "Wire":
        super().__enter__()
        return self

    def stop_after(self, count: int) -> None:
        """From now on; -1: never."""
        with self.lock:
            self.limit = -1 if count < 0 else self.passed + count
            self.choked.clear()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int) -> None:
        del limit  # it is of the whole wire here
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                room = self._room(len(data))
                target.sendall(data[:room])
                if room < len(data):
                    while self.choked.is_set():  # the client is about to be killed
                        time.sleep(0.05)
                    break
        for s in (source, target):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def _room(self, wanted: int) -> int:
        """How many of them may pass."""
        with self.lock:
            room = wanted if self.limit < 0 else min(wanted, self.limit - self.passed)
            self.passed += room
            if room < wanted:
                self.choked.set()
        return room
