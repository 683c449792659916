"""One round without an engine: what a client sends, whether it may be used, and the average of what may."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from caravan.errors import FederationError

_DTYPES = (torch.float64, torch.float32, torch.float16)  # those NumPy has too; bfloat16 it has not
_MOST_EXAMPLES = 2**53  # beyond it float64 no longer holds every whole number
_REASON_CHARACTERS = 300  # enough for a path and a cause; a client must not be able to flood the terminal


@dataclass(frozen=True)
class Update:
    """What one client sends after one round of local training.

    Attributes:
        client: the client's name.
        tensors: its trained tensors by name, same names, shapes and dtypes as the global ones.
        examples: how many training examples they stand for, at least 1: the client's weight in the average.
        metrics: further numbers the client reports; may be empty.
    """

    client: str
    tensors: dict[str, Tensor]
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client whose work did not enter a round, and why.

    Attributes:
        client: the client's name.
        reason: one line.
    """

    client: str
    reason: str


@dataclass(frozen=True)
class RoundReport:
    """What one round did.

    Attributes:
        round: its number, 1 for the first.
        asked: names of the clients that were asked to train, in the order given to `run_federation`.
        clients: those whose updates were used, in the same order.
        examples: their example counts, in the same order; 0 where secure aggregation hides them.
        metrics: what they reported, in the same order.
        failures: those that in the end raised, did not answer or were refused, in that order too.
        retried: failures after which the round, short of its quorum, asked these or other clients again.
        bytes_up: bytes of the messages from all clients, refused ones included (see `messages.content_bytes`).
        bytes_down: bytes of the messages to all clients.
        traffic: both by client: {"up": bytes, "down": bytes}.
        seconds: wall-clock time from sending to averaged.
        norms: L2 norms of their changes, in the order of `clients`; none where single updates are not for others to
            know of: masked, or hidden by the server's noise.
        agreement: of these changes, see `drift.Drift`; None where `norms` are none, or of fewer than two.
    """

    round: int
    asked: tuple[str, ...]
    clients: tuple[str, ...]
    examples: tuple[int, ...]
    metrics: tuple[dict[str, float], ...]
    failures: tuple[Failure, ...]
    retried: tuple[Failure, ...]
    bytes_up: int
    bytes_down: int
    traffic: dict[str, dict[str, int]]
    seconds: float
    norms: tuple[float, ...] = ()
    agreement: float | None = None


def check(
    update: Update,
    reference: Mapping[str, Tensor],
    *,
    max_update_norm: float | None = None,
    max_examples: int | None = None,
) -> None:
    """Refuse an update that must not enter the global tensors.

    Args:
        update: what the client sent.
        reference: the global tensors the round began with, any shapes.
        max_update_norm: largest L2 norm of the update less the reference, over all tensors together; None: no bound.
        max_examples: largest example count; None: no bound.

    Raises:
        FederationError: it has other names, shapes or dtypes than the reference, holds a number that is not finite,
            counts fewer than 1 or too many examples, or is too far from the reference; the message names the client
            and the reason.
    """
    _check_form(update, reference)
    if max_examples is not None and update.examples > max_examples:
        raise _refused(
            update, f"its example count is {update.examples}, max_examples is {max_examples}; correct one of them"
        )
    for name, tensor in update.tensors.items():
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            bad = tensor.numel() - int(finite.sum())
            raise _refused(
                update, f"{bad} of {tensor.numel()} values of tensor {name} are not finite; lower its learning rate"
            )
    if max_update_norm is not None and (norm := update_norm(update, reference)) > max_update_norm:
        raise _refused(
            update, f"its update has norm {norm:.4g}, max_update_norm is {max_update_norm:g}; lower its learning rate"
        )


def update_norm(update: Update, reference: Mapping[str, Tensor]) -> float:
    """Give the L2 norm of what an update changes in the reference, over all tensors together, in float64."""
    changes = (update.tensors[name].detach().double() - tensor.double() for name, tensor in reference.items())
    return math.hypot(*(float(torch.linalg.vector_norm(change)) for change in changes))


