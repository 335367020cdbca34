"""Copying a snapshot, with all that refers to it, from one registry to another; every digest stays what it is.

  1. blobs       those that the target lacks, verified on the way
  2. manifest    untagged
  3. referrers   the same for each: measurements, signatures
  4. tag                                                       <- THE COMMIT POINT

Killed before 4 the target has content that no tag names; copying again sends only what is lacking.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from streamlearn.contract.oci import EMPTY, parts
from streamlearn.contract.registry import ANY, Descriptor, Registry


def copy(
    source: Registry, target: Registry, reference: str, tag: str, *, expect: str = ANY, told: Callable[[str], object] = lambda _: None
) -> Descriptor:
    """`told` hears of each blob that is sent.  Raises as the registries do; Conflict where `tag` is not where `expect` says."""
    with tempfile.TemporaryDirectory(prefix="streamlearn-copy-") as scratch:
        known = _manifest(source, target, reference, Path(scratch) / "blob", told)
        todo, seen = [known.digest], {known.digest}
        while todo:
            for referrer in source.referrers(todo.pop()):
                if referrer.digest not in seen:  # they may be referred to themselves
                    _manifest(source, target, referrer.digest, Path(scratch) / "blob", told)
                    seen.add(referrer.digest)
                    todo.append(referrer.digest)
    target.tag(known.digest, tag, expect=expect)
    return known


def _manifest(source: Registry, target: Registry, reference: str, scratch: Path, told: Callable[[str], object]) -> Descriptor:
    known, manifest = source.manifest(reference)
    for digest in parts(manifest):
        if not target.has_blob(digest):
            source.copy_blob(digest, scratch)
            target.put_file(scratch, EMPTY)
            told(digest)
    return target.put_manifest(source.read_manifest(known.digest)[1])
