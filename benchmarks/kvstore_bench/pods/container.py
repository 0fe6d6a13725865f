"""What a container of a pod runs, here."""

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_bench.pods.manifests import Manifest, Manifests

_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_INHERITED = ("PATH", "LANG", "LD_PRELOAD", "PYTHONDONTWRITEBYTECODE", "COVERAGE_PROCESS_START")


@dataclass(frozen=True, slots=True)
class Container:
    """`arguments` are command and arguments as the manifest has them. `placed` puts text of the container in terms of
    this machine."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    placed: Callable[[str], str]

    @property
    def command(self) -> list[str]:
        return self.expanded(self.arguments)

    def expanded(self, texts: Iterable[str]) -> list[str]:
        """Texts with `$(NAME)` replaced by variables, as Kubernetes does, and put in terms of this machine."""
        return [self.placed(_expand(text, self.environment)) for text in texts]


def container_of(
    manifests: Manifests,
    spec: Manifest,
    pod: str,
    address: str,
    root: Path,
    tmp: Path,
    hosts: Mapping[str, str],
) -> Container:
    """The only container of a pod, with the files of its volumes written below `root`. `tmp` is its /tmp. `hosts` are
    addresses by host name."""
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    mounts = {
        mount["mountPath"]: root / mount["mountPath"][1:] for mount in container.get("volumeMounts", ())
    }
    mounts.pop("/dev/shm", None)  # noqa: S108 (the machine's own does)
    mounts["/tmp"] = tmp  # noqa: S108 (of the container)
    for folder in mounts.values():
        folder.mkdir(parents=True, exist_ok=True)
    placed = replacing(mounts, hosts)
    for mount in container.get("volumeMounts", ()):
        if mount["mountPath"] in mounts:
            _write_files(manifests, volumes.get(mount["name"], {}), mounts[mount["mountPath"]], placed)
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment |= {name: placed(value) for name, value in _of_maps(manifests, container).items()}
    for variable in container.get("env", ()):
        value = _value(manifests, variable, {"metadata.name": pod, "status.podIP": address})
        environment[variable["name"]] = placed(_expand(value, environment))
    environment["TMPDIR"] = environment["RAY_TMPDIR"] = str(tmp)
    return Container((*container.get("command", ()), *container.get("args", ())), environment, placed)


def replacing(mounts: Mapping[str, Path], hosts: Mapping[str, str]) -> Callable[[str], str]:
    """Puts text of a container in terms of this machine."""
    folders = {path: str(folder) for path, folder in mounts.items()}
    of_paths = re.compile(rf"(?<![\w.-])(?:{_any_of(folders)})(?![\w.-])")
    # A name without a port may be the name in a certificate.
    of_hosts = re.compile(rf"(?<![\w./-])(?:{_any_of(hosts)})(?=:[0-9]|(?<=:[0-9]{{4}})(?![0-9]))")

    def placed(text: str) -> str:
        text = of_paths.sub(lambda found: folders[found[0]], text)
        return of_hosts.sub(lambda found: hosts[found[0]], text)

    return placed


def _any_of(texts: Iterable[str]) -> str:
    """A pattern of any of the texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _write_files(
    manifests: Manifests, volume: Mapping[str, Any], folder: Path, placed: Callable[[str], str]
) -> None:
    for source in volume.get("projected", {}).get("sources", [volume]):
        for kind, field, name in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
            if field not in source:
                continue
            chosen = source[field]
            files = manifests.files(kind, chosen.get(name) or chosen["name"])
            items = chosen.get("items") or [{"key": key, "path": key} for key in files]
            for item in items:
                file = folder / item["path"]
                content = placed(files[item["key"]].decode())
                if not file.exists() or file.read_text() != content:
                    file.unlink(missing_ok=True)
                    file.write_text(content)
                    file.chmod(stat.S_IRUSR)


def _of_maps(manifests: Manifests, container: Manifest) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if field in source:
                files = manifests.files(kind, source[field]["name"])
                found |= {key: value.decode() for key, value in files.items()}
    return found


def _value(manifests: Manifests, variable: Manifest, fields: Mapping[str, str]) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return str(variable["value"])
    if "fieldRef" in source:
        return fields[source["fieldRef"]["fieldPath"]]
    kind, reference = (
        ("Secret", source["secretKeyRef"])
        if "secretKeyRef" in source
        else ("ConfigMap", source["configMapKeyRef"])
    )
    return manifests.files(kind, reference["name"])[reference["key"]].decode()


def _expand(text: str, environment: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda found: environment.get(found[1], found[0]), text)
