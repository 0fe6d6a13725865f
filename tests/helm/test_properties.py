"""Whatever the values are, Helm renders manifests that Kubernetes accepts and that fit together, or refuses them with a
text that names a value."""

import re
from collections import Counter
from functools import cache

from hypothesis import HealthCheck, given, settings

from tests.helm import consistency, schemas
from tests.helm.chart import Manifests, RefusedError, Values, documents, rendered_texts
from tests.helm.value_sets import PATHS, value_sets

EXAMPLES = 500


def test_values_are_rendered_or_refused() -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
    @given(value_sets())
    def check(drawn: tuple[Values, list[str]]) -> None:
        outcomes[rendered_or_refused(*drawn)] += 1

    check()
    # Values of which nearly all are refused would test the schema only.
    assert min(outcomes["rendered"], outcomes["refused"]) > EXAMPLES // 5, outcomes


def rendered_or_refused(values: Values, changed: list[str]) -> str:
    """Which of the two it is. `changed` are the paths of the values that differ from an example's."""
    try:
        texts = rendered_texts(values)
    except RefusedError as error:
        refusal = str(error)
        assert names_a_value(refusal, changed), refusal
        return "refused"
    del texts["kvstore/templates/NOTES.txt"]
    assert [fault for text in texts.values() for fault in faults_of(text)] == []
    assert consistency.faults(Manifests(texts), existing_secrets=secrets_of_the_user(values)) == []
    return "rendered"


def names_a_value(message: str, changed: list[str]) -> bool:
    """Whether it names one of the changed values, one below or above it, or one that does not fit to them."""
    if "these values cannot be used" in message:
        sentences = re.findall(r"(?m)^- (\S+): .{20,}$", message)
        return len(sentences) == message.count("\n- ") and all(map(exists, sentences))
    located = re.findall(r"at '/?([^']*)'", message)
    missing = re.findall(r"(?:missing propert(?:y|ies)|additional properties) ((?:'[^']+'(?:, )?)+)", message)
    named = {place.replace("/", ".").replace("~1", "/") for place in located if place}
    named |= {name for names in missing for name in re.findall(r"'([^']+)'", names)}
    return any(
        one == path or path.startswith(f"{one}.") or one.startswith(f"{path}.") or path.endswith(one)
        for one in named
        for path in changed
    )


def exists(path: str) -> bool:
    """Whether there is such a value, or one above or below it."""
    return any(f"{one}.".startswith(f"{path}.") or path.startswith(f"{one}.") for one in PATHS)


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
