"""Which examples make a batch: a new order each epoch, texts of like length together, all from one seed."""

from collections.abc import Sequence

import torch

_WINDOW = 50  # batches that are sorted by length together: enough to save padding, few enough to stay random


def epoch_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Cut one epoch into batches.

    Args:
        lengths: N token counts (all equal when length does not matter).
        batch_size: examples a batch; the last one may be smaller.
        seed: with `epoch`, decides the order; the same pair gives the same batches.
        epoch: number of the epoch in the whole training, from 0.

    Returns:
        Lists of example numbers; together each number from 0 to N - 1 once.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = sorted(order[start : start + batch_size * _WINDOW], key=lambda index: lengths[index])
        batches.extend(window[cut : cut + batch_size] for cut in range(0, len(window), batch_size))
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[index] for index in shuffled]
