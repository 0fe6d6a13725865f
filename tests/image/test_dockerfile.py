"""What image/Dockerfile promises: it can be built from this checkout, from pinned versions, and runs as nobody."""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.image.dockerfile import IMAGE, PINNED, ROOT, arguments_of, defaults, flavours, project


def pins(file: Path) -> dict[str, Requirement]:
    lines = (line for line in file.read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}


def admitted_by_dockerignore(path: str) -> bool:
    """Whether .dockerignore leaves the file in the context of the build. The last pattern that matches decides."""
    admitted = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#"):
            parts = [path, *(str(parent) for parent in Path(path).parents)]
            if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts):
                admitted = line.startswith("!")
    return admitted


def test_every_copied_file_exists_and_is_in_the_context() -> None:
    copied = [source for line in arguments_of("COPY") if "--from" not in line for source in line.split()[:-1]]
    assert {"constraints.txt", "image/constraints.txt", "."} == set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert source == "." or admitted_by_dockerignore(source)


def test_the_context_has_all_that_the_wheel_needs_and_no_secrets() -> None:
    for path in ["pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "codec/kvstore_codec/chunk.py"]:
        assert (ROOT / path).is_file()
        assert admitted_by_dockerignore(path)
    assert admitted_by_dockerignore("benchmarks/kvstore_bench/py.typed")
    for path in [".git/config", ".venv/pyvenv.cfg", "signing.key", "api/kvstore_api/v1/kvstore_pb2.py"]:
        assert not admitted_by_dockerignore(path)


def test_the_container_runs_as_a_numeric_user_who_is_not_root() -> None:
    (user,) = arguments_of("USER")
    assert user == "10001:10001"
    assert "--owner=10001 --group=10001 /var/lib/kvstore" in " ".join(arguments_of("RUN"))


def test_the_entry_point_is_an_installed_command() -> None:
    (entry,) = arguments_of("ENTRYPOINT")
    assert json.loads(entry) == ["kvstore"]
    assert "kvstore" in project()["scripts"]


def test_bases_are_pinned_by_version() -> None:
    bases = [defaults()["BASE"], *(flavour.get("args", {}).get("BASE") for flavour in flavours().values())]
    for base in filter(None, bases):
        assert PINNED.fullmatch(base), base


@pytest.mark.parametrize("flavour", flavours())
def test_flavours_use_arguments_and_extras_that_exist(flavour: str) -> None:
    given = flavours()[flavour].get("args", {})
    assert given.keys() <= defaults().keys()
    extras = given.get("EXTRAS", defaults()["EXTRAS"]).split(",")
    assert set(extras) <= project()["optional-dependencies"].keys()


def test_the_image_has_the_version_of_the_package() -> None:
    version = project()["version"]
    assert defaults()["VERSION"] == version
    assert [flavour["tags"] for flavour in flavours().values()] == [
        [f"kvstore:{version}"],
        [f"kvstore:{version}-cuda"],
    ]


def test_both_files_of_constraints_pin_each_package_once() -> None:
    tested, rest = pins(ROOT / "constraints.txt"), pins(IMAGE / "constraints.txt")
    assert not tested.keys() & rest.keys()
    for pin in rest.values():
        (exact,) = pin.specifier
        assert exact.operator == "=="


@pytest.mark.slow
def test_the_constraints_name_every_package_of_the_image() -> None:
    files = [ROOT / "constraints.txt", IMAGE / "constraints.txt"]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    constraints = [argument for file in files for argument in ("--constraint", file)]
    resolved = subprocess.run(
        [*pip, *constraints, f"{ROOT}[{defaults()['EXTRAS']}]"],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    names = {canonicalize_name(found["metadata"]["name"]) for found in json.loads(resolved.stdout)["install"]}
    assert names - {"kvstore-service"} <= pins(files[0]).keys() | pins(files[1]).keys()
