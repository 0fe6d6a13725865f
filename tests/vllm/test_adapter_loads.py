"""The worker's half knows which files of an adapter vLLM has loaded, by vLLM's own reading of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from kvstore_client.engines.adapter import AdapterFiles
from kvstore_client.engines.vllm.adapter_loads import LoadedAdapters, loaded_adapters
from kvstore_client.engines.vllm.metadata import AdapterUse
from kvstore_client.miss_reason import MissReason
from tests.client.adapters import saved_adapter

pytestmark = pytest.mark.vllm

PENDING = MissReason.STORE_ADAPTER_PENDING
CHANGED = MissReason.STORE_ADAPTER_CHANGED


@pytest.fixture
def loaded() -> LoadedAdapters:
    """As in a new process."""
    loaded_adapters.cache_clear()
    return loaded_adapters()


def load(lora_request: LoRARequest, meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Read an adapter as the worker of vLLM does: the function that calls has the request under this name."""
    PEFTHelper.from_local_dir(lora_request.lora_path, None)
    meanwhile()


def asked(folder: Path, lora_id: int = 1) -> LoRARequest:
    return LoRARequest("adapter", lora_id, str(folder))


def use(folder: Path, lora_id: int = 1) -> AdapterUse:
    """Of the files as they are now."""
    return AdapterUse(lora_id, AdapterFiles.of(str(folder)))


def test_an_adapter_that_was_not_loaded_is_waited_for(loaded: LoadedAdapters, tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, 1)
    assert loaded.why_not(use(folder), storing=True) is PENDING
    assert loaded.why_not(use(folder), storing=False) is MissReason.ADAPTER_PENDING
    json.loads((folder / "adapter_config.json").read_text())
    assert loaded.why_not(use(folder), storing=True) is PENDING, "others may read it, too"
    load(asked(folder))
    assert loaded.why_not(use(folder), storing=True) is None
    assert loaded.why_not(use(folder, lora_id=2), storing=True) is PENDING
    load(asked(folder))
    assert loaded.why_not(use(folder), storing=True) is None, "it was dropped, and loaded again"


def test_what_was_read_before_the_engine_loaded_other_files_is_refused(
    loaded: LoadedAdapters, tmp_path: Path
) -> None:
    before = use(saved_adapter(tmp_path, 1))
    saved_adapter(tmp_path, 2)
    load(asked(tmp_path))
    assert loaded.why_not(before, storing=True) is CHANGED
    assert loaded.why_not(before, storing=False) is MissReason.ADAPTER_CHANGED
    assert loaded.why_not(use(tmp_path), storing=True) is None


def test_what_is_read_after_the_files_have_changed_is_refused(loaded: LoadedAdapters, tmp_path: Path) -> None:
    """The engine computes with the files as they were."""
    before = use(saved_adapter(tmp_path, 1))
    load(asked(tmp_path))
    assert loaded.why_not(before, storing=True) is None
    saved_adapter(tmp_path, 2)
    assert loaded.why_not(use(tmp_path), storing=True) is CHANGED
    assert loaded.why_not(before, storing=True) is None


def test_files_that_change_while_the_engine_reads_them_are_refused(
    loaded: LoadedAdapters, tmp_path: Path
) -> None:
    before = use(saved_adapter(tmp_path, 1))
    load(asked(tmp_path), meanwhile=lambda: saved_adapter(tmp_path, 2))
    assert loaded.why_not(before, storing=True) is CHANGED
    assert loaded.why_not(use(tmp_path), storing=True) is CHANGED


def test_an_adapter_that_was_loaded_in_place_of_another_one_is_not_trusted_any_more(
    loaded: LoadedAdapters, tmp_path: Path
) -> None:
    """Requests under way are computed with the new one under the path of the old one."""
    old, new = saved_adapter(tmp_path / "old", 1), saved_adapter(tmp_path / "new", 2)
    load(asked(old))
    load(asked(new))
    assert loaded.why_not(use(old), storing=True) is CHANGED
    assert loaded.why_not(use(new), storing=True) is CHANGED
    load(asked(new, lora_id=2))
    assert loaded.why_not(use(new, lora_id=2), storing=True) is None, "another adapter"


def test_a_path_whose_files_were_loaded_in_two_versions_is_not_trusted_any_more(
    loaded: LoadedAdapters, tmp_path: Path
) -> None:
    """vLLM's own prefix cache takes the two for one, whatever their numbers."""
    load(asked(saved_adapter(tmp_path, 1)))
    load(asked(saved_adapter(tmp_path, 2), lora_id=2))
    assert loaded.why_not(use(tmp_path, lora_id=2), storing=True) is CHANGED


def test_a_link_that_leads_elsewhere_is_another_adapter(loaded: LoadedAdapters, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(saved_adapter(tmp_path / "one", 1))
    load(asked(link))
    assert loaded.why_not(use(link), storing=True) is None
    link.unlink()
    link.symlink_to(saved_adapter(tmp_path / "two", 2))
    assert loaded.why_not(use(link), storing=True) is CHANGED


def test_weights_in_another_format_are_refused(loaded: LoadedAdapters, tmp_path: Path) -> None:
    files = use(saved_adapter(tmp_path, 1))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    load(asked(tmp_path))
    assert loaded.why_not(files, storing=True) is CHANGED


def test_a_load_that_cannot_be_understood_ends_all_trust(
    loaded: LoadedAdapters, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved_adapter(tmp_path, 1)
    load(asked(folder))
    PEFTHelper.from_local_dir(str(folder), None)
    assert loaded.why_not(use(folder), storing=True) is CHANGED
    assert "not known which LoRA adapter vLLM loads" in caplog.text
