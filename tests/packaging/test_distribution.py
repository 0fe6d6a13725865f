"""What the installed distribution promises: small dependencies, typed packages, stubs that run on the oldest
gRPC and protobuf it admits."""

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = [
    "kvstore_api",
    "kvstore_codec",
    "kvstore_client",
    "kvstore_cluster",
    "kvstore_service",
    "kvstore_bench",
]
STUBS = ["kvstore_pb2.py", "kvstore_pb2.pyi", "kvstore_pb2_grpc.py"]


def plain_requirements() -> dict[str, Requirement]:
    """What `pip install kvstore-service`, without extras, brings."""
    parsed = [Requirement(text) for text in requires("kvstore-service") or []]
    return {r.name.lower(): r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_a_plain_install_brings_no_ray() -> None:
    plain = plain_requirements()
    assert {"torch", "grpcio", "zstandard", "av"} <= plain.keys()
    assert not plain.keys() & {"ray", "redis", "psutil", "transformers", "vllm", "pynvvideocodec"}


def test_codec_and_client_import_nothing_of_the_cluster() -> None:
    script = (
        "import sys, kvstore_codec, kvstore_client; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    imported = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert {"kvstore_codec", "kvstore_client"} <= set(imported)
    assert not {"ray", "redis", "kvstore_service", "kvstore_cluster", "transformers"} & set(imported)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    (folder,) = importlib.import_module(package).__path__
    assert (Path(folder) / "py.typed").is_file()


def test_the_command_is_installed() -> None:
    (entry,) = distribution("kvstore-service").entry_points.select(group="console_scripts", name="kvstore")
    assert callable(entry.load())


def test_stubs_run_on_the_oldest_libraries_admitted() -> None:
    from kvstore_api.v1 import kvstore_pb2, kvstore_pb2_grpc

    plain = plain_requirements()
    made_for = re.search(
        r"ValidateProtobufRuntimeVersion\(\s*[\w.]+,\s*(\d+),\s*(\d+),\s*(\d+)",
        Path(kvstore_pb2.__file__).read_text(),
    )
    assert made_for is not None
    assert plain["protobuf"].specifier.contains(".".join(made_for.groups()))
    assert plain["grpcio"].specifier.contains(kvstore_pb2_grpc.GRPC_GENERATED_VERSION)
    assert not plain["protobuf"].specifier.contains("6.31.0")


def test_constraints_pin_versions_that_the_requirements_admit() -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    admitted = {r.name.lower(): r for r in map(Requirement, requires("kvstore-service") or [])}
    assert any(str(pin) == "torch==2.13.0" for pin in pins)
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert admitted[pin.name.lower()].specifier.contains(Version(exact.version)), pin


@pytest.mark.slow
def test_a_wheel_built_from_the_repository_is_complete(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    assert not list(checkout.rglob("*_pb2*")), "generated code does not belong in the repository"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, checkout],
        check=True,
        timeout=280,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {f"{package}/py.typed" for package in PACKAGES} <= names
        assert {f"kvstore_api/v1/{stub}" for stub in STUBS} <= names
        assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
        assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
        for stub in STUBS:
            ast.parse(archive.read(f"kvstore_api/v1/{stub}"))
