"""Randomness that a guarantee rests on: who draws it, and Gaussian noise that floating point does not betray."""

import math
import os
from typing import Protocol

import torch
from torch import Tensor

_TERMS = 4  # Gaussians summed to one
_CHUNK = 1 << 16  # pairs of numbers drawn at a time: 4 MiB of bytes, whatever the size of the tensor


class NoiseSource(Protocol):
    """Who draws the numbers for sampling and noise."""

    def uniforms(self, count: int) -> Tensor:
        """Draw `count` independent numbers, float64 (count,), each k / 2**53 with k from 0 to 2**53 - 1."""
        ...


class SystemNoise:
    """The operating system's cryptographic generator: the only source for a training that claims a guarantee.

    Nothing is seeded and nothing kept in this process, so that clients draw independently, also those that one process
    plays or forks, and no draw can be repeated or foretold.
    """

    def uniforms(self, count: int) -> Tensor:
        """Draw from `os.urandom`."""
        if not count:
            return torch.empty(0, dtype=torch.float64)
        words = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
        return (words & (2**53 - 1)).to(torch.float64).mul_(2.0**-53)


class SeededNoise:
    """Numbers that repeat: for tests and experiments on public data, where they show what they show every time.

    PyTorch's Mersenne twister can be foretold from its output, so that noise from here protects nobody.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniforms(self, count: int) -> Tensor:
        """Draw from the generator."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


def secret_generator(source: NoiseSource) -> torch.Generator:
    """Make a generator for what is dropped in a private step, from a seed that nobody else knows.

    Were the masks known, one example more would shift those of all after it, and with them gradients that the account
    takes as unchanged. Drawn in secret and independently they are the same in distribution whoever else is there.
    """
    return torch.Generator().manual_seed(int(source.uniforms(1) * 2**53))


def gaussians(count: int, std: float, source: NoiseSource) -> Tensor:
    """Draw independent numbers from N(0, std²), float64 (count,).

    The gaps between the values that a floating-point Gaussian can take tell about the value it was added to (Mironov
    2012, for Laplace). Each number here is the sum of four independent ones divided by two, which makes such values
    infeasible to enumerate (Holohan and Braghin 2021, arXiv:2107.10138, section 4; Opacus' secure mode does the same).
    The four are made by the transform of Box and Muller of 53-bit uniforms in float64, which cuts the tail of each at
    8.57 standard deviations, beyond which lies 1.1e-16; that is at most 4.5e-16 of delta for every number drawn.
    """
    parts = []
    for start in range(0, count, 2 * _CHUNK):
        wanted = min(count - start, 2 * _CHUNK)
        pairs = (wanted + 1) // 2
        first, second = source.uniforms(2 * _TERMS * pairs).reshape(2, _TERMS, pairs)
        radius = (-2 * torch.log1p(-first)).sqrt_()
        angle = 2 * math.pi * second
        both = torch.cat([(radius * angle.cos()).sum(dim=0), (radius * angle.sin()).sum(dim=0)])
        parts.append(both[:wanted])
    if not parts:
        return torch.empty(0, dtype=torch.float64)
    return torch.cat(parts).mul_(std / _TERMS**0.5)


def noised(total: Tensor, std: float, source: NoiseSource) -> Tensor:
    """Add independent noise from N(0, std²) to every number of a tensor.

    What is safe: the noise is drawn and added in float64, and only what came out is rounded to float32, which is
    post-processing. What is not covered: `total` itself is a float32 sum, whose rounding depends on all that was summed
    and can move it by some 1e-7 of its terms more than one example's clipped gradient does (arXiv:2207.10635); beside
    noise of the order of the clipping norm this changes epsilon in its fifth digit, and no account is made of it. Nor
    of time: how long a step takes tells about how many examples it saw.

    Returns:
        float32, of the shape and on the device of `total`; with std 0, `total` unchanged.
    """
    if not std:
        return total
    noise = gaussians(total.numel(), std, source).reshape(total.shape)
    return noise.to(total.device).add_(total).to(torch.float32)
