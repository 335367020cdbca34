"""robots.txt as RFC 9309 has it: its own examples, what servers answer, what they send, and one request for all who ask."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from ingest.fetch.robots import BODY_BYTES, RULES, Allowed, Disallowed, parse, product_token
from streamlearn.contract.config import FetchConfig

SIMPLE = """
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""  # RFC 9309, 5.1
LONGEST = """
User-Agent: foobot
Allow: /example/page/
Disallow: /example/page/disallowed.gif
"""  # 5.2


def may(text, path, token="streamlearn"):
    body = text if isinstance(text, bytes) else text.encode()
    return isinstance(parse(body, token).verdict(str(URL(f"http://example.com{path}"))), Allowed)


@pytest.mark.parametrize(
    ("token", "path", "allowed"),
    [
        ("foobot", "/example/page.html", True),
        ("foobot", "/example/allowed.gif", True),
        ("foobot", "/", False),
        ("foobot", "/publications/", False),
        ("barbot", "/example/page.html", False),
        ("bazbot", "/example/page.html", False),
        ("barbot", "/example/", True),
        ("bazbot", "/a.gif", True),
        ("quxbot", "/example/page.html", True),
        ("quxbot", "/a.gif", True),
        ("other", "/a.gif", False),
        ("other", "/a.gif.jpg", True),
        ("other", "/example/x", False),
        ("other", "/publications/x.gif", True),  # /publications/ is longer than *.gif$
        ("other", "/x", True),
    ],
)
def test_the_simple_example_of_section_5_1(token, path, allowed):
    assert may(SIMPLE, path, token) is allowed


@pytest.mark.parametrize(
    ("path", "allowed"), [("/example/page/", True), ("/example/page/x", True), ("/example/page/disallowed.gif", False)]
)
def test_the_longest_match_of_section_5_2(path, allowed):
    assert may(LONGEST, path, "foobot") is allowed


def test_groups_of_one_name_are_merged_and_names_have_no_case():
    """Section 2.2.1, its example."""
    text = "user-agent: ExampleBot\ndisallow: /foo\ndisallow: /bar\n\nuser-agent: EXAMPLEBOT\ndisallow: /baz\n\nuser-agent: *\ndisallow: /only-others\n"
    assert [may(text, p, "examplebot") for p in ("/foo", "/bar", "/baz", "/only-others", "/qux")] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("streamlearn", True),
        ("STREAMLEARN", True),
        ("streamlearn/0.1", True),
        ("streamlearn (bot)", True),
        ("stream", False),
        ("learn", False),
        ("streamlearn2", False),
        ("my-streamlearn", False),
        ("", False),
    ],
)
def test_a_group_is_ours_by_the_whole_token(name, ours):
    assert may(f"User-agent: {name}\nDisallow: /\n", "/x") is not ours


@pytest.mark.parametrize(
    ("rule", "path", "matches"),
    [  # the table of section 2.2.2: pattern, then what is asked for
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz", True),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar", True),
        ("/foo/bar/ツ", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/ツ", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/%e3%83%84", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz", True),
        ("/foo/bar/baz", "/foo/bar/%62%61%7A", True),
        # section 2.2.3
        ("/this/path/exactly$", "/this/path/exactly", True),
        ("/this/path/exactly$", "/this/path/exactly/not", False),
        ("/this/*/exactly", "/this/long/path/exactly", True),
        ("/this/*/exactly", "/this/exactly", False),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-*.html", True),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-b.html", False),
        ("/path/foo-%24", "/path/foo-$", True),
        ("/path/foo-%24", "/path/foo-", False),
        ("/ # a comment", "/x", True),
        ("/X", "/x", False),
        ("*", "/x", True),
        ("", "/x", False),
    ],
)
def test_how_a_path_is_matched(rule, path, matches):
    assert may(f"User-agent: *\nDisallow: {rule}\n", path) is not matches


@pytest.mark.parametrize(
    "text", ["Allow: /page\nDisallow: /page", "Disallow: /page\nAllow: /page"], ids=["allow first", "disallow first"]
)  # 2.2.2: if equivalent, allow
def test_of_two_rules_of_one_length_the_one_that_allows_counts(text):
    assert may(f"User-agent: *\n{text}\n", "/page")


def test_robots_txt_itself_is_always_allowed():
    assert may("User-agent: *\nDisallow: /\n", "/robots.txt")


def test_other_records_end_no_group():
    """Section 2.2.4."""
    assert not may("User-agent: a\nSitemap: http://example.com/s\nUser-agent: *\nNoise: 1\nDisallow: /x\n", "/x")


def test_what_is_asked_for_is_judged_not_how_it_was_written():
    assert not may("User-agent: *\nDisallow: /private\n", "/open/../private/x.jpg")


def test_the_deciding_rule_is_told():
    text = "User-agent: *\nDisallow: /a\nDisallow: /a/b/c/d\n\nUser-agent: streamlearn\nDisallow: /a/\nAllow: /a/b/\n"
    assert parse(text.encode(), "streamlearn").verdict("http://h/a/x") == Disallowed("Disallow: /a/")
    assert parse(text.encode(), "else").verdict("http://h/a/b/c/d/e") == Disallowed("Disallow: /a/b/c/d")


