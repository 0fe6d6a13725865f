"""Whatever the values are, Helm renders manifests that Kubernetes accepts and that fit together, or refuses them with a
text that names a value."""

import re
from collections import Counter
from functools import cache

from hypothesis import HealthCheck, given, settings

from tests.helm import consistency, schemas
from tests.helm.chart import Manifests, RefusedError, Values, documents, mentions, rendered_texts
from tests.helm.value_sets import PATHS, value_sets

EXAMPLES = 500

outcomes: Counter[str] = Counter()


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(value_sets())
def test_values_are_rendered_or_refused(drawn: tuple[Values, list[str]]) -> None:
    values, changed = drawn
    try:
        texts = rendered_texts(values)
    except RefusedError as refusal:
        outcomes["refused"] += 1
        assert names_a_value(str(refusal), changed), refusal
        return
    outcomes["rendered"] += 1
    for path, text in texts.items():
        if not path.endswith("NOTES.txt"):
            assert faults_of(text) == []
    manifests = Manifests({path: text for path, text in texts.items() if not path.endswith("NOTES.txt")})
    assert consistency.faults(manifests, existing_secrets=secrets_of_the_user(values)) == []


def test_both_outcomes_were_frequent() -> None:
    """Values of which nearly all are refused would test the schema only. Runs after the test above."""
    assert min(outcomes["rendered"], outcomes["refused"]) > EXAMPLES // 5, outcomes


def names_a_value(message: str, changed: list[str]) -> bool:
    """Whether it names one of the changed values, one below or above it, or one that does not fit to them."""
    if "these values cannot be used" in message:
        return all(mentions(line, known_prefix(line)) for line in message.splitlines() if line.startswith("- "))
    located = re.findall(r"at '/?([^']*)'", message)
    missing = re.findall(r"(?:missing propert(?:y|ies)|additional properties) ((?:'[^']+'(?:, )?)+)", message)
    named = {place.replace("/", ".").replace("~1", "/") for place in located if place}
    named |= {name for names in missing for name in re.findall(r"'([^']+)'", names)}
    return any(
        one == path or path.startswith(f"{one}.") or one.startswith(f"{path}.") or path.endswith(one)
        for one in named
        for path in changed
    )


def known_prefix(line: str) -> str:
    """The value that a sentence of the chart begins with. It must exist, or be a group of values."""
    path = line.removeprefix("- ").partition(":")[0]
    return path if any(f"{known}.".startswith(f"{path}.") or f"{path}.".startswith(f"{known}.") for known in PATHS) else "?"


def secrets_of_the_user(values: Values) -> list[str]:
    """Every Secret that the values name."""
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += secrets_of_the_user(value)
        elif key == "existingSecret" and value:
            found.append(value)
    return found


@cache
def faults_of(text: str) -> list[str]:
    """Most templates render the same for most values."""
    return [fault for manifest in documents(text) for fault in schemas.faults(manifest)]
