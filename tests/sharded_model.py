"""What every process of test_distributed.py runs: load a model sharded, and compare it with the whole one.

Arguments: "tp" or "fsdp", the model's folder, a folder to save to, the image size to load at.
"""

import json
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForImageClassification
from transformers.distributed import DistributedConfig

from hf_vit.hub.folder import check_folder


def main(kind: str, folder: str, saved: str, image_size: str) -> None:
    torch.set_num_threads(1)
    size = {"image_size": json.loads(image_size)}
    sharding = DistributedConfig(**{f"{kind}_size": 2})
    sharded = AutoModelForImageClassification.from_pretrained(folder, distributed_config=sharding, **size)
    whole = AutoModelForImageClassification.from_pretrained(folder, **size)
    shapes = {
        name: parameter.to_local().shape for name, parameter in sharded.named_parameters() if is_shard(parameter)
    }
    rows = dict(whole.named_parameters())["vit.layers.0.attention.qkv.weight"].shape[0]
    assert shapes["vit.layers.0.attention.qkv.weight"][0] == rows // 2

    pixel_values, labels = torch.randn(2, 3, *whole.config.image_shape), torch.tensor([0, 1])
    outputs, expected = (model(pixel_values, labels=labels) for model in (sharded, whole))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in sharded.named_parameters():
        gradient = parameter.grad.full_tensor() if is_shard(parameter.grad) else parameter.grad
        torch.testing.assert_close(
            gradient, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )

    is_main = dist.get_rank() == 0
    sharded.save_pretrained(saved, is_main_process=is_main)
    dist.barrier()
    if is_main:
        assert check_folder(saved)  # sharding replaces the class of a model, and must not replace its code
        again = AutoModelForImageClassification.from_pretrained(saved)
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)), name
        print("equal")
    dist.destroy_process_group()


def is_shard(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "to_local")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
