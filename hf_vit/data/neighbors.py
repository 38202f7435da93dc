"""Nearest neighbours of unit vectors: exact by products of matrices, approximate by usearch for many vectors."""

import torch
from torch import Tensor

from ..system.extras import need

MOST_EXACT = 200_000  # vectors that are compared with every query; an index is built for more
BLOCK = 1024  # queries at a time


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` most similar vectors of a bank for every query, the most similar first.

    Up to `MOST_EXACT` vectors, the result is exact.

    Args:
        queries, bank: Unit vectors `[N, D]` and `[M, D]`.
        k: Number of neighbours; all of a smaller bank.

    Returns:
        Products `[N, k]`, float32, and positions in the bank `[N, k]`.

    Raises:
        ValueError: If the bank is larger than `MOST_EXACT` and usearch is not installed.
    """
    k = min(k, len(bank))
    if len(bank) > MOST_EXACT:
        return _approximate(queries, bank, k)
    bank = bank.float()
    parts = [(block.float() @ bank.T).topk(k, dim=1) for block in queries.split(BLOCK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _approximate(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    need("index", "usearch")
    from usearch.index import Index

    index = Index(ndim=bank.shape[1], metric="ip", dtype="f16")
    index.add(torch.arange(len(bank)).numpy(), bank.half().numpy())
    found = torch.from_numpy(index.search(queries.half().numpy(), k).keys.astype("int64")).reshape(len(queries), k)
    similarity = torch.einsum("nd,nkd->nk", queries.float(), bank[found].float())
    similarity, order = similarity.sort(dim=1, descending=True)
    return similarity, found.gather(1, order)
