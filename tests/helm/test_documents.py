"""Commands that documents tell an operator to type, as far as they can be tried without Kubernetes."""

import itertools
import re
import shlex

import pytest
import yaml

from tests.helm.chart import CHART, ROOT, Manifests, Values, render, with_value
from tests.helm.schemas import faults

DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "operate.md", CHART / "README.md"]
LINES = [
    pytest.param(line, id=f"{document.parent.name}/{document.name} {line[:50]}")
    for document in DOCUMENTS
    for block in re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith(("helm install", "helm upgrade", "docker build"))
]


def release(name: str = "kvstore", values: Values | None = None) -> Manifests:
    return render(values or {}, name=name, namespace="kvstore")


@pytest.mark.parametrize("line", LINES)
def test_a_command_names_what_there_is(line: str) -> None:
    program, verb, *arguments = shlex.split(line, comments=True)
    if program == "docker":
        file = next(after for before, after in itertools.pairwise(arguments) if before in ("-f", "--file"))
        assert (ROOT / file).is_file()
        return
    name, chart = arguments[:2]
    assert (ROOT / chart).samefile(CHART), verb
    values: Values = {}
    for option, value in itertools.pairwise(arguments):
        if option == "--set":
            path, _, text = value.partition("=")
            values = with_value(path, yaml.safe_load(text), values)
    assert not [fault for manifest in release(name, values) for fault in faults(manifest)]


def test_objects_in_commands_exist() -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    manifests = release()
    pods = {
        f"{workload['metadata']['name']}-{ordinal}"
        for workload in manifests.of("StatefulSet")
        for ordinal in range(10)
    }
    claims = {
        f"{claim['metadata']['name']}-{workload['metadata']['name']}-{ordinal}"
        for workload in manifests.of("StatefulSet")
        for claim in workload["spec"].get("volumeClaimTemplates", ())
        for ordinal in range(10)
    }
    for pattern, known in (
        (r"deploy/([a-z0-9-]+)", {each["metadata"]["name"] for each in manifests.of("Deployment")}),
        (
            r"(?:get|delete) secret ([a-z0-9-]+)",
            {each["metadata"]["name"] for each in manifests.of("Secret")},
        ),
        (r"delete pod ([a-z][a-z0-9-]+)", pods),
        (r"delete pvc ([a-z0-9-]+)", claims),
        (
            r"delete statefulset ([a-z0-9-]+)",
            {each["metadata"]["name"] for each in manifests.of("StatefulSet")},
        ),
    ):
        named = set(re.findall(pattern, text))
        assert named, pattern
        assert named <= known


def test_the_release_has_a_test() -> None:
    hooks = {
        pod["metadata"]["name"]: pod["metadata"].get("annotations", {}).get("helm.sh/hook")
        for pod in release().of("Pod")
    }
    assert "test" in hooks.values()
    (pod,) = (pod for pod in release().of("Pod") if hooks[pod["metadata"]["name"]] == "test")
    # Helm 3 removes a pod with `hook-succeeded` before `helm test --logs` can read its log.
    assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"
