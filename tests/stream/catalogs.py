"""The catalog's reading half in memory: rows that a test or a benchmark adds, rewrites and ends, with the samples that each one holds."""

from dataclasses import replace

from streamlearn.contract.catalog import EXPIRED, LIVE, REPLACED, TAKEN_DOWN, Changes, ShardRow


class MemoryCatalog:
    """As the Delta table keeps them; `samples` says which sample, (partition, offset), lies where in which shard."""

    def __init__(self):
        self.version, self.ends, self.rows, self.changed, self.samples = -1, {}, {}, {}, {}

    def add(self, samples, partition=0, skip=0):
        first = self.ends.get(partition, 0) + skip
        end = self.ends[partition] = first + max(1, samples)
        self.version += 1
        key = f"shards/{partition}/{first}.tar"
        self.samples[key] = [(partition, o) for o in range(first, first + samples)]
        self._put(self._row(key, partition, first, end, committed=self.version))

    def expire(self, key):
        self.version += 1
        self._put(replace(self.rows[key], status=EXPIRED))

    def takedown(self, sample):
        """The shard that holds it is rewritten without it."""
        key = next(k for k, row in self.rows.items() if row.status == LIVE and sample in self.samples[k])
        self._rewrite([key], TAKEN_DOWN, {sample})

    def merge(self, keys):
        """Neighbours of one partition become one shard."""
        self._rewrite(keys, REPLACED, set())

    def live(self, partition=None):
        found = [r for r in self.rows.values() if r.status == LIVE and partition in (None, r.partition)]
        return [r.key for r in sorted(found, key=lambda r: (r.partition, r.first_offset))]

    def alive(self):
        return {s for key in self.live() for s in self.samples[key]}

    def changes(self, after):
        order = sorted(self.rows.values(), key=lambda r: (r.committed, r.place, r.first_offset, self.changed[r.key], r.key))
        new = [r for r in order if self.changed[r.key] > after]
        return Changes(self.version, [r for r in new if r.status == LIVE], [r for r in new if r.status != LIVE])

    def _rewrite(self, keys, status, gone):
        self.version += 1
        old = [self.rows[k] for k in keys]
        name = f"shards/{old[0].partition}/{old[0].first_offset}-v{self.version}.tar"
        self.samples[name] = [s for k in keys for s in self.samples[k] if s not in gone]
        for row in old:
            removed = [i for i, s in enumerate(self.samples[row.key]) if s in gone]
            self._put(replace(row, status=status, removed=",".join(map(str, removed))))
        first = min(old, key=lambda r: (r.committed, r.place))
        new = self._row(name, old[0].partition, old[0].first_offset, old[-1].end_offset, committed=first.committed, replaces=",".join(keys))
        self._put(replace(new, place=first.place))

    def _row(self, key, partition, first, end, **more):
        return ShardRow(
            key=key, sha256="0" * 64, bytes=1, num_samples=len(self.samples[key]), topic="candidates", partition=partition,
            first_offset=first, end_offset=end, first_fetched_at="", last_fetched_at="", day="2026-11-21", **more,
        )  # fmt: skip

    def _put(self, row):
        self.rows[row.key], self.changed[row.key] = row, self.version
