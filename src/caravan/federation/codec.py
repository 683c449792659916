"""An update as bytes: what is sent of a change, in which dtype, and what is left for the next time.

What travels is a delta, and what its encoding loses is the residual: the sender keeps it and adds it to its next delta
(error feedback; Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; arXiv:1901.09847, algorithm 2).

- Client to server: the delta is `subtract(trained, start)`, and each client keeps its own residual between its rounds
  (`holding`).
- Server to clients: the delta is the round's average change of what all receivers hold, and the server keeps one
  residual for all; what they hold plus that residual is the server's own model. A receiver that missed a delta holds
  something else and needs the full tensors (`broadcast`).

A delta must not contain the residual already, as the difference of the server's own model to what the receivers hold
does. An update that is lost or refused takes its share of the residual with it, a step of rounding at most: its sender
does not know.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from caravan.errors import FederationError

Kind = Literal["float32", "float16", "int8"]

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_STEPS = 127  # int8 is used from -127 to 127: with -128 the range would lean to one side
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # below it a step loses digits, and some machines flush it to zero
_MOST_SCALE = 2.0**121  # 127 such steps are finite; 127 of float32's largest number / 127 are not, by a rounding
_MOST_HALF = torch.finfo(torch.float16).max
_NAME_CHARACTERS = 80  # whoever sends a name must not be able to flood the terminal with it


@dataclass(frozen=True)
class Codec:
    r"""How a delta is packed; sender and receiver must hold equal ones, as nothing that is sent says how to read it.

    A tensor NAME is packed as NAME/float32, NAME/float16 or NAME/int8, of the tensor's shape, and besides:

    - NAME/scale with "int8": float32 (R,) for R rows of a matrix (a row is an index of the first dimension), or () for
      a vector or scalar; the length of a step, s.
    - NAME/rows with a sparse tensor: int32 (K,), strictly ascending: which K of its rows are sent. The others are not.

    "float32" loses nothing. "float16" rounds to nearest and saturates at ±65504: error feedback carries the rest, where
    a refusal would lose the client's whole round to one entry. "int8" rounds up or down at random such that the mean is
    the number itself (stochastic rounding; QSGD, arXiv:1610.02132, section 3.1, with the largest magnitude as norm):

    $$ q = \lfloor v/s \rfloor + [u < v/s - \lfloor v/s \rfloor], \quad s = \max |v| / 127, \quad u \sim U[0, 1) $$

    Attributes:
        kind: "float32", "float16" or "int8": 4, 2 or 1 bytes a number.
        sparse: names of tensors of which only the rows that this delta changes are sent. Nothing by default: it tells
            the receiver which documents a client's queries were about. A row that changes costs 4 bytes more than it
            does unnamed, and what is left of a row waits in the residual until the row changes again.

    Raises:
        FederationError: the kind is none of the three.
    """

    kind: Kind = "float32"
    sparse: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in _DTYPES:
            raise FederationError(f"codec is {self.kind!r}; it must be one of {', '.join(_DTYPES)}")

    @torch.no_grad()
    def encode(
        self, delta: Mapping[str, Tensor], residual: Mapping[str, Tensor], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pack a delta, and what the packings before it left.

        Args:
            delta: float32 of any shapes, on any device, finite. It is not changed.
            residual: what the sender's last call left; {} at its first. Names that are not in it have nothing left.
            seed: of the rounding at random, used by "int8" only. Take another for every sender and round: with equal
                ones the errors of all clients point the same way and do not average out.

        Returns:
            The packed tensors, contiguous on the CPU and of dtypes that NumPy has; and the new residual, float32 on the
            CPU, without the tensors of which nothing is left (with "float32" thus {}). What `decode` gives for the
            packed tensors, plus the new residual, is the delta plus the old residual, up to float32 rounding.

        Raises:
            FederationError: a tensor is not float32 or not finite, the residual is of other tensors, or a sparse tensor
                is missing or has no rows.
        """
        self._check_sparse({name: tensor.shape for name, tensor in delta.items()})
        if unknown := residual.keys() - delta.keys():
            raise FederationError(
                f"the residual holds {_list(unknown)}, which the delta does not; start from an empty one"
            )
        generator = torch.Generator().manual_seed(seed)
        packed: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for name in sorted(delta):  # one order, so that equal seeds give equal bytes
            change = _float32(name, delta[name])
            target = change + _float32(name, residual[name], change.shape) if name in residual else change
            if not bool(torch.isfinite(target).all()):
                raise FederationError(f"the delta of tensor {name} is not finite; lower the learning rate")
            packed |= self._pack(name, target, change, generator)
            rest = target - self._unpack(name, packed, target.shape)
            if bool(rest.any()):
                left[name] = rest
        return packed, left

    @torch.no_grad()
    def decode(self, packed: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the delta that was packed; the packed tensors may come from anyone.

        Args:
            packed: what `encode` of an equal codec returned, or what somebody claims to be that.
            reference: the tensors the delta is to be added to; only names and shapes are looked at.

        Returns:
            The delta, new float32 tensors on the CPU, finite, with the names, order and shapes of the reference.

        Raises:
            FederationError: packed tensors are missing or unknown, or one of them has another dtype or shape than the
                codec gives it or holds what the codec never packs. The message names the tensor and the reason in one
                line; forms are looked at before values, and nothing larger than the reference is allocated.
        """
        shapes = {name: tensor.shape for name, tensor in reference.items()}
        self._check_sparse(shapes)
        expected = {part for name, shape in shapes.items() for part in self._parts(name, shape, 0)}
        if missing := expected - packed.keys():
            raise FederationError(f"packed tensor {_list(missing)} is missing; pack with the receiver's codec settings")
        if unknown := packed.keys() - expected:
            raise FederationError(
                f"packed tensor {_list(unknown)} is unknown here; pack with the receiver's codec settings"
            )
        for name, shape in shapes.items():
            self._check_forms(name, packed, shape)
        for name, shape in shapes.items():
            self._check_values(name, packed, shape)
        return {name: self._unpack(name, packed, shape) for name, shape in shapes.items()}

    def expected_bytes(self, shapes: Mapping[str, Sequence[int]], changed: Mapping[str, int] | None = None) -> int:
        """Count the bytes of the numbers that `encode` packs for tensors of these shapes, without having them.

        Their names and the frame around them come on top.

        Args:
            shapes: of the delta's tensors by name; a float32 number costs 32 bits, so `8 * bytes / numbers` compares.
            changed: how many rows change in each sparse tensor; those it does not name change in all.

        Returns:
            Bytes.

        Raises:
            FederationError: `changed` names what is not sparse or has fewer rows, or a sparse tensor is missing or has
                no rows.
        """
        self._check_sparse(shapes)
        changed = changed or {}
        if unknown := changed.keys() - self.sparse:
            raise FederationError(
                f"changed rows are given for {_list(unknown)}, of which all rows are sent; leave it out"
            )
        total = 0
        for name, shape in shapes.items():
            rows = shape[0] if shape else 0
            if not 0 <= changed.get(name, rows) <= rows:
                raise FederationError(
                    f"{changed[name]} changed rows are given for {name}, which has {rows}; give at most that"
                )
            parts = self._parts(name, shape, changed.get(name, rows))
            total += sum(dtype.itemsize * math.prod(form) for dtype, form in parts.values())
        return total

    def _parts(self, name: str, shape: Sequence[int], count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Give dtype and shape of each part of a packed tensor; if it is sparse, `count` of its rows are sent."""
        sent = (count, *shape[1:]) if name in self.sparse else tuple(shape)
        parts = {f"{name}/{self.kind}": (_DTYPES[self.kind], sent)}
        if self.kind == "int8":
            parts[f"{name}/scale"] = (torch.float32, sent[:1] if len(sent) > 1 else ())
        if name in self.sparse:
            parts[f"{name}/rows"] = (torch.int32, (count,))
        return parts

    def _pack(self, name: str, target: Tensor, change: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        if name in self.sparse:
            rows = (change.flatten(1).any(1) if change.ndim > 1 else change != 0).nonzero().flatten()
            parts[f"{name}/rows"] = rows.to(torch.int32)
            target = target[rows]
        if self.kind == "int8":
            parts[f"{name}/int8"], parts[f"{name}/scale"] = _quantise(target, generator)
        elif self.kind == "float16":
            parts[f"{name}/float16"] = target.clamp(-_MOST_HALF, _MOST_HALF).to(torch.float16).contiguous()
        else:
            parts[f"{name}/float32"] = target.clone(memory_format=torch.contiguous_format)
        return parts

    def _unpack(self, name: str, packed: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        # Of both ends: the residual must be what the receiver lacks, to the last bit.
        values = packed[f"{name}/{self.kind}"].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self.kind == "int8":
            scale = packed[f"{name}/scale"]
            values *= scale.reshape((*scale.shape, *[1] * (values.ndim - 1)))  # a row's scale over its numbers
        if name not in self.sparse:
            return values
        whole = torch.zeros(tuple(shape))
        whole[packed[f"{name}/rows"].long()] = values
        return whole

    def _check_sparse(self, shapes: Mapping[str, Sequence[int]]) -> None:
        for name in sorted(self.sparse):
            if name not in shapes:
                raise FederationError(
                    f"sparse tensor {name} is not among {_list(shapes)}; correct its name or leave it out"
                )
            if not shapes[name]:
                raise FederationError(f"sparse tensor {name} is one number and has no rows; leave it out")
            if shapes[name][0] > 2**31 - 1:
                raise FederationError(f"sparse tensor {name} has more rows than int32 can count; leave it out")

    def _check_forms(self, name: str, packed: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        count = 0
        if name in self.sparse and isinstance(rows := packed[f"{name}/rows"], Tensor):
            count = min(rows.numel(), shape[0])
        for part, (dtype, form) in self._parts(name, shape, count).items():
            tensor = packed[part]
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise _refused(part, "is no plain tensor on the CPU", "convert it")
            if tensor.dtype != dtype:
                raise _refused(part, f"is {tensor.dtype}, not {dtype}", "send that dtype")
            if tensor.shape != form:
                raise _refused(
                    part, f"has shape {_shape(tensor.shape)}, not {_shape(form)}", "train from the global tensors"
                )

    def _check_values(self, name: str, packed: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        values = packed[f"{name}/{self.kind}"]
        if self.kind == "int8":
            if bool((values < -_STEPS).any()):
                raise _refused(f"{name}/int8", "holds -128", "pack steps from -127 to 127")
            scale = packed[f"{name}/scale"]
            usable = (scale >= 0) & (scale <= _MOST_SCALE)  # NaN is neither
            if not bool(usable.all()):
                raise _refused(
                    f"{name}/scale", f"holds {scale[~usable][0]:g}", "pack steps of a length from 0 to 2**121"
                )
        elif not bool((finite := torch.isfinite(values)).all()):
            bad = int((~finite).sum())
            raise _refused(f"{name}/{self.kind}", f"holds {bad} numbers that are not finite", "lower the learning rate")
        if name in self.sparse and (rows := packed[f"{name}/rows"]).numel():
            if int(rows.min()) < 0 or int(rows.max()) >= shape[0]:
                raise _refused(
                    f"{name}/rows", f"counts from {rows.min()} to {rows.max()}", f"send rows from 0 to {shape[0] - 1}"
                )
            if not bool((rows[1:] > rows[:-1]).all()):
                raise _refused(f"{name}/rows", "is not strictly ascending", "send each row once and in order")


def subtract(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the delta from one state to another, to be packed.

    `add(before, delta)` is `after` exactly where each number of the one is between half and twice that of the other or
    one of them is 0 (the delta is then exact; Sterbenz), and everywhere within one unit in the last place of the larger
    of the two: no float32 delta could do better, as that between 1e8 and 1e-3 has no room for the latter's digits.

    Args:
        after: float32 tensors.
        before: of the same names and shapes, on the same devices.

    Raises:
        FederationError: names, shapes or dtypes differ.
    """
    _check_alike(after, before)
    return {name: tensor.detach() - before[name].detach() for name, tensor in after.items()}


def add(before: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the state that a delta leads to.

    Args:
        before: float32 tensors.
        delta: of the same names and shapes, on the same devices.

    Raises:
        FederationError: names, shapes or dtypes differ.
    """
    _check_alike(delta, before)
    return {name: tensor.detach() + delta[name].detach() for name, tensor in before.items()}


def _quantise(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Round float32 values to int8 steps: the steps, of the same shape, and their lengths, as `Codec` says."""
    table = (values.flatten(1) if values.ndim > 1 else values.reshape(1, values.numel())).contiguous()
    largest = table.abs().amax(1) if table.shape[1] else table.new_zeros(table.shape[0])
    scale = (largest / _STEPS).clamp_(_LEAST_SCALE, _MOST_SCALE)
    steps = table / scale[:, None]
    low = steps.floor()
    # Compared, not added to the number before its floor: a sum near 127 would round away all but 17 bits of u.
    up = torch.rand(table.shape, generator=generator) < steps.sub_(low)
    rounded = low.add_(up).clamp_(-_STEPS, _STEPS).to(torch.int8)
    return rounded.reshape(values.shape), scale.reshape(values.shape[:1] if values.ndim > 1 else ())


def _float32(name: str, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    if tensor.dtype != torch.float32:
        raise FederationError(f"delta or residual of tensor {name} is {tensor.dtype}; only float32 can be packed")
    if shape is not None and tensor.shape != shape:
        got = f"has shape {_shape(tensor.shape)}, its delta {_shape(shape)}"
        raise FederationError(f"the residual of tensor {name} {got}; start from an empty one")
    return tensor.detach().cpu()


def _check_alike(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    if differing := tensors.keys() ^ others.keys():
        raise FederationError(f"tensor {_list(differing)} is on one side of a delta only; give both sides all tensors")
    for name, tensor in tensors.items():
        forms = [f"{side.dtype} {_shape(side.shape)}" for side in (tensor, others[name])]
        if forms[0] != forms[1] or tensor.dtype != torch.float32:
            raise FederationError(f"tensor {name} is {forms[0]} and {forms[1]}; a delta needs float32 of one shape")


def _refused(part: str, reason: str, remedy: str) -> FederationError:
    return FederationError(f"packed tensor {part} {reason}; {remedy}")


def _list(names: Iterable[object]) -> str:
    shown = sorted(map(repr, names))  # repr: a hostile name must not break the line
    some = ", ".join(name if len(name) <= _NAME_CHARACTERS else f"{name[:_NAME_CHARACTERS]}..." for name in shown[:3])
    return some if len(shown) <= 3 else f"{some} and {len(shown) - 3} more"


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''})"
