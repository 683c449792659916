"""Which examples make a batch and what is dropped of them: new each epoch, all from one seed."""

from collections.abc import Sequence

import numpy as np
import torch

_WINDOW = 50  # batches that are sorted by length together: enough to save padding, few enough to stay random
_WINDOWS = 4  # at least so many an epoch: sorted as a whole, a small data set would give the same batches every epoch


def epoch_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Cut one epoch into batches.

    Args:
        lengths: N token counts (all equal when length does not matter).
        batch_size: examples a batch; the last one made, at any place in the list, may be smaller.
        seed: with `epoch`, decides the order; the same pair gives the same batches. From 0, of any size.
        epoch: number of the epoch in the whole training, from 0 to 2**32 - 1.

    Returns:
        Lists of example numbers; together each number from 0 to N - 1 once. Within a batch, shorter texts come first.
    """
    # Not torch's generator: it looks at the lower 32 bits of its one seed only. The epoch comes first because it fills
    # exactly one word of NumPy's seed sequence, so no two pairs are mixed up.
    generator = np.random.default_rng([epoch, seed])
    order = generator.permutation(len(lengths)).tolist()
    window = batch_size * max(1, min(_WINDOW, len(order) // (batch_size * _WINDOWS)))
    batches = []
    for start in range(0, len(order), window):
        chosen = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches.extend(chosen[cut : cut + batch_size] for cut in range(0, len(chosen), batch_size))
    return [batches[index] for index in generator.permutation(len(batches)).tolist()]


def noise_source(seed: int, epoch: int, step: int) -> torch.Generator:
    """Make the CPU generator of one step's dropout: same numbers, same draws, so a resumed step repeats itself."""
    words = np.random.SeedSequence([epoch, step, seed]).generate_state(1)
    return torch.Generator().manual_seed(int(words[0]))
