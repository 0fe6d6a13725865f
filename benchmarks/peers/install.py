"""Install a peer, a system that this project is compared with, into a virtual environment of its own.

    python benchmarks/peers/install.py lmcache

A peer is a folder next to this file. Its environment is `.venv` in that folder. The packages in `requirements.txt` are
installed with their dependencies, those in `no-deps.txt` (optional) without. Packages in `unwanted.txt` (optional) are
removed again. Running the script again does nothing until one of these files changes.

Needs only the standard library of Python 3.11 or newer.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent


class InstallError(Exception):
    """A peer could not be installed. The message says why and what to do."""


def install(folder: Path) -> bool:
    """Makes `folder`/.venv. Returns False if it was complete already. Raises InstallError."""
    venv = folder / ".venv"
    python = venv / "bin" / "python"
    # Written last. Without this file an environment is incomplete; with other content it is outdated.
    stamp = venv / ".installed"
    wanted = _requirements(folder)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return False
    print(f"Installing {folder.name} into {venv} (takes minutes if it needs PyTorch) ...", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(venv)], "make a virtual environment")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "--requirement", str(folder / "requirements.txt")], "install requirements.txt")
    if (folder / "no-deps.txt").exists():
        _run([*pip, "--no-deps", "--requirement", str(folder / "no-deps.txt")], "install no-deps.txt")
    if (folder / "unwanted.txt").exists():
        removal = [str(python), "-m", "pip", "uninstall", "--yes", "--quiet"]
        _run([*removal, "--requirement", str(folder / "unwanted.txt")], "remove unwanted.txt")
    stamp.write_text(wanted)
    return True


def _requirements(folder: Path) -> str:
    files = [folder / name for name in ("requirements.txt", "no-deps.txt", "unwanted.txt")]
    return f"# Python {sys.version}\n" + "".join(file.read_text() for file in files if file.exists())


def _run(command: list[str], purpose: str) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(
            f"could not {purpose} with Python {sys.version.split()[0]}: {error}\n"
            "The output above has the details. Peers need a reachable package index, and wheels for this version of "
            "Python, because nothing is compiled."
        ) from error


def main() -> int:
    names = sorted(file.parent.name for file in PEERS.glob("*/requirements.txt"))
    parser = argparse.ArgumentParser(description="Install a peer into a virtual environment of its own.")
    parser.add_argument("peer", choices=names, help="folder of the peer")
    name = parser.parse_args().peer
    try:
        new = install(PEERS / name)
    except InstallError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(f"{name}: {'installed' if new else 'was installed already'} in {PEERS / name / '.venv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