def average(updates: Iterable[Update], *, trained_from: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    r"""Average the updates of a round, each weighted by its examples (FedAvg; arXiv:1602.05629, algorithm 1).

    $$ \theta = \sum_i \frac{n_i}{n} \theta_i, \quad n = \sum_i n_i $$

    Updates are added up as they come, so a thousand of them need the memory of a few. Sums are kept in twice float64's
    digits (Knuth's two-sum), so the result does not depend on who answered first; with float32 tensors the average of
    equal updates is that update, bit for bit.

    With `trained_from` each row (of a scalar: all of it) is averaged over those clients alone that trained it, i then
    running over them in numerator and n: the rows of a head stand for documents, and a client that has no query for a
    document sends its row as it got it, which would hold the others back. (Federated submodel averaging,
    arXiv:2109.07704, scales the step of a feature by the number of clients over the number of those that have it.)

    Args:
        updates: one or more, of distinct clients and equal form. Values are not looked at: `check` them before.
        trained_from: the tensors the round began with; None: every row is averaged over all clients.

    Returns:
        New tensors with the names, shapes and dtypes of the updates. Of one update: bit-identical copies.

    Raises:
        FederationError: there is no update, a client comes twice, or the updates differ in names, shapes or dtypes.
    """
    first: Update | None = None
    clients: set[str] = set()
    weights: dict[str, Tensor | float] = {}  # one for all of a tensor, or one a row
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for update in updates:
        if update.client in clients:
            raise _refused(update, "it sent two updates for one round; send one")
        first = first or update
        _check_form(update, first.tensors)
        clients.add(update.client)
        for name, tensor in update.tensors.items():
            if name not in sums:
                zeros = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
                sums[name], weights[name] = (zeros, zeros.clone()), 0.0
            weight = float(update.examples)
            if trained_from is not None:
                weight = weight * _changed_rows(tensor.detach(), trained_from[name])
            # n_i * theta_i is exact for float32 values: dividing once at the end rounds less than weights n_i/n.
            _add(*sums[name], tensor.detach().to(torch.float64) * weight)
            weights[name] = weights[name] + weight
    if first is None:
        raise FederationError("there is no update to average: every client failed or was refused; see their reasons")
    if len(clients) == 1:
        return {name: tensor.detach().clone() for name, tensor in first.tensors.items()}
    averaged: dict[str, Tensor] = {}
    for name, (high, low) in sums.items():
        mean = (high + low) / weights[name]
        if trained_from is not None:
            mean = torch.where(torch.as_tensor(weights[name]) > 0, mean, trained_from[name])
        averaged[name] = mean.to(first.tensors[name].dtype)
    return averaged


def _changed_rows(tensor: Tensor, before: Tensor) -> Tensor:
    """Which rows differ, float64: shape (R, 1, ...) for a tensor of R rows, () for a scalar."""
    changed = tensor != before
    return (changed.flatten(1).any(dim=1).view(-1, *[1] * (tensor.ndim - 1)) if tensor.ndim > 1 else changed).double()


def _add(high: Tensor, low: Tensor, term: Tensor) -> None:
    """Add to a sum that is kept in two parts; `low` takes what rounding `high` loses."""
    total = high + term
    taken = total - high
    low += (high - (total - taken)) + (term - taken)
    high.copy_(total)


def judge(
    client: str,
    answer: Update | str,
    reference: Mapping[str, Tensor],
    *,
    max_update_norm: float | None = None,
    max_examples: int | None = None,
) -> Update | Failure:
    """Part what is usable of a round's answers from what is not.

    Args:
        client: who was asked.
        answer: its update, or one line that says why there is none.
        reference: the global tensors the round began with.
        max_update_norm: see `check`.
        max_examples: see `check`.
    """
    if isinstance(answer, str):
        return Failure(client, answer)
    try:
        check(answer, reference, max_update_norm=max_update_norm, max_examples=max_examples)
    except FederationError as error:
        return Failure(client, str(error).removeprefix(_prefix(answer)))
    return answer


def list_reasons(failures: Sequence[Failure]) -> str:
    """Say every failure in one line, clients with the same reason together."""
    clients_by_reason: dict[str, list[str]] = {}
    for failure in failures:
        clients_by_reason.setdefault(failure.reason, []).append(failure.client)
    return "; ".join(f"{', '.join(clients)}: {reason}" for reason, clients in clients_by_reason.items())


def check_plan(initial: Mapping[str, Tensor], clients: Sequence[str], *, rounds: int, first_round: int) -> None:
    """Refuse a federated run that could not be carried out.

    Raises:
        FederationError: there is no tensor, or one that cannot be sent and averaged; the clients are none or not
            distinct; a round's number is out of range.
    """
    if not initial:
        raise FederationError("there are no tensors to train; a federated run needs an adapter or a head")
    for name, tensor in initial.items():
        if tensor.dtype not in _DTYPES:
            raise FederationError(f"tensor {name} is {tensor.dtype}, which cannot be sent; make it float32")
        if not bool(torch.isfinite(tensor).all()):
            raise FederationError(f"tensor {name} is not finite at the start; begin from a sound model")
    if not clients or len(set(clients)) != len(clients):
        raise FederationError(f"a federated run needs one or more clients of distinct names, got {list(clients)}")
    if not 1 <= first_round <= rounds + 1:
        raise FederationError(f"first_round is {first_round}, rounds is {rounds}; it must be from 1 to rounds + 1")


def one_line(text: str) -> str:
    """Make one short printable line of whatever a client or an engine says."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _REASON_CHARACTERS else f"{line[: _REASON_CHARACTERS - 3]}..."


def _check_form(update: Update, reference: Mapping[str, Tensor]) -> None:
    count = update.examples
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_EXAMPLES:
        raise _refused(update, f"its example count is {count!r}; a whole number from 1 to 2**53 is needed")
    if missing := reference.keys() - update.tensors.keys():
        raise _refused(update, f"tensor {_names(missing)} is missing; send every trainable tensor")
    if unknown := update.tensors.keys() - reference.keys():
        raise _refused(update, f"tensor {_names(unknown)} is unknown here; send only {_names(reference)}")
    for name, expected in reference.items():
        tensor = update.tensors[name]
        if not expected.is_floating_point():
            raise FederationError(f"tensor {name} is {expected.dtype}: only floating-point tensors can be averaged")
        if tensor.shape != expected.shape:
            raise _refused(
                update,
                f"tensor {name} has shape {tuple(tensor.shape)}, the global one {tuple(expected.shape)}; "
                "train from the global tensors and the same settings",
            )
        if tensor.dtype != expected.dtype:
            raise _refused(update, f"tensor {name} is {tensor.dtype}, the global one {expected.dtype}; send that dtype")


def _refused(update: Update, reason: str) -> FederationError:
    return FederationError(f"{_prefix(update)}{reason}")


def _prefix(update: Update) -> str:
    return f"client {update.client}: "


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
