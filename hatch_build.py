"""Build hook: generates the gRPC stubs from the .proto, so that the repository keeps no generated code."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateGrpcStubs(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatchling's signature)
        from grpc_tools import _proto, protoc

        api = Path(self.root) / "api"
        protos = sorted(str(p) for p in api.rglob("*.proto"))
        well_known = str(Path(next(iter(_proto.__path__))))
        arguments = [
            "protoc",
            f"-I{api}",
            f"-I{well_known}",
            f"--python_out={api}",
            f"--pyi_out={api}",
            f"--grpc_python_out={api}",
            *protos,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc failed on {protos}; see its output above")
