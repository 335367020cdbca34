"""The web application: who is let in, what is answered, and how a refusal is worded for each kind of client.

Reading only: every method but GET and HEAD is 405.  With tokens, every path asks for one (`Basic`, any user, the token as password:
docker, skopeo, oras and browsers; or `Bearer`: Hugging Face's clients).  Without tokens and not public, only requests to this machine's own
names are answered, so that no web page can read here through a browser that was told another name for it.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from streamlearn.contract.config_serve import ServeConfig, is_loopback
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.serve.asked import REASONS, Refused
from streamlearn.serve.hub import Hub
from streamlearn.serve.oci import Oci
from streamlearn.serve.pages import Pages, failure
from streamlearn.serve.sending import Sender
from streamlearn.serve.shelf import Shelf
from streamlearn.serve.tokens import Tokens

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
CHALLENGE = 'Basic realm="streamlearn", charset="UTF-8"'
OCI_CODES = {400: "UNSUPPORTED", 401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 405: "UNSUPPORTED", 416: "SIZE_INVALID"}
INVALID = "Invalid credentials in Authorization header"  # Hugging Face's words, which its clients know
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    config: ServeConfig
    tokens: Tokens | None

    def check(self, request: web.Request) -> None:
        """Raises Refused."""
        if self.tokens is not None:
            given = request.headers.get("Authorization", "")
            if not self.tokens.name_of(given):
                why = INVALID if given else "a token is needed: as the password of any user, or as Bearer"
                raise Refused(401, why, headers={"WWW-Authenticate": CHALLENGE})
        elif not self.config.public and not (_host(request) and is_loopback(_host(request))):
            raise Refused(403, "without tokens only requests to localhost or a loopback address are answered")
        if request.method not in ("GET", "HEAD"):
            raise Refused(405, "this registry is only read: publish to the learner's own", headers={"Allow": "GET, HEAD"})


def application(config: ServeConfig, layout: OciLayout, repository: str, metrics: ServeMetrics, tokens: Tokens | None) -> web.Application:
    guard = Guard(config, tokens)
    sender = Sender(layout, metrics)
    shelf = Shelf(layout, sender, repository)

    @web.middleware
    async def counted(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, protocol, code = time.monotonic(), _protocol(request.path), "5xx"
        try:
            answer = await worded(request, handler)
            code = f"{answer.status // 100}xx"
            return answer
        finally:
            metrics.requests.labels(protocol, code).inc()
            metrics.seconds.labels(protocol).observe(time.monotonic() - began)

    async def worded(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            guard.check(request)
            return await handler(request)
        except Refused as e:
            refused = e
        except web.HTTPException as e:
            if e.status < 400:
                raise
            refused = Refused(e.status, e.reason)
        except NotFound as e:
            refused = Refused(404, str(e))
        except Corrupt as e:
            logger.error("%s %s: %s", request.method, request.path, e)
            metrics.corrupt.inc()
            return await _word(request, Refused(500, "damaged on the server's disk: not sent", "UNKNOWN"))
        metrics.refused.labels(REASONS.get(refused.status, "malformed")).inc()
        return await _word(request, refused)

    app = web.Application(middlewares=[counted])
    app.on_response_prepare.append(_signed)
    app.add_routes(Oci(shelf, sender, metrics).routes())
    app.add_routes(Pages(shelf, config, private=tokens is not None).routes())
    app.add_routes(Hub(shelf, sender, metrics, private=tokens is not None).routes())
    return app


async def _signed(request: web.Request, response: web.StreamResponse) -> None:
    """Whatever is sent is data: no browser runs it, guesses a type for it or asks anybody for more."""
    response.headers["Content-Security-Policy"] = CSP
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Server"] = "streamlearn"
    if request.path.startswith("/v2"):
        response.headers["Docker-Distribution-Api-Version"] = "registry/2.0"


async def _word(request: web.Request, refused: Refused) -> web.StreamResponse:
    """A refusal as the client's protocol has it."""
    message = "".join(c if " " <= c <= "~" else "?" for c in refused.message)  # it goes into a header too
    protocol = _protocol(request.path)
    if protocol == "oci":
        code = refused.code or OCI_CODES.get(refused.status, "UNKNOWN")
        body = json.dumps({"errors": [{"code": code, "message": message, "detail": {}}]})
        return web.Response(status=refused.status, text=body, content_type="application/json", headers=refused.headers)
    if protocol == "hf":
        code = refused.code or ("RepoNotFound" if refused.status == 401 and refused.message != INVALID else "")  # as huggingface.co has it
        headers = {"X-Error-Message": message[:400], **refused.headers} | ({"X-Error-Code": code} if code else {})
        return web.json_response({"error": message}, status=refused.status, headers=headers)
    page = await asyncio.to_thread(failure, refused.status, message)
    return web.Response(status=refused.status, text=page, content_type="text/html", headers=refused.headers)


def _protocol(path: str) -> str:
    """Of metrics.SERVED."""
    if path.startswith("/v2"):
        return "oci"
    return "hf" if path.startswith("/api/") or "/resolve/" in path else "page"


def _host(request: web.Request) -> str:
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
    except ValueError:
        return ""
