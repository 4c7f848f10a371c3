"""Where the dashboard listens, whom it answers, and what its page may load."""

from __future__ import annotations

from flask import Flask, Response, abort, request
from werkzeug.serving import BaseWSGIServer, make_server

from ...errors import RevprobeError, first_line

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


def guard(server: Flask, host: str) -> None:
    """Refuse requests to other names (a web page may point its own name at this machine) and state the policy."""
    # Not Flask's TRUSTED_HOSTS: werkzeug cuts its entries at the first colon, so that none admits [::1], and a Flask
    # before 3.1, which Dash accepts, ignores the setting in silence.
    allowed = {*LOOPBACK, host}

    @server.before_request
    def _only_our_names() -> None:
        name = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdecimal() else request.host
        if host in LOOPBACK and name.strip("[]") not in allowed:
            abort(403)

    @server.after_request
    def _policy(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response
