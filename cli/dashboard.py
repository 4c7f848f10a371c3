"""`revprobe dashboard`: a folder of runs as a page that follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RevprobeError
from .report import write_bundle


def dashboard(
    runs_dir: Annotated[Path, typer.Argument(help="A folder of runs and sweeps; nothing outside it is read.")] = Path(
        "runs"
    ),
    host: Annotated[str, typer.Option(help="Where to listen; only this machine by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8050,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks at the folder.")] = 2.0,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the runs as a static folder to hand on, as `revprobe report --bundle` does, and end."),
    ] = None,
) -> None:
    """Look at runs in the browser, also while they train: curves over each other, one checkpoint, one pair's tokens."""
    if export is not None:
        write_bundle(runs_dir, export)
        return
    try:
        import dash  # noqa: F401  # the extra; what follows imports it
    except ImportError:
        raise RevprobeError(
            "the dashboard needs dash, which is not installed; run `pip install '.[dashboard]'`"
        ) from None
    import logging

    from ..finetune.config.loading import require_no_config
    from ..report.dashboard.app import make_app
    from ..report.dashboard.server import LOOPBACK, make_dashboard_server
    from ..report.summary.terminal import make_console

    require_no_config(runs_dir)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request would be two a second
    server = make_dashboard_server(make_app(runs_dir, every=every, host=host).server, host, port)
    console = make_console()
    if host not in LOOPBACK:
        console.print(
            f"warning: listening on {host}: whoever can reach this machine can read these runs, without a password",
            soft_wrap=True,
        )
    console.print(f"{runs_dir}: http://{host}:{server.port} (Ctrl-C ends it)", soft_wrap=True)
    try:
        server.serve_forever()  # until Ctrl-C, which it takes as its end
    finally:
        server.server_close()
