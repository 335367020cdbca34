"""Local copies of shards, shared by all learners (ranks) of one host: whole, verified, counted, and gone at once when they must be.

  <sha256>.tar                 a copy, named by its digest once its bytes are verified
  .book                        locked while names change; says how many bytes there are, and how much of the catalog was heeded
  .ranks/<id>/alive            locked by a rank as long as it lives
  .ranks/<id>/<sha256>.tar     another name of a copy: this rank reads it, so it is not evicted
  .ranks/<id>/<sha256>.part    this rank downloads it; as large as the whole from the start

A shard is downloaded once a host:

  1. claim     under the lock: neither a copy nor a living rank's part is there; room is made; the part is made, with its whole size
  2. download  into the part, hashed on the way; purged meanwhile, the part has no name any more, and is given up
  3. publish   under the lock: the part still has its name; it becomes the rank's own copy, then <sha256>.tar       <- THE COMMIT POINT
  4. drop      under the lock: the rank's own name, when no batch needs it any more

Killed after     what is left                               who mends it
  1, 2           a folder whose `alive` nobody locks        who starts next, or wants the same shard, or needs room: all of it goes
  3              likewise, with other names of whole copies likewise; the copies stay
  4              nothing
  in the lock    a book that is open (`settled` is 0)       who locks it next counts the files

Evicting takes the name of a copy that no rank has another name of, least lately used first (taking and dropping a name sets a file's ctime).
Purging takes all names, whoever has them, and notes in the book how much of the catalog the purger knew: a rank that knew less claims nothing
until it has looked itself, so what was taken down is not fetched back.  A rank that finds its own name gone looks too.

Nothing is synced, for the store has it all.  So what lay there when a rank started is verified before that rank's first use of it; and
an emptied folder, or a lost book, costs downloads.  Only locks of the kernel (flock) are waited for, and they end with their process.
"""

import fcntl
import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from io import FileIO
from pathlib import Path

from streamlearn.contract import durable
from streamlearn.contract.errors import StoreFull

_BOOK = struct.Struct("<QQQ")  # settled, bytes, heeded
SLACK = 16  # what is evicted beyond need, as a share of the budget: then not every download has to look at every file


class Refusal(Enum):
    """Why a download may not begin."""

    HERE = "somebody has published it meanwhile"
    BUSY = "another rank downloads it"
    FULL = "nothing can be evicted for it"
    LEFT = "this rank has been closed"
    STALE = "another rank has heeded a newer catalog: look first"


@dataclass
class Book:
    bytes: int
    heeded: int


