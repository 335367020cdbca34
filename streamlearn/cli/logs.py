"""A role's log as JSON, an object a line, for whoever collects it: at, level, logger, role, message, and the ids that a line is about.

From candidate to step the ids are: `shard` with its topic, partition and offsets (the fetcher, once a shard), `round` and its `shards` (the learner, once a
round).  So `jq 'select(.shard == KEY or (.shards // [] | index(KEY)))'` finds the life of a shard; of one image `streamlearn trace` tells it.
"""

import json
import logging
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    def __init__(self, role: str):
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "role": self.role, "message": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "ids", {}), ensure_ascii=False, default=str)
