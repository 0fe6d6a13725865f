"""The installed vLLM has the hooks that its release is said to have."""

import pytest
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvstore_client.engines.vllm.versions import SUPPORTED, supported_version

pytestmark = pytest.mark.vllm


def test_the_installed_release_has_the_hooks_up_to_its_own_series() -> None:
    installed = SUPPORTED.index(supported_version(vllm.__version__))
    for number, version in enumerate(SUPPORTED):
        for hook in version.new_hooks:
            assert hasattr(KVConnectorBase_V1, hook) is (number <= installed), hook