@pytest.mark.parametrize(
    ("lines", "delay"),
    [
        ("", None),
        ("Crawl-delay: 5", 5.0),
        ("crawl-delay:0.5", 0.5),
        ("Request-rate: 1/10", 10.0),
        ("Request-rate: 2/1m", 30.0),
        ("Crawl-delay: 3\nRequest-rate: 1/10", 10.0),
        ("Crawl-delay: 0", None),
        ("Crawl-delay: soon", None),
        ("Crawl-delay: -1", None),
        ("Crawl-delay: inf", None),
        ("Crawl-delay: nan", None),
        (f"Request-rate: 1/{10**400}", 1e9),
        (f"Request-rate: {10**400}/1", 1e-9),
    ],
)
def test_delays_are_for_us_or_for_all(lines, delay):
    assert (
        parse(f"User-agent: streamlearn\n{lines}\nDisallow:\n\nUser-agent: *\nCrawl-delay: 99\n".encode(), "streamlearn").delay_s == delay
    )
    assert parse(f"User-agent: other\nCrawl-delay: 99\n\nUser-agent: *\n{lines}\n".encode(), "streamlearn").delay_s == delay


@pytest.mark.parametrize(
    ("agent", "token"),
    [
        (FetchConfig().user_agent, "streamlearn"),
        ("MyBot/2.0 (+mailto:me@example.org)", "mybot"),
        ("MyBot", "mybot"),
        (" my_bot-x / 1", "my_bot-x"),
        ("two words/1", "two"),
        ("*/1", ""),
        ("/1", ""),
        ("", ""),
    ],
)
def test_the_product_token_is_the_user_agent_up_to_the_slash(agent, token):
    assert product_token(agent) == token


def test_without_a_token_the_rules_for_all_count():
    assert not may("User-agent: *\nDisallow: /x\n", "/x", "") and may("User-agent: a\nDisallow: /x\n", "/x", "")


# -- what servers send --

PLAIN = b"User-agent: *\nDisallow: /no\n"


@pytest.mark.parametrize(
    "body",
    [
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.replace(b"\n", b"\r"),
        PLAIN.rstrip(),
        b"\0" + PLAIN.replace(b":", b":\0\0"),
        PLAIN.decode().encode("utf-16"),
        PLAIN.replace(b": ", b":\t"),
        b"\xff\xfe\xfd\n" + PLAIN,
        b"<html><body>User agents welcome</body></html>\n" + PLAIN,
        b"A" * 200_000 + b"\n" + PLAIN,
        gzip.compress(PLAIN, mtime=0),
        PLAIN + b"Allow: /" + b"n" * 10**7,
        PLAIN.replace(b"Disallow", b"Dissalow"),
        PLAIN.upper().replace(b"/NO", b"/no"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_rules_are_found_in_whatever_they_come_in(body):
    assert not may(body, "/no") and may(body, "/yes")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xef\xbb\xbf",
        b"\x1f\x8b broken",
        bytes(range(256)) * 2000,
        b"\0" * 10**6,
        b"\n" * 10**6,
        b"<!doctype html><p>404",
        b"Disallow: /",
        b"\xff\xfe",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_holds_no_rules_allows(body):
    assert may(body, "/x")


def test_a_bomb_is_expanded_no_further_than_the_cap():
    assert may(gzip.compress(b"#" * 10**8), "/x")


def test_a_body_over_the_cap_counts_up_to_its_last_whole_line():
    line = b"Disallow: /%06d\n"
    body = (
        b"User-agent: *\nDisallow: /first\nAllow: /\n" + b"# " + b"x" * (BODY_BYTES - 60) + b"\n" + b"".join(line % i for i in range(1000))
    )
    assert not may(body, "/first") and may(body, "/000999")
    cut = (
        b"User-agent: *\nDisallow: /\n#" + b"x" * (BODY_BYTES - 40) + b"\nAllow: /no-further\n"
    )  # torn in `Allow: /no-f`, which would allow more
    assert not may(cut, "/no-fox")


def test_rules_over_the_cap_are_dropped_but_only_ours_count():
    others = "User-agent: other\n" + "Disallow: /x\n" * (RULES + 10)
    many = "User-agent: *\n" + "".join(f"Disallow: /{i}-\n" for i in range(RULES + 10))
    assert len(parse((others + many).encode(), "streamlearn").lines) == RULES
    assert not may(others + many, "/7-") and may(others + many, f"/{RULES + 5}-")


LINES = st.lists(
    st.tuples(
        st.sampled_from(
            ["User-agent", "user agent", "Disallow", "Allow", "Crawl-delay", "Request-rate", "Sitemap", "Host", "Visit-time", ""]
        ),
        st.sampled_from([":", " ", ": ", "", "::"]),
        st.text(alphabet="*$/%aA0 \t\0\x0b\x85\u2028:#?é\U0001f600", max_size=12)
        | st.sampled_from(["*", "streamlearn", "/", "1/0", "1/5s 1-2", "1e400"]),
    ).map("".join),
    max_size=12,
).map("\n".join)


@given(body=st.binary(max_size=300) | LINES.map(str.encode), path=st.text(alphabet="/%aA0*$?é.", max_size=10))
@settings(max_examples=400, deadline=None)
def test_no_bytes_raise(body, path):
    rules = parse(body, "streamlearn")
    verdict = rules.verdict(str(URL(f"http://h/{path}")))
    assert isinstance(verdict, Allowed | Disallowed)
    if isinstance(verdict, Disallowed):
        assert verdict.rule.startswith("Disallow") and verdict.rule.encode()
