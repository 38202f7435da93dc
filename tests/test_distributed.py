"""A model sharded over two processes computes, trains and saves what the whole one does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_vit import HFViTForImageClassification

pytest.importorskip("transformers.distributed", reason="this version of transformers shards by other means")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "image_size"),
    [
        ("tp", "[48, 48]"),  # resampled
        ("fsdp", "[32, 48]"),  # as stored
        pytest.param("tp", "[32, 48]", marks=pytest.mark.full),
        pytest.param("fsdp", "[48, 48]", marks=pytest.mark.full),
    ],
)
def test_a_sharded_model_is_the_whole_one(tmp_path, tiny_config, kind, image_size):
    config = tiny_config(use_qk_norm=True, layer_scale_init_value=0.5, num_register_tokens=1, initializer_range=0.2)
    torch.manual_seed(0)
    HFViTForImageClassification(config).save_pretrained(tmp_path / "model")
    script = Path(__file__).parent / "sharded_model.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [kind, str(tmp_path / "model"), str(tmp_path / "saved"), image_size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-4000:]