class Copies:
    """One rank's view.  For any number of threads."""

    def __init__(self, folder: Path, budget_bytes: int):
        self.folder, self.budget_bytes = folder, budget_bytes
        self.evictions = 0  # by this rank
        self._ranks, self._id = folder / ".ranks", os.urandom(6).hex()
        self._own = self._ranks / self._id
        self._threads = threading.Lock()  # flock knows processes only
        self._book: FileIO | None = None
        self._alive: FileIO | None = None
        self._left = False
        self._doubtful = set[str]()  # digests of copies that are not verified yet

    @property
    def bytes(self) -> int:
        """Of all copies and parts, whosever they are."""
        if not self.folder.exists():
            return 0
        with self._locked(join=False) as book:
            return book.bytes

    def noted(self) -> int:
        """How much of the catalog the best informed rank has heeded; at any time, without the lock."""
        try:
            raw = (self.folder / ".book").read_bytes()
        except FileNotFoundError:
            return 0
        return int(_BOOK.unpack(raw)[2]) if len(raw) == _BOOK.size else 0

    def has(self, sha256: str) -> bool:
        """Whether there is a copy, as far as can be said without the lock."""
        return (self.folder / f"{sha256}.tar").exists()

    def take(self, sha256: str) -> Path | None:
        """This rank's own name of a copy; None if there is none."""
        own = self._own / f"{sha256}.tar"
        with self._locked():
            if self._left:
                return None
            if not own.exists():
                try:
                    own.hardlink_to(self.folder / own.name)
                except FileNotFoundError:
                    return None
                except OSError as e:
                    raise durable.translate(e, own) from e
        return own

    def sound(self, sha256: str, path: Path) -> bool:
        """Whether a copy that was taken holds what its name says; read once if it lay there before this rank came."""
        if sha256 in self._doubtful:
            try:
                with path.open("rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                        return False
            except FileNotFoundError:
                return False  # purged just now
            self._doubtful.discard(sha256)
        return True

    def claim(self, sha256: str, size: int, near: Mapping[str, int], *, heeded: int, force: bool) -> Path | Refusal:
        """The part to download into, of `size` zeros.  Raises StoreFull where the disk, not the budget, has no room.

        `near`: how soon this rank needs which digests, 0 soonest; nothing is evicted for what is needed later.  `heeded`: the version of the
        catalog that this rank has heeded.  `force`: over the budget rather than not at all.
        """
        with self._locked() as book:
            if self._left:
                return Refusal.LEFT
            if book.heeded > heeded:
                return Refusal.STALE
            if (self.folder / f"{sha256}.tar").exists():
                return Refusal.HERE
            if self._others_download(sha256, book):
                return Refusal.BUSY
            self._shrink(book, self.budget_bytes - size, sha256, near)
            if book.bytes + size > self.budget_bytes and not force:
                return Refusal.FULL
            part, before = self._own / f"{sha256}.part", book.bytes
            try:
                _reserve(part, size)
            except StoreFull:
                self._shrink(book, before - size, sha256, near)
                if book.bytes == before:
                    raise
                _reserve(part, size)
            book.bytes += size
            return part

    def publish(self, sha256: str) -> Path | None:
        """This rank's own name of what it has downloaded and verified; None if it was purged meanwhile."""
        part, own = self._own / f"{sha256}.part", self._own / f"{sha256}.tar"
        if not part.exists():
            return None
        with self._locked(join=False):
            try:
                own.unlink(missing_ok=True)  # of a try that the disk had no room for
                own.hardlink_to(part)
                part.replace(self.folder / own.name)
            except FileNotFoundError:
                return None
            except OSError as e:
                raise durable.translate(e, own) from e
            self._doubtful.discard(sha256)
        return own

    def abandon(self, sha256: str) -> None:
        """Give up a download, if it is not published."""
        part = self._own / f"{sha256}.part"
        if part.exists():
            with self._locked(join=False) as book:
                book.bytes -= _unlink(part)

    def drop(self, digests: Collection[str]) -> None:
        """This rank reads them no more."""
        with self._locked(join=False):
            for sha256 in digests:
                (self._own / f"{sha256}.tar").unlink(missing_ok=True)

    def discard(self, sha256: str) -> None:
        """A copy whose bytes are wrong.  Other ranks keep what they have taken."""
        with self._locked(join=False) as book:
            for path in (self._own / f"{sha256}.tar", self.folder / f"{sha256}.tar"):
                path.unlink(missing_ok=True)
            book.bytes = self._count()
        self._doubtful.discard(sha256)

    def purge(self, digests: Collection[str], version: int) -> None:
        """Take all names of the copies of shards that have ended, as of a version of the catalog, and of those that are being downloaded."""
        if not self.folder.exists():
            return
        with self._locked(join=False) as book:
            if version > book.heeded:
                book.heeded = version
                self._write(0, book)
            gone = set(digests)
            for path in self._files():
                if path.stem in gone:
                    path.unlink(missing_ok=True)
            book.bytes = self._count()

    def close(self) -> None:
        """Leave, for good: nothing is in use by this rank any more, and a thread of it that is still at work begins with nothing new."""
        with self._threads:
            self._left = True
            for file in (self._alive, self._book):
                if file is not None:
                    file.close()
            self._alive = self._book = None
        if self.folder.exists():
            with self._locked(join=False) as book:
                self._bury(book)
            with self._threads:
                assert self._book is not None
                self._book.close()
                self._book = None

    # -- under the lock ------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, *, join: bool = True) -> Iterator[Book]:
        """The book, open while names change.  Left by an exception it stays open: the next one counts."""
        with self._threads:
            file = self._enter()
            try:
                raw = os.pread(file.fileno(), _BOOK.size, 0)
                settled, size, heeded = _BOOK.unpack(raw) if len(raw) == _BOOK.size else (0, 0, 0)
                book = Book(size if settled else self._count(), heeded)
                self._write(0, book)
                if join and not self._left and (self._alive is None or not os.fstat(self._alive.fileno()).st_nlink):
                    self._join(book)
                yield book
                self._write(1, book)
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _enter(self) -> FileIO:
        try:
            while True:
                if self._book is None:
                    self._ranks.mkdir(parents=True, exist_ok=True)
                    self._book = FileIO(os.open(self.folder / ".book", os.O_RDWR | os.O_CREAT, 0o644), "r+")
                fcntl.flock(self._book, fcntl.LOCK_EX)
                if os.fstat(self._book.fileno()).st_nlink and self._ranks.exists():
                    return self._book
                self._book.close()  # somebody emptied the folder: this book is of no library
                self._book = None
        except OSError as e:
            raise durable.translate(e, self.folder) from e

    def _write(self, settled: int, book: Book) -> None:
        assert self._book is not None
        try:
            os.pwrite(self._book.fileno(), _BOOK.pack(settled, max(0, book.bytes), book.heeded), 0)
        except OSError as e:
            if not isinstance(durable.translate(e, self.folder), StoreFull):
                raise
            # not even room for a first line: the book stays empty, which is open

    def _join(self, book: Book) -> None:
        """Be a rank, from now on; what is there was made by others."""
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            self._alive = FileIO(os.open(self._own / "alive", os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except OSError as e:
            raise durable.translate(e, self._own) from e
        fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._bury(book)
        self._doubtful = {path.stem for path in self.folder.glob("*.tar")}

    def _bury(self, book: Book) -> bool:
        """Clear up after ranks that died; whether there were any."""
        dead = [rank for rank in self._ranks.iterdir() if not (rank == self._own and self._alive) and not _lives(rank)]
        for rank in dead:
            with suppress(FileNotFoundError):
                shutil.rmtree(rank)
        if dead:
            book.bytes = self._count()
        return bool(dead)

    def _others_download(self, sha256: str, book: Book) -> bool:
        while any(self._ranks.glob(f"*/{sha256}.part")):
            if not self._bury(book):
                return True
        return False

    def _shrink(self, book: Book, size: int, sha256: str, near: Mapping[str, int]) -> None:
        """Evict until so many bytes are left, or nothing more of what nobody uses and this rank does not need before `sha256`."""
        if book.bytes > size:
            self._bury(book)  # the dead use nothing
        if book.bytes <= size:
            return
        found, never = list[tuple[int, int, int, Path]](), len(near) + 1
        for path in self.folder.glob("*.tar"):
            at, needed = path.stat(), near.get(path.stem, never)
            if at.st_nlink == 1 and needed > near.get(sha256, 0):
                found.append((-needed, at.st_ctime_ns, at.st_size, path))
        for needed, _, freed, path in sorted(found):
            if book.bytes <= size - (self.budget_bytes // SLACK if needed == -never else 0):
                break
            path.unlink()
            book.bytes -= freed
            self.evictions += 1

    def _files(self) -> Iterator[Path]:
        for pattern in ("*.tar", ".ranks/*/*.tar", ".ranks/*/*.part"):
            yield from list(self.folder.glob(pattern))

    def _count(self) -> int:
        """Bytes of all files, each once."""
        found = dict[int, int]()
        for path in self._files():
            with suppress(FileNotFoundError):  # somebody empties the folder
                at = path.stat()
                found[at.st_ino] = at.st_size
        return sum(found.values())


def _lives(rank: Path) -> bool:
    try:
        with FileIO(os.open(rank / "alive", os.O_RDWR), "r+") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False  # killed before it could lock it, or half cleared up
    except BlockingIOError:
        return True
    return False


def _reserve(part: Path, size: int) -> None:
    """A file with room on the disk for all its bytes.  Raises StoreFull, and leaves none."""
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if size:
                os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise durable.translate(e, part) from e


def _unlink(path: Path) -> int:
    """Bytes that had only this name."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
