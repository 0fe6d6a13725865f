"""As much of Kubernetes' API as Helm asks for when templates look objects up."""

import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.helm.chart import Manifest

_KINDS = {"v1": {"secrets": "Secret"}, "apps/v1": {"statefulsets": "StatefulSet"}}


class ApiServer:
    """Context manager. Serves objects that exist, to read only."""

    def __init__(self, existing: Iterable[Manifest] = ()) -> None:
        self._answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()},
        }
        for version, kinds in _KINDS.items():
            self._answers[_prefix(version)] = {
                "kind": "APIResourceList",
                "groupVersion": version,
                "resources": [
                    {"name": plural, "kind": kind, "namespaced": True, "verbs": ["get", "list"]}
                    for plural, kind in kinds.items()
                ],
            }
        for manifest in existing:
            self._answers[_path(manifest)] = manifest

    @property
    def kubeconfig(self) -> str:
        named: dict[str, dict[str, Any]] = {
            "clusters": {"cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}},
            "users": {"user": {}},
            "contexts": {"context": {"cluster": "it", "user": "it"}},
        }
        lists = {key: [{"name": "it", **entry}] for key, entry in named.items()}
        return json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "it", **lists})

    def __enter__(self) -> Self:
        answers = self._answers

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = answers.get(self.path.partition("?")[0])
                failure = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound"}
                body = json.dumps(found or failure | {"code": 404}).encode()
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _groups() -> list[dict[str, Any]]:
    named = [(version.partition("/")[0], version) for version in _KINDS if "/" in version]
    versions = {name: {"groupVersion": whole, "version": whole.partition("/")[2]} for name, whole in named}
    return [
        {"name": name, "versions": [version], "preferredVersion": version}
        for name, version in versions.items()
    ]


def _prefix(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _path(manifest: Manifest) -> str:
    version, metadata = manifest["apiVersion"], manifest["metadata"]
    (plural,) = (plural for plural, kind in _KINDS[version].items() if kind == manifest["kind"])
    return f"{_prefix(version)}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"
