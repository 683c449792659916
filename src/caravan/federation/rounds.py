"""One round without an engine: what a client sends, whether it may be used, and the average of what may."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from caravan.errors import FederationError

_DTYPES = (torch.float64, torch.float32, torch.float16)  # those NumPy has too; bfloat16 it has not
_MOST_EXAMPLES = 2**53  # beyond it float64 no longer holds every whole number


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
        clients: names of the clients whose updates were averaged, in the order given to `run_federation`.
        examples: their example counts, in the same order.
        metrics: what they reported, in the same order.
        failures: clients that raised, did not answer or were refused, in that order too.
        bytes_up: bytes of the tensors as received from all clients (NumPy's .npy format), refused ones included.
        bytes_down: bytes of the tensors as sent to all clients.
        seconds: wall-clock time from sending to averaged.
    """

    round: int
    clients: tuple[str, ...]
    examples: tuple[int, ...]
    metrics: tuple[dict[str, float], ...]
    failures: tuple[Failure, ...]
    bytes_up: int
    bytes_down: int
    seconds: float


def check(update: Update, reference: Mapping[str, Tensor]) -> None:
    """Refuse an update that must not be averaged into the global tensors.

    Args:
        update: what the client sent.
        reference: the global tensors, any shapes; only names, shapes and dtypes are looked at.

    Raises:
        FederationError: it has other names, shapes or dtypes than the reference, holds a number that is not finite, or
            counts fewer than 1 example; the message names the client, the tensor and the reason.
    """
    _check_form(update, reference)
    for name, tensor in update.tensors.items():
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            bad = tensor.numel() - int(finite.sum())
            raise _refused(
                update, f"{bad} of {tensor.numel()} values of tensor {name} are not finite; lower its learning rate"
            )


def average(updates: Sequence[Update]) -> dict[str, Tensor]:
    r"""Average the updates of a round, each weighted by its examples (FedAvg; arXiv:1602.05629, algorithm 1).

    $$ \theta = \sum_i \frac{n_i}{n} \theta_i, \quad n = \sum_i n_i $$

    The sum runs in float64 and in the order of the clients' names, so the result does not depend on who answered first;
    with float32 tensors the average of equal updates is that update, bit for bit.

    Args:
        updates: one or more, of distinct clients and equal form. Values are not looked at: `check` them before.

    Returns:
        New tensors with the names, shapes and dtypes of the updates. Of one update: bit-identical copies.

    Raises:
        FederationError: there is no update, a client comes twice, or the updates differ in names, shapes or dtypes.
    """
    if not updates:
        raise FederationError("there is no update to average: every client failed or was refused; see their reasons")
    ordered = sorted(updates, key=lambda update: update.client)
    for before, update in itertools.pairwise(ordered):
        if before.client == update.client:
            raise _refused(update, "it sent two updates for one round; send one")
    reference = ordered[0].tensors
    for update in ordered:
        _check_form(update, reference)
    if len(ordered) == 1:
        return {name: tensor.detach().clone() for name, tensor in reference.items()}
    total = sum(update.examples for update in ordered)
    averaged = {}
    for name, tensor in reference.items():
        weighted = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        for update in ordered:
            # n_i * theta_i is exact for float32 values: dividing once at the end rounds less than weights n_i/n.
            weighted += update.tensors[name].detach().to(weighted) * float(update.examples)
        averaged[name] = (weighted / float(total)).to(tensor.dtype)
    return averaged


def close_round(
    number: int, answers: Mapping[str, Update | str], reference: Mapping[str, Tensor], *, min_clients: int
) -> tuple[dict[str, Tensor], tuple[Update, ...], tuple[Failure, ...]]:
    """Average what is usable of a round's answers.

    Args:
        number: the round, for messages.
        answers: for each client its update, or one line that says why there is none.
        reference: the global tensors the round began with.
        min_clients: usable updates that are needed, at least 1.

    Returns:
        The new global tensors, the updates they average, and the clients that are not among them; both in the order of
        the answers.

    Raises:
        FederationError: fewer updates are usable than are needed; the message lists every reason.
    """
    updates: list[Update] = []
    failures: list[Failure] = []
    for client, answer in answers.items():
        if isinstance(answer, str):
            failures.append(Failure(client, answer))
            continue
        try:
            check(answer, reference)
        except FederationError as error:
            failures.append(Failure(client, str(error).removeprefix(_prefix(answer))))
        else:
            updates.append(answer)
    if len(updates) < min_clients:
        raise FederationError(
            f"round {number}: {len(updates)} of {len(answers)} clients sent a usable update, "
            f"min_clients is {min_clients} ({_list(failures)}); repair those clients or lower min_clients"
        )
    return average(updates), tuple(updates), tuple(failures)


def check_plan(
    initial: Mapping[str, Tensor], clients: Sequence[str], *, rounds: int, first_round: int, min_clients: int
) -> None:
    """Refuse a federated run that could not be carried out.

    Raises:
        FederationError: there is no tensor, or one that cannot be sent and averaged; the clients are none or not
            distinct; a number is out of range.
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
    if not 1 <= min_clients <= len(clients):
        raise FederationError(
            f"min_clients is {min_clients} of {len(clients)} clients; it must be from 1 to their number"
        )


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


def _list(failures: Sequence[Failure]) -> str:
    clients_by_reason: dict[str, list[str]] = {}
    for failure in failures:
        clients_by_reason.setdefault(failure.reason, []).append(failure.client)
    return "; ".join(f"{', '.join(clients)}: {reason}" for reason, clients in clients_by_reason.items())


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
