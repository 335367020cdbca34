"""The crash benchmark in its short form: it must find nothing, and it must have crashed what it set out to crash."""

import pytest

from bench import crash, crash_worker


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_crashed_at_random_on_kafka_and_s3_every_offset_ends_once(tmp_path):
    result = crash.run(tmp_path, 400, 16, seed=1, log="kafka", store="s3", limit_s=300)
    table = "\n".join(f"{name:30} {value}" for name, value in result.table)
    assert result.settled and result.audit.said == [], "\n".join([table, *result.audit.said])
    assert result.deaths >= 15 and result.crashes.total() >= 3, table
    assert {name.split(",")[0] for name in result.crashes} <= set(crash_worker.STEPS)
    assert result.audit.wanted > 400 and result.audit.stored > 350, table


@pytest.mark.slow
def test_crashed_at_random_on_one_machine_every_offset_ends_once(tmp_path):
    result = crash.run(tmp_path, 400, 20, seed=1, log="sqlite", store="folder", limit_s=200)
    assert result.settled and result.audit.said == [], result.table
    assert result.deaths >= 20 and result.crashes.total() >= 5, result.table
