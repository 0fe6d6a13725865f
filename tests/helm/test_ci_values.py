"""The values in `ci/` are examples for users. Each renders, passes Helm's lint, and is accepted by Kubernetes."""

from pathlib import Path

import pytest
from helm_python.chart import lint

from tests.helm import consistency, schemas
from tests.helm.chart import CHART, CI_VALUES, ci_values, defaults, render, rendered_texts, values_of

EXISTING = ("kvstore-redis", "kvstore-tokens", "kvstore-ray", "kvstore-encryption")
"""Secrets that the values for production name."""

each = pytest.mark.parametrize("path", CI_VALUES, ids=lambda path: path.stem)


def test_there_are_the_five_examples() -> None:
    names = {path.stem.removesuffix("-values") for path in CI_VALUES}
    assert names == {"minimal", "laptop", "production", "kuberay", "gpu-encode"}


@each
@pytest.mark.parametrize("kubernetes", [schemas.OLDEST, schemas.NEWEST])
def test_kubernetes_accepts_it(path: Path, kubernetes: str) -> None:
    manifests = render(values_of(path))
    assert [fault for manifest in manifests for fault in schemas.faults(manifest, kubernetes)] == []
    assert consistency.faults(manifests, existing_secrets=EXISTING) == []


@each
def test_helm_finds_nothing_to_warn_of(path: Path) -> None:
    report = lint(CHART, values_of(path), strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@each
def test_notes_name_the_next_commands(path: Path) -> None:
    notes = rendered_texts(values_of(path))["kvstore/templates/NOTES.txt"]
    assert "rollout status deployment/kv-kvstore-gateway" in notes
    assert "helm -n llm test kv" in notes
    assert ("whoever reaches the pods" in notes) == (path.stem == "laptop-values")


@each
def test_pods_have_no_volume_that_they_do_not_mount(path: Path) -> None:
    for pod in render(values_of(path)).pods:
        (container,) = pod["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["spec"]["volumes"]} <= mounted


def test_a_schema_refuses_what_it_does_not_know() -> None:
    for values in (ci_values("production"), {"mode": "kuberay"}):
        for manifest in render(values):
            if "spec" in manifest:
                manifest["spec"]["misspelt"] = 1
                assert schemas.faults(manifest), manifest["kind"]


def test_the_smallest_example_is_the_defaults() -> None:
    assert ci_values("minimal") == {}
    assert render(defaults()).texts.keys() == render().texts.keys()
