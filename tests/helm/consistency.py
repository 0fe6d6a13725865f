"""What must hold between the objects of a release, and for each of its pods, whatever the values are."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tests.helm.chart import Manifest, Manifests

_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def faults(manifests: Manifests, *, existing_secrets: Iterable[str] = ()) -> list[str]:
    """What does not fit together. `existing_secrets` are those that the user has made."""
    found = [*_of_selectors(manifests), *_of_names(manifests)]
    for pod in manifests.pods:
        found += [*_of_lists(pod), *_of_volumes(pod, manifests), *_of_security(pod)]
    found += _of_secrets(manifests, {*existing_secrets})
    return found


def _of_selectors(manifests: Manifests) -> Iterator[str]:
    labels = [pod["metadata"]["labels"] for pod in manifests.pods]
    for manifest in manifests:
        spec, name = manifest.get("spec", {}), f"{manifest['kind']} {manifest['metadata']['name']}"
        match manifest["kind"]:
            case "Service":
                selected = _selected(spec["selector"], manifests)
                open_ports = {port["name"] for pod in selected for port in _only(pod)["ports"]}
                if len(selected) != 1:
                    yield f"{name} selects {len(selected)} kinds of pods"
                for port in spec["ports"]:
                    if port["targetPort"] not in open_ports:
                        yield f"{name}: its pods have no port {port['targetPort']}"
            case "StatefulSet" | "Deployment":
                if _selected(spec["selector"]["matchLabels"], manifests) != [spec["template"]]:
                    yield f"{name} does not select its pods, or others as well"
            case "PodDisruptionBudget" | "NetworkPolicy":
                selector = spec.get("selector") or spec["podSelector"]
                if not any(selector["matchLabels"].items() <= pod.items() for pod in labels):
                    yield f"{name} selects no pod"
            case "ServiceMonitor":
                wanted = spec["selector"]["matchLabels"].items()
                ports = [
                    port["name"]
                    for service in manifests.of("Service")
                    if wanted <= service["metadata"]["labels"].items()
                    for port in service["spec"]["ports"]
                ]
                if ports.count("metrics") != 1:
                    yield f"{name} finds {ports.count('metrics')} ports"


def _of_names(manifests: Manifests) -> Iterator[str]:
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "Service" and not _SERVICE_NAME.fullmatch(name):
            yield f"{name} is no name of a Service"
        if manifest["kind"] == "StatefulSet" and len(name) > 63 - 11:
            yield f"the label with the revision of {name} is too long"
        for value in manifest["metadata"].get("labels", {}).values():
            if not _LABEL_VALUE.fullmatch(value):
                yield f"{value!r} is no value of a label"
    for pod in manifests.pods:
        for value in pod["metadata"]["labels"].values():
            if not _LABEL_VALUE.fullmatch(value):
                yield f"{value!r} is no value of a label"


def _of_lists(pod: Manifest) -> Iterator[str]:
    """Kubernetes merges these lists by these keys, and refuses two entries with one."""
    container = _only(pod)
    lists = [(container.get("env"), "name"), (container.get("ports"), "name")]
    lists += [(container.get("volumeMounts"), "mountPath"), (pod["spec"].get("volumes"), "name")]
    for entries, key in lists:
        for value, count in Counter(entry[key] for entry in entries or ()).items():
            if count > 1:
                yield f"{container['name']} has {value} {count} times"


def _of_volumes(pod: Manifest, manifests: Manifests) -> Iterator[str]:
    container = _only(pod)
    claims = [
        claim["metadata"]["name"]
        for owner in manifests.of("StatefulSet")
        if owner["spec"]["template"] is pod
        for claim in owner["spec"].get("volumeClaimTemplates", ())
    ]
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    for name in mounted - volumes.keys() - {*claims}:
        yield f"{container['name']} mounts {name}, which does not exist"
    for volume in volumes.values():
        for kind, key, field in (
            ("ConfigMap", "configMap", "name"),
            ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
        ):
            if key in volume and (kind, volume[key][field]) not in manifests:
                yield f"{container['name']}: there is no {kind} {volume[key][field]}"


def _of_security(pod: Manifest) -> Iterator[str]:
    """The restricted level of Kubernetes' Pod Security Standards, and more."""
    spec, container = pod["spec"], _only(pod)
    security = container["securityContext"]
    holds = {
        "enableServiceLinks": spec["enableServiceLinks"] is False,
        "automountServiceAccountToken": spec["automountServiceAccountToken"] is False,
        "runAsNonRoot": spec["securityContext"]["runAsNonRoot"] is True,
        "seccompProfile": spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"},
        "allowPrivilegeEscalation": security["allowPrivilegeEscalation"] is False,
        "readOnlyRootFilesystem": security["readOnlyRootFilesystem"] is True,
        "capabilities": security["capabilities"] == {"drop": ["ALL"]},
        "a limit of memory": "memory" in container["resources"].get("limits", {}),
        "a tag that stays": re.search(r":(?!latest$)[\w.-]+$|@sha256:", container["image"]),
    }
    yield from (f"{container['name']} lacks {rule}" for rule, held in holds.items() if not held)
    limits = container["resources"].get("limits", {})
    for resource, request in container["resources"].get("requests", {}).items():
        if resource in limits and amount(request) > amount(limits[resource]):
            yield f"{container['name']} requests {request} of {resource}, above the limit of {limits[resource]}"


def amount(quantity: object) -> float:
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    prefix = unit.removesuffix("i")
    scale = 1024.0 if unit.endswith("i") else 1000.0
    return float(number) * (
        {"m": 0.001, "": 1.0}.get(unit) or scale ** (1 + "kMGTP".index(prefix.replace("K", "k")))
    )


def _of_secrets(manifests: Manifests, existing: set[str]) -> Iterator[str]:
    made = {secret["metadata"]["name"]: secret["data"].keys() for secret in manifests.of("Secret")}
    existing |= {certificate["spec"]["secretName"] for certificate in manifests.of("Certificate")}
    for name, key in {*_secret_keys([*manifests])}:
        if name in made:
            if key and key not in made[name]:
                yield f"Secret {name} has no {key}"
        elif name not in existing:
            yield f"there is no Secret {name}"


def _secret_keys(node: Any) -> Iterator[tuple[str, str]]:
    """(name, key) of Secrets that an object refers to. The key is empty where all of them are meant."""
    if isinstance(node, list):
        for inner in node:
            yield from _secret_keys(inner)
    if not isinstance(node, dict):
        return
    for key, inner in node.items():
        if key in ("secretKeyRef", "keySecret", "credentials") and isinstance(inner, dict):
            yield inner["name"], inner["key"]
        elif key == "secret" and "secretName" in inner:
            yield inner["secretName"], ""
            yield from ((inner["secretName"], item["key"]) for item in inner.get("items", ()))
        elif key == "secret":
            yield inner["name"], inner["key"]
        elif key == "authOptions":
            yield inner["secretName"], "auth_token"
        else:
            yield from _secret_keys(inner)


def _selected(selector: dict[str, str], manifests: Manifests) -> list[Manifest]:
    return [pod for pod in manifests.pods if selector.items() <= pod["metadata"]["labels"].items()]


def _only(pod: Manifest) -> Manifest:
    container: dict[str, Any]
    (container,) = pod["spec"]["containers"]
    return container
