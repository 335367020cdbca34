"""A clock that can be set back under running processes, without touching the machine's: for the chaos drill (bench/chaos.py).

A shim that the roles load before libc (LD_PRELOAD) adds an offset to what they ask of the wall clock; the offset lies in a file of eight bytes
that all of them have mapped, so all see it at once.  The monotonic clock and all sleeps stay true, as when a real clock is set.  libfaketime
0.9.10 cannot do that: with its monotonic clock left alone every `time.sleep` fails (EINVAL), and otherwise that clock steps as well.
"""

import os
import shutil
import struct
import subprocess
from pathlib import Path

VARIABLE = "STREAMLEARN_CHAOS_CLOCK"
SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long *offset;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("STREAMLEARN_CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) offset = mapped;
    close(file);
}

int clock_gettime(clockid_t id, struct timespec *found) {
    int failed = (int)syscall(SYS_clock_gettime, id, found);
    if (!failed && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) found->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    found->tv_sec = now.tv_sec;
    found->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """The wall clock of the processes that are started with `environment()`."""

    def __init__(self, folder: Path):
        self.path, self.library = folder / "clock", folder / "clock.so"
        self.path.write_bytes(struct.pack("q", 0))
        self.lacks = self._built()

    def _built(self) -> str:
        """Why there is no shim; empty: there is one."""
        compiler = shutil.which("cc")
        if compiler is None:
            return "no C compiler"
        argv = [compiler, "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(self.library)]
        done = subprocess.run(argv, input=SOURCE, capture_output=True, text=True, check=False)
        return done.stderr.strip() if done.returncode else ""

    def environment(self) -> dict[str, str]:
        return {} if self.lacks else {"LD_PRELOAD": str(self.library), VARIABLE: str(self.path)}

    def step(self, seconds: int) -> None:
        """So far from the truth from now on; in place, for the file is mapped."""
        with self.path.open("r+b") as f:
            os.pwrite(f.fileno(), struct.pack("q", seconds), 0)
