"""Give a peer (a system that we compare ourselves with) a virtual environment of its own.

    python benchmarks/peers/install.py lmcache

A peer is a folder beside this file. `requirements.txt` there is installed as usual; `no-deps.txt`, where there is
one, with `--no-deps`: packages that declare more than what we run of them needs; `unwanted.txt` names what is removed
again. Its environment is `.venv` in the same folder. Run again, it does nothing until one of those files changes.

Needs only the standard library of Python 3.11 or newer.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent


class InstallError(Exception):
    """A peer could not be installed; the message says why and what to do."""


def install(folder: Path) -> bool:
    """Make `folder`/.venv; False when it was there already. Raises InstallError."""
    venv = folder / ".venv"
    python = venv / "bin" / "python"
    # Written last: an environment without it is an unfinished one, one with another text an outdated one.
    stamp = venv / ".installed"
    wanted = _requirements(folder)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return False
    print(f"Installing into {venv} (minutes, where PyTorch is among a peer's needs) ...", flush=True)
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
            "What failed is said above. The peers need a package index within reach, and a Python that their "
            "wheels exist for (nothing is compiled here)."
        ) from error


def main() -> int:
    names = sorted(file.parent.name for file in PEERS.glob("*/requirements.txt"))
    parser = argparse.ArgumentParser(description="Install a peer into a virtual environment of its own.")
    parser.add_argument("peer", choices=names)
    name = parser.parse_args().peer
    print(
        f"Installing {name} (the first time takes minutes where PyTorch is among its needs) ...", flush=True
    )
    try:
        new = install(PEERS / name)
    except InstallError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(f"{name}: {'installed' if new else 'was installed already'} in {PEERS / name / '.venv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
