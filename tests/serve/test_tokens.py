"""Who may pull: tokens, names of this machine, and a role that does not open to the world unasked."""

import base64

import pytest

from streamlearn.contract import config_file
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.serve.run import check
from streamlearn.serve.tokens import Tokens
from tests.serve.serving import TOKEN, filled, serving, tokens


def basic(user, token):
    return "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/snapshots/candidate",
        "/v2/",
        "/v2/team/model/tags/list",
        "/api/models/team/model",
        "/team/model/resolve/main/config.json",
        "/no",
    ],
)
def test_every_path_asks_for_a_token_and_says_how_to_give_it(private, path):
    refusals = private.counted("serve_refused_total", reason="unauthorized")
    known = 404 if path == "/no" else 200
    for header in (
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        basic("a", "b"),
        "Basic !!",
        basic(TOKEN, ""),
        "Digest " + TOKEN,
    ):
        status, headers, _ = private.ask(path, **({"Authorization": header} if header else {}))
        assert (status, headers["www-authenticate"]) == (401, 'Basic realm="streamlearn", charset="UTF-8"'), header
    assert private.counted("serve_refused_total", reason="unauthorized") == refusals + 9
    for header in (f"Bearer {TOKEN}", basic("", TOKEN), basic("whoever", TOKEN), "bearer another-token-of-the-test"):
        assert private.ask(path, Authorization=header)[0] == known, header


def test_a_token_that_is_taken_out_opens_nothing_from_then_on(tmp_path):
    path = tokens(tmp_path)
    with serving(filled(tmp_path, steps=(1,)), tokens_file=path) as served:
        assert served.ask("/v2/", Authorization=f"Bearer {TOKEN}")[0] == 200
        (tmp_path / "tokens").write_text("other another-token-of-the-test\n")
        assert served.ask("/v2/", Authorization=f"Bearer {TOKEN}")[0] == 401
        assert served.ask("/v2/", Authorization="Bearer another-token-of-the-test")[0] == 200
        (tmp_path / "tokens").write_text("half a line of three\n")
        assert served.ask("/v2/", Authorization="Bearer another-token-of-the-test")[0] == 401
        (tmp_path / "tokens").unlink()
        assert served.ask("/v2/", Authorization="Bearer another-token-of-the-test")[0] == 401
        tokens(tmp_path)
        assert served.ask("/v2/", Authorization=f"Bearer {TOKEN}")[0] == 200


@pytest.mark.parametrize(("text", "complaint"), [
    ("reader short", ":1: write a name of its own and a token of at least 16"), ("\n\njust-one-word-that-is-long", ":3:"), ("# none\n", "no token in it"),
    ("a 0123456789abcdef\na 0123456789abcdeg", ":2:"),
])  # fmt: skip
def test_a_file_of_tokens_is_refused_by_its_line_and_its_content_is_in_no_message(tmp_path, text, complaint):
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=complaint) as e:
        Tokens(tmp_path / "t")
    assert "short" not in str(e.value) and "0123456789" not in str(e.value) and "one-word" not in str(e.value)
    with pytest.raises(ConfigError, match="serve.tokens_file = .*No such file"):
        Tokens(tmp_path / "none")


@pytest.mark.parametrize(
    "settings",
    [{"serve.address": "0.0.0.0"}, {"serve.address": "::"}, {"serve.address": "models.local"}, {"serve.url": "https://models.example.org"}],
)
def test_nobody_opens_it_to_others_by_accident(settings, tmp_path):
    with pytest.raises(
        ConfigError, match=r"can be reached by others, and nobody is asked for a token: set serve.tokens_file, or serve.public"
    ):
        config_file.load(None, env={}, overrides=settings)
    assert config_file.load(None, env={}, overrides=settings | {"serve.public": "true"}).serve.public
    assert config_file.load(None, env={}, overrides=settings | {"serve.tokens_file": tokens(tmp_path)}).serve.tokens_file
    with pytest.raises(ConfigError, match="set one of them"):
        config_file.load(None, env={}, overrides=settings | {"serve.public": "true", "serve.tokens_file": "x"})


@pytest.mark.parametrize(("key", "value"), [
    ("repository", "Team/Model"), ("repository", "a/b/c"), ("repository", "v2/x"), ("repository", "../x"), ("repository", "a--b"),
    ("url", "ftp://x"), ("url", "https://x/y"), ("url", "https://u:p@x"), ("port", "65536"), ("url", "https://x y"),
])  # fmt: skip
def test_bad_settings_are_named(key, value):
    with pytest.raises(ConfigError, match=f"serve.{key}"):
        config_file.load(None, env={}, overrides={f"serve.{key}": value})


def test_what_cannot_be_served_is_said_before_anything_starts():
    base = Config()
    with pytest.raises(ConfigError, match="serve.repository: 'a-'"):
        check(base.model_copy(update={"train": base.train.model_copy(update={"name": "a-"})}))


def test_a_page_elsewhere_cannot_read_here_by_another_name_for_this_machine(public, tmp_path):
    """DNS rebinding: the browser believes that evil.example is 127.0.0.1."""
    assert public.ask("/v2/", Host="evil.example:80")[0] == 403
    assert public.ask("/", Host="[")[0] in (400, 403) and public.ask("/", Host="")[0] in (400, 403)
    for name in ("localhost", "127.0.0.1", "[::1]:5640"):
        assert public.ask("/v2/", Host=name)[0] == 200
    with serving(filled(tmp_path, steps=(1,)), public=True, url="https://models.example.org") as served:
        assert served.ask("/v2/", Host="models.example.org")[0] == 200
        assert b"docker://models.example.org/team/model:" in served.ask("/", Host="models.example.org")[2]
