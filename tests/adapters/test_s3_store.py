"""S3 at its worst: busy, cut off before and after the deed, stalled, half an answer.  The suite of all stores is tests/contract's."""

import base64
import hashlib
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.errors import ConfigError, NotFound, Retryable, StoreFull
from tests.adapters.faultproxy import Fault
from tests.conftest import REPO
from tests.contract.test_durable import tiny_disk  # noqa: F401  a fixture

MIB = 2**20
PART = 5 * MIB  # the smallest S3 takes
ALWAYS = 999
DATA = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """The SDK's pauses between tries, up to a second each, are no part of what is tested."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.fixture
def behind(bucket):
    """A store behind a proxy with these faults."""
    with ExitStack() as proxies:

        def make(*faults, **config):
            proxy = proxies.enter_context(bucket.behind_faults(*faults))
            return S3Store(bucket.config(endpoint_url=proxy.url, **config)), proxy

        yield make


@pytest.fixture
def store(bucket):
    return S3Store(bucket.config())


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


@pytest.fixture
def big(tmp_path):
    """Two whole parts and a bit."""
    path = tmp_path / "big"
    path.write_bytes(b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(2 * PART // 32)) + b"the end")
    return path


def uploads(bucket):
    return bucket.client().list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])


# --- a fault that passes is not noticed ---

PASSING = [Fault("answer"), Fault("answer", status=500, code="InternalError"), Fault("reset_before"), Fault("reset_after")]


@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f"{f.act} {f.status}")
@pytest.mark.parametrize("put", ["put", "put_file", "put_if_absent"])
def test_one_fault_on_the_way_in_is_survived(behind, store, file, put, fault):
    faulty, proxy = behind(Fault(fault.act, status=fault.status, code=fault.code))
    told = faulty.put_file("k", file) if put == "put_file" else getattr(faulty, put)("k", DATA)
    assert told is (True if put == "put_if_absent" else None) and store.get("k") == DATA
    assert proxy.requests("PUT") == [fault.act, ""]


@pytest.mark.parametrize("fault", [Fault("reset_before"), Fault("reset_after")], ids=lambda f: f.act)
def test_an_unclear_answer_with_no_tries_left_is_cleared_up_by_looking(behind, store, fault):
    """The SDK does not retry here: only the nonce can tell whether the PUT landed."""
    faulty, proxy = behind(Fault(fault.act), attempts=1)
    assert faulty.put_if_absent("k", DATA) is True and store.get("k") == DATA
    assert proxy.requests("PUT") == [fault.act] + ([""] if fault.act == "reset_before" else []) and len(proxy.requests("HEAD")) == 1


@pytest.mark.parametrize("act", ["reset_before", "reset_after"])
def test_a_key_taken_by_another_is_not_ours_however_the_connection_ends(behind, store, act):
    assert store.put_if_absent("k", b"same bytes")
    faulty, _ = behind(Fault(act))
    assert faulty.put_if_absent("k", b"same bytes") is False


def test_two_who_write_at_once_are_told_409_and_look(behind, store):
    faulty, _ = behind(Fault("answer", status=409, code="ConditionalRequestConflict"))
    assert faulty.put_if_absent("k", b"1") is True
    faulty, _ = behind(Fault("answer", status=409, code="ConditionalRequestConflict"))
    assert faulty.put_if_absent("k", b"2") is False and store.get("k") == b"1"


def read_file(store, to):
    store.get_file("k", to)
    return to.read_bytes()


READS = {
    "get": lambda s, to: s.get("k"),
    "get_range": lambda s, to: s.get_range("k", 0, len(DATA)),
    "get_file": read_file,
}
HALVES = [
    Fault("truncate", "GET", keep=1000),
    Fault("unframed", "GET", keep=1000),
    Fault("truncate", "GET", keep=0),
    Fault("hang", "GET", keep=1000),
]


@pytest.mark.parametrize("half", HALVES, ids=lambda f: f"{f.act} {f.keep}")
@pytest.mark.parametrize("read", READS)
def test_half_an_answer_is_read_anew(behind, store, tmp_path, read, half):
    store.put("k", DATA)
    faulty, proxy = behind(Fault(half.act, "GET", keep=half.keep), read_timeout_s=0.5)
    assert READS[read](faulty, tmp_path / "copy") == DATA and proxy.requests("GET") == [half.act, ""]


@pytest.mark.parametrize("half", HALVES, ids=lambda f: f"{f.act} {f.keep}")
@pytest.mark.parametrize("read", READS)
def test_an_answer_that_stays_half_is_never_taken_for_the_whole(behind, store, tmp_path, read, half):
    store.put("k", DATA)
    faulty, proxy = behind(Fault(half.act, "GET", keep=half.keep, times=ALWAYS), read_timeout_s=0.2)
    with pytest.raises(Retryable, match=f"{read} of k at {proxy.url}"):
        READS[read](faulty, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_fails_leaves_the_older_one(behind, store, tmp_path):
    store.put("k", DATA)
    (tmp_path / "copy").write_bytes(b"older")
    faulty, _ = behind(Fault("truncate", "GET", keep=1000, times=ALWAYS))
    with pytest.raises(Retryable):
        faulty.get_file("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


# --- a fault that stays is named, and says when to try again ---

CALLS = {
    "put": lambda s, f: s.put("k", b"1"),
    "put_if_absent": lambda s, f: s.put_if_absent("k", b"1"),
    "put_file": lambda s, f: s.put_file("k", f),
    "get": lambda s, f: s.get("k"),
    "get_range": lambda s, f: s.get_range("k", 0, 1),
    "get_file": lambda s, f: s.get_file("k", f.with_name("copy")),
    "size": lambda s, f: s.size("k"),
    "modified": lambda s, f: s.modified("k"),
    "list": lambda s, f: s.list("k"),
    "delete": lambda s, f: s.delete("k"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("act", ["answer", "reset_before", "stall"])
def test_a_store_that_stays_bad_is_a_fault_that_passes_and_is_named(behind, file, call, act):
    every = [Fault(act, method, times=ALWAYS) for method in ("GET", "PUT", "HEAD", "DELETE")]
    faulty, proxy = behind(*every, attempts=1, read_timeout_s=0.2)
    with pytest.raises(Retryable, match=f"s3://{faulty.config.bucket}/main: .* of k at {proxy.url}") as e:
        CALLS[call](faulty, file)
    assert e.value.after_s > 0 and {*proxy.seen[0][2:]} == {act}


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_is_down_is_a_fault_that_passes_and_is_named(bucket, file, call):
    with socket.socket() as taken:  # bound and not listening: whoever connects is refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Retryable, match=url):
            CALLS[call](S3Store(bucket.config(endpoint_url=url, attempts=1)), file)


def test_the_tries_are_as_many_as_configured(behind):
    faulty, proxy = behind(Fault("answer", times=ALWAYS), attempts=3)
    with pytest.raises(Retryable, match="SlowDown"):
        faulty.put("k", b"1")
    assert len(proxy.requests("PUT")) == 3


def test_a_full_store_says_so(behind):
    for fault in (Fault("answer", status=403, code="QuotaExceeded"), Fault("answer", status=507, code="XMinioStorageFull")):
        with pytest.raises(StoreFull, match="free some space"):
            behind(fault)[0].put("k", b"1")


def test_bytes_damaged_on_the_way_are_sent_again_by_the_caller(behind):
    faulty, _ = behind(Fault("answer", status=400, code="BadDigest"))
    with pytest.raises(Retryable, match="BadDigest"):
        faulty.put("k", b"1")


# --- what trying again cannot help is the user's ---


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_the_users_with_the_remedy(bucket, file, call):
    with pytest.raises(ConfigError, match=f"no bucket nowhere at {bucket.url}; create it, or set store.bucket"):
        CALLS[call](S3Store(bucket.config(bucket="nowhere")), file)


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AccessDenied", "allow s3:ListBucket"),
        (403, "InvalidAccessKeyId", "refuses the credentials.*AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "refuses the credentials"),
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "AuthorizationHeaderMalformed", "set store.region"),
        (501, "NotImplemented", "see its documentation"),
    ],
)
def test_a_refusal_is_the_users_with_the_remedy(behind, status, code, remedy):
    faulty, proxy = behind(Fault("answer", status=status, code=code))
    with pytest.raises(ConfigError, match=remedy) as e:
        faulty.put("k", b"1")
    assert faulty.config.bucket in str(e.value) and proxy.url in str(e.value)


def test_no_credentials_are_the_users_with_the_remedy(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=f"no credentials for {bucket.url}.*AWS_ACCESS_KEY_ID"):
        S3Store(bucket.config()).get("k")
    with pytest.raises(ConfigError, match="no credentials"):
        delta_options(bucket.config())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"endpoint_url": "no url"}, "store.endpoint_url"),
        ({"ca_bundle": "nowhere.pem"}, "store.ca_bundle = 'nowhere.pem': no such file"),
        ({"region": "no region"}, "store.region"),
    ],
    ids=str,
)
def test_what_no_request_could_be_made_of_is_refused_at_once(bucket, wrong, complaint):
    with pytest.raises(ConfigError, match=complaint):
        S3Store(bucket.config(**wrong))


def test_a_bucket_name_that_cannot_be_is_the_users(bucket):
    with pytest.raises(ConfigError, match="check store.bucket"):
        S3Store(bucket.config(bucket="no bucket!")).get("k")


def test_a_store_that_ignores_ranges_is_not_taken_for_s3(behind, store, tmp_path):
    store.put("k", DATA)
    faulty, _ = behind(Fault("whole", "GET"))
    with pytest.raises(ConfigError, match="asked for a range"):
        faulty.get_range("k", 0, 10)


# --- large files ---


def test_a_file_of_several_parts_comes_back_byte_by_byte(bucket, big, tmp_path):
    store = S3Store(bucket.config(part_bytes=PART))
    store.put_file("k", big)
    store.get_file("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == big.read_bytes() and store.size("k") == big.stat().st_size
    head = bucket.client().head_object(Bucket=bucket.name, Key="main/k")
    assert head["ETag"].endswith('-3"') and uploads(bucket) == []


FLAT = """
import sys, tracemalloc
from pathlib import Path
from streamlearn.adapters.s3_store import S3Store
from streamlearn.contract.config import StoreConfig
store, file = S3Store(StoreConfig.model_validate_json(sys.argv[1])), Path(sys.argv[2])
tracemalloc.start()
store.put_file("k", file)
store.get_file("k", file.with_name("copy"))
print(tracemalloc.get_traced_memory()[1])
"""


def test_a_large_file_goes_and_comes_in_flat_memory(bucket, tmp_path):
    """In a process of its own: moto keeps its objects in the memory of this one."""
    file, blocks = tmp_path / "file", 96
    with file.open("wb") as f:
        for i in range(blocks):
            f.write(hashlib.sha256(b"%d" % i).digest() * (MIB // 32))
    config = bucket.config(part_bytes=2 * PART).model_dump_json()
    done = subprocess.run([sys.executable, "-c", FLAT, config, file], cwd=REPO, capture_output=True, text=True, check=True)
    with file.open("rb") as a, (tmp_path / "copy").open("rb") as b:
        assert hashlib.file_digest(a, "sha256").digest() == hashlib.file_digest(b, "sha256").digest()
    assert int(done.stdout) < 3 * PART  # one part of two, and what the SDK needs


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("act", ["answer", "reset_before", "reset_after"])
def test_one_fault_in_any_request_of_an_upload_is_survived(behind, store, big, method, act):
    for path in ("uploads$", "uploadId") if method == "POST" else ("partNumber=2",):
        faulty, proxy = behind(Fault(act, method, path), part_bytes=PART)
        faulty.put_file("k", big)
        assert hashlib.sha256(store.get("k")).digest() == hashlib.sha256(big.read_bytes()).digest()
        assert proxy.requests(method).count(act) == 1


def test_a_completion_whose_reply_was_lost_is_cleared_up_by_looking(behind, bucket, store, big):
    """What S3 tells the second try: the upload is no more.  (moto answers it 200.)"""
    gone = Fault("answer", "POST", r"uploadId", status=404, code="NoSuchUpload")
    faulty, proxy = behind(Fault("reset_after", "POST", r"uploadId"), gone, part_bytes=PART)
    faulty.put_file("k", big)
    assert proxy.requests("POST") == ["", "reset_after", "answer"] and store.size("k") == big.stat().st_size


def test_a_completion_that_did_not_happen_is_not_taken_for_one(behind, bucket, store, big):
    store.put("k", b"older")
    gone = Fault("answer", "POST", r"uploadId", status=404, code="NoSuchUpload")
    faulty, _ = behind(gone, part_bytes=PART)
    with pytest.raises(Retryable, match="NoSuchUpload"):
        faulty.put_file("k", big)
    assert store.get("k") == b"older" and uploads(bucket) == []


def test_an_upload_that_fails_is_invisible_and_aborted(behind, bucket, store, big):
    faulty, proxy = behind(Fault("answer", "PUT", "partNumber=2", times=ALWAYS), part_bytes=PART)
    with pytest.raises(Retryable, match="put_file of k"):
        faulty.put_file("k", big)
    with pytest.raises(NotFound):
        store.get("k")
    assert uploads(bucket) == [] and len(proxy.requests("DELETE")) == 1


def test_an_upload_that_cannot_even_be_aborted_raises_its_own_fault(behind, bucket, store, big, caplog):
    faulty, _ = behind(Fault("answer", "PUT", times=ALWAYS), Fault("reset_before", "DELETE", times=ALWAYS), part_bytes=PART, attempts=1)
    with pytest.raises(Retryable, match="SlowDown"):
        faulty.put_file("k", big)
    assert "lifecycle rule" in caplog.text and len(uploads(bucket)) == 1 and store.list("") == []


# --- the rest ---


def test_lists_more_than_one_page(bucket, store):
    client = bucket.client()
    keys = [f"main/many/{i:04d}" for i in range(1003)]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda key: client.put_object(Bucket=bucket.name, Key=key), [*keys, "mainly/else", "main/many/folder/", "main/.hidden"]
            )
        )
    assert [f"main/{key}" for key in store.list("many/")] == keys and len(store.list("")) == len(keys)


def test_stores_of_different_prefixes_do_not_meet(bucket):
    one, two, whole = (S3Store(bucket.config(prefix=prefix)) for prefix in ("one", "one/two", ""))
    one.put("a", b"1")
    two.put("a", b"2")
    assert one.get("a") == b"1" and whole.get("one/two/a") == b"2" and two.list("") == ["a"]
    assert two.uri("a") == f"s3://{bucket.name}/one/two/a" and whole.uri("a") == f"s3://{bucket.name}/a"


def test_a_negative_range_is_a_bug_of_the_caller(store):
    with pytest.raises(ValueError, match="negative"):
        store.get_range("k", -1, 5)


def test_a_full_disk_is_a_fault_that_passes_and_leaves_no_half_copy(store, tiny_disk):  # noqa: F811
    store.put("k", bytes(MIB))
    with pytest.raises(StoreFull, match="no space left"):
        store.get_file("k", tiny_disk / "copy")
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.parametrize("put", ["put", "put_file", "put_if_absent"])
def test_every_put_carries_the_sha256_that_s3_checks_it_against(behind, file, put):
    """S3 refuses other bytes than these; moto does not look."""
    watched, proxy = behind()
    getattr(watched, put)("k", file if put == "put_file" else DATA)
    assert [h.get("x-amz-checksum-sha256") for h in proxy.headers] == [sha256_of(DATA)]


def test_every_part_carries_its_own(behind, big):
    watched, proxy = behind(part_bytes=PART)
    watched.put_file("k", big)
    parts = [h["x-amz-checksum-sha256"] for h, (method, _, _) in zip(proxy.headers, proxy.seen, strict=True) if method == "PUT"]
    data = big.read_bytes()
    assert parts == [sha256_of(data[:PART]), sha256_of(data[PART : 2 * PART]), sha256_of(data[2 * PART :])]


def sha256_of(data):
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
