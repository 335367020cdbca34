#!/bin/sh
# Every topic of docs/kafka-s3.md with its cleanup and retention, once: a topic that exists is left as it is.
#   BROKER host:port   PARTITIONS of each, as log.partitions   RETRIES delays, as fetch.retry_delays_s has   KEEP_MS what is kept where "delete" cleans
set -eu

topic() { # name, settings
  name=$1
  shift
  /opt/kafka/bin/kafka-topics.sh --bootstrap-server "$BROKER" --create --if-not-exists --topic "$name" \
    --partitions "$PARTITIONS" --replication-factor 1 "$@"
}

for name in candidates dead-letters; do topic "$name" --config "retention.ms=$KEEP_MS"; done
i=0
while [ "$i" -lt "$RETRIES" ]; do
  topic "retry.$i" --config "retention.ms=$KEEP_MS"
  i=$((i + 1))
done
topic shards --config retention.ms=3600000
for name in source-state connector-configs takedowns hosts; do topic "$name" --config cleanup.policy=compact; done
