"""Who may do what: headers that confine the page, and the checks in front of everything that controls a worker.

The page itself is readable by whoever reaches the port. Controls need three things: this server listens on loopback
only, the request comes from this very page (Origin and Host), and it carries the token that the command printed. A page
of another site has none of them, and neither does a name that was made to point here (DNS rebinding).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTROL_PATH = "/api/worker"
TOKEN_HEADER = "x-dtrain-token"  # the name of a header  # nosec B105
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """What this server lets in."""

    public: bool = False
    token: str = field(default_factory=lambda: secrets.token_urlsafe(18))

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Why a control request is refused, "" if it is not."""
        if self.public:
            return (
                "this dashboard is public, so it controls nothing: open one without --public on your machine"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return "this request comes from another site's page"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "this request comes from another site's page"
        if not secrets.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self.token.encode()):
            return "the token is missing or wrong: open the address that `dtrain dashboard` printed"
        return ""


class Guard:
    """Puts the headers on every answer; refuses foreign names, and controls to whom they do not belong.

    It stands in front of everything else: a refused request's body is never read.
    """

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        app, headers = self._app, Headers(scope=scope)
        if not self._access.public and not _is_local(headers.get("host", "")):
            app = PlainTextResponse("open this page as localhost or 127.0.0.1", status_code=403)
        elif scope["path"].startswith(CONTROL_PATH) and (reason := self._access.refusal(headers)):
            app = JSONResponse({"error": reason}, status_code=403)
        await app(scope, receive, send_guarded)


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine as such, whatever the port."""
    try:
        return urlsplit(f"//{host}").hostname in LOCAL_NAMES
    except ValueError:
        return False
