"""An environment for each peer, so that no peer's dependencies touch another's; torch is the project's.

python examples/benchmarks/peer_environments.py --folder .peers     # opacus, bergson, nnsight

Each is a folder of `python -m venv` that sees the packages of the interpreter that made it (torch, transformers,
revprobe) behind its own. Into it go the peer and what the peer needs beyond those, by name and version, without
resolving: pip could otherwise bring another torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

# Peer -> itself first, then what it imports and the project does not have.
PEERS = {
    "opacus": ["opacus==1.6.0", "opt-einsum==3.4.0"],
    "nnsight": ["nnsight==0.8.1", "greenlet==3.5.6", "cloudpickle==3.1.3", "websocket-client", "zstandard==0.25.0"],
    "bergson": [
        *("bergson==2.5.1", "simple-parsing==0.1.9", "docstring-parser==0.18.0", "ml_dtypes==0.6.0", "natsort==8.4.0"),
        *("petname==2.9", "torchopt==0.7.3", "optree==0.20.0", "bitsandbytes==0.50.2"),
    ],
}
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


class CannotInstall(Exception):
    """Why a peer has no environment: its version and the error, in one line."""


def environment_of(peer: str, folder: Path) -> Path:
    """The interpreter of the peer's environment, which is made where it is not there.

    Raises: CannotInstall, when pip fails, the peer cannot be imported, or torch is not the one of this process.
    """
    home = folder.resolve() / peer
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        venv.create(home, clear=True, with_pip=False)
        packages = Path(_answer(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        beneath = sysconfig.get_path("purelib")
        (packages / "zz_project.pth").write_text(f"import site; site.addsitedir({beneath!r})\n", encoding="utf-8")
        _install(peer, python)
    found = _answer(python, f"import {peer}, torch; print(torch.__version__)", peer)
    if found != torch.__version__:
        raise CannotInstall(f"{PEERS[peer][0]}: its environment has torch {found}, expected {torch.__version__}")
    (home / "complete").touch()
    return python


def _install(peer: str, python: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "-c", str(CONSTRAINTS), *PEERS[peer]], capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(f"{PEERS[peer][0]}: {_last_line(done.stderr)}")


def _answer(python: Path, code: str, peer: str | None = None) -> str:
    """What a line of code prints last in that interpreter."""
    done = subprocess.run([str(python), "-P", "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall(f"{PEERS[peer][0] if peer else python}: {_last_line(done.stderr)}")
    return _last_line(done.stdout)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word was said"])[-1]


def main() -> None:
    """Make them all, say which could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".peers"))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    asked = parser.parse_args()
    for peer in asked.peers:
        try:
            print(f"{peer}: {environment_of(peer, asked.folder)}")
        except CannotInstall as error:
            print(f"{peer}: not run, {error}")


if __name__ == "__main__":
    main()
