"""Parts of a sequence of examples: a selection by index, and the validation split cut from train."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import overload

import numpy as np
from numpy.typing import NDArray

from caravan.data.records import Example


class Selection(Sequence[Example]):
    """Some examples of another sequence, by index: a view that copies none of them."""

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]) -> None:
        self._examples = examples
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Selection(self._examples, self._indices[index].tolist())
        return self._examples[int(self._indices[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self._examples[int(index)] for index in self._indices)


def select(examples: Sequence[Example], indices: Sequence[int]) -> Sequence[Example]:
    """The examples at `indices`, in that order: a tuple where they are in memory, a view where they are on disk."""
    if isinstance(examples, list | tuple):
        return tuple(examples[index] for index in indices)
    return Selection(examples, indices)


def cut_validation(
    examples: Sequence[Example], fraction: float, *, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split train into train and validation, the same way for the same seed.

    Examples with exactly the same text stay on one side. Each label gives at most one example more than its share;
    what rounding leaves over passes on to the next label, so that many small labels together give their share too. No
    label leaves train altogether: a label with a single example (or a single text) stays there. The order of the
    examples is kept.

    Args:
        examples: n of them.
        fraction: in [0, 1), of the examples that can be given away.
        seed: of the draw.

    Returns:
        What stays in train, and the validation split, which is empty where no label can spare an example.
    """
    if not fraction or not len(examples):
        return examples, ()
    # Arrays, not objects: this runs over query files that are too large to hold.
    digests, codes, offsets = array("Q"), array("q"), array("q", [0])
    numbers: dict[str, int] = {}
    for example in examples:
        digests.append(int.from_bytes(blake2b(example.text.encode("utf-8"), digest_size=8).digest()))
        codes.extend(numbers.setdefault(doc_id, len(numbers)) for doc_id in example.doc_ids)
        offsets.append(len(codes))
    order, starts = _groups_of_equals(np.asarray(digests))
    sizes = np.diff(np.append(starts, len(order)))
    first_label = np.asarray(codes)[np.asarray(offsets)[order[starts]]]
    left = np.bincount(np.asarray(codes), minlength=len(numbers))

    generator = np.random.default_rng(seed)
    taken = np.zeros(len(order), dtype=bool)
    carry = 0.0
    ends = np.cumsum(np.bincount(first_label))[:-1]
    by_label: list[NDArray[np.int64]] = np.split(np.argsort(first_label, kind="stable"), ends)
    label_order: list[int] = generator.permutation(len(by_label)).tolist()
    for label in label_order:
        candidates = by_label[label]
        if len(candidates) < 2:
            continue
        quota = carry + fraction * int(sizes[candidates].sum()) + 1e-9  # 1e-9: ten tenths must make one
        for group in generator.permutation(candidates).tolist():
            if quota < 1:
                break
            members = order[starts[group] : starts[group] + sizes[group]].tolist()
            cost = Counter(code for member in members for code in codes[offsets[member] : offsets[member + 1]])
            if len(members) <= quota and all(left[code] > count for code, count in cost.items()):
                taken[members] = True
                quota -= len(members)
                for code, count in cost.items():
                    left[code] -= count
        carry = min(quota, 1.0)  # a label that could not give its share must not strip the next one
    return select(examples, np.flatnonzero(~taken).tolist()), select(examples, np.flatnonzero(taken).tolist())


def _groups_of_equals(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices sorted so that equal digests are neighbours (n,), and where each group of equals starts (groups,)."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    return order, np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
