"""The peers' scripts in `benchmarks/peers/`: what the codec benchmark relies on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
LMCACHE = PEERS / "lmcache" / ".venv" / "bin" / "python"

LAYERS, HEADS, HEAD_DIM = (
    12,
    2,
    32,
)  # more than ten layers: CacheGen's default treats the later ones differently
TOKENS = 300  # a whole chunk of 256 and a rest


@pytest.mark.skipif(
    not (PEERS / "lmcache" / ".venv" / ".installed").exists(),
    reason="LMCache is not installed; run: python benchmarks/peers/install.py lmcache",
)
@pytest.mark.parametrize("bins", ["default", "64"])
def test_cachegen_returns_what_its_bins_allow(tmp_path: Path, bins: str) -> None:
    kv = _kv()
    (tmp_path / "in").mkdir()
    save_file(kv, tmp_path / "in" / "passage.safetensors")
    script = [
        str(LMCACHE),
        str(PEERS / "lmcache" / "cachegen.py"),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]
    subprocess.run([*script, "--bins", bins, "--json", str(tmp_path / "sizes.json")], check=True, timeout=120)

    result = json.loads((tmp_path / "sizes.json").read_text())
    assert result["config"]["bins"] == ("default" if bins == "default" else "64,64")
    (row,) = result["files"]
    assert row["file"] == "passage.safetensors"
    assert row["values"] == 2 * kv["keys"].numel()
    assert row["kv_bytes"] == 2 * kv["keys"].nbytes
    assert row["chunks"] == 2
    assert min(row["payload_bytes"], row["cdf_bytes"], row["scale_bytes"]) > 0
    assert row["total_bytes"] > row["payload_bytes"] + row["cdf_bytes"] + row["scale_bytes"]
    assert row["encode_s"] > 0
    assert row["decode_s"] > 0

    restored = load_file(tmp_path / "out" / "passage.safetensors")
    for name, specs in (("keys", "kspecs"), ("values", "vspecs")):
        assert restored[name].shape == kv[name].shape
        assert restored[name].dtype == torch.bfloat16
        exact = kv[name].float()
        error = (restored[name].float() - exact).abs().amax((1, 3))  # [layers, tokens]
        largest = exact.abs().amax((1, 3))
        for spec in result["config"][specs]:
            layers = slice(spec["start_layer"], spec["end_layer"])
            half_step = largest[layers] / (spec["bins"] // 2 - 1) / 2
            # On top of half a step, the result is rounded to bfloat16.
            assert (error[layers] <= half_step + largest[layers] / 256).all()
            assert error[layers].max() > half_step.max() / 2


@pytest.mark.slow
def test_install_says_what_failed_and_finishes_only_once(tmp_path: Path) -> None:
    requirements = _peer(tmp_path, "--no-index\nno-such-distribution==1\n")
    failed = _install(tmp_path)
    assert failed.returncode == 1
    assert "could not install requirements.txt" in failed.stderr

    requirements.write_text("# nothing\n")
    first, second = _install(tmp_path), _install(tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "installed in" in first.stdout
    assert "installed already" in second.stdout


def _kv() -> dict[str, torch.Tensor]:
    """Channels with means and scales of their own, as keys and values have."""
    torch.manual_seed(7)
    kv = {}
    for name in ("keys", "values"):
        mean, scale = 2 * torch.randn(2, LAYERS, HEADS, 1, HEAD_DIM)
        kv[name] = (mean + scale * torch.randn(LAYERS, HEADS, TOKENS, HEAD_DIM)).bfloat16()
    return kv


def _peer(folder: Path, requirements: str) -> Path:
    shutil.copy(PEERS / "install.py", folder)
    (folder / "nobody").mkdir()
    file = folder / "nobody" / "requirements.txt"
    file.write_text(requirements)
    return file


def _install(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "install.py"), "nobody"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
