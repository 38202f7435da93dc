"""Digests of models, which identify cached results."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

NOT_OF_A_MODEL = {"transformers_version": None, "_name_or_path": None}  # fields that differ for the same model


def digest_of(module: nn.Module, *described: Any, size: int = 16) -> str:
    """Return a digest of the weights of a module, and of values that describe it.

    Args:
        module: The module.
        described: Values that JSON or `str` can represent, or objects with `to_dict`, such as configs.
        size: Length of the digest in bytes.
    """
    digest = hashlib.blake2b(digest_size=size)
    for each in described:
        fields = {**each.to_dict(), **NOT_OF_A_MODEL} if hasattr(each, "to_dict") else each
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
