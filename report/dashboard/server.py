"""Where the dashboard listens, whom it answers, and what its page may load."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from flask import Flask, Response, abort, request
from werkzeug.serving import BaseWSGIServer, make_server

from ...errors import RevprobeError, first_line

TOKEN = "X-Revprobe-Token"
MOST = 2_000_000  # bytes of a POST; what a page sends of a thousand runs has a tenth
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Dash starts itself with an inline script; nothing may come from or go to any other place.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def make_dashboard_server(app: Flask, host: str, port: int) -> BaseWSGIServer:
    """A server that is listening (port 0 takes a free one); `serve_forever` answers. Raises: RevprobeError, when it
    cannot listen there.
    """
    try:
        return make_server(host, port, app, threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug leaves the process when a port is taken
        raise RevprobeError(
            f"cannot listen on {host}:{port} ({first_line(error)}); choose another --port, or --port 0 for a free one"
        ) from None


def guard(server: Flask, host: str, token: str) -> None:
    """Refuse requests to other names (a web page may point its own name at this machine) and whatever another page
    sends here; state the policy.

    Args:
        token: what every POST has to bring along: it stands in the page, which other pages cannot read.
    """
    # Not Flask's TRUSTED_HOSTS: werkzeug cuts its entries at the first colon, so that none admits [::1], and a Flask
    # before 3.1, which Dash accepts, ignores the setting in silence.
    allowed = {*LOOPBACK, host}
    server.config["MAX_CONTENT_LENGTH"] = MOST

    @server.before_request
    def _only_our_names() -> None:
        name = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdecimal() else request.host
        if host in LOOPBACK and name.strip("[]") not in allowed:
            abort(403)

    @server.before_request
    def _only_our_page() -> Response | None:
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return None
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        foreign = origin is not None and urlsplit(origin).netloc != request.host
        if foreign or site not in (None, "same-origin"):
            return Response("refused: sent by another page\n", 403, mimetype="text/plain")
        if not hmac.compare_digest(request.headers.get(TOKEN, "").encode(), token.encode()):
            # The page of a server that ran here before: it loads itself anew (see page.js).
            return Response("refused: without this page's token; reload it\n", 403, {TOKEN: "stale"}, "text/plain")
        return None

    @server.after_request
    def _policy(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if response.mimetype == "text/html":
            response.headers["Cache-Control"] = "no-store"  # it holds the token
        return response
