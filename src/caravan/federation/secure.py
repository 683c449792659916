"""Secure aggregation: clients mask what they send, the masks cancel in the sum, and the server sees the sum alone.

The protocol is SecAgg+ (Bell et al., "Secure single-server aggregation with (poly)logarithmic overhead", CCS 2020) as
Flower has it. Flower draws the masks from a 32-bit seed, which a curious server could search; here they are drawn
from all of the 256-bit secret.
"""

import hashlib
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from caravan.errors import FederationError
from caravan.federation.rounds import one_line

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.workflow.secure_aggregation import secaggplus_workflow
    from flwr.serverapp import Grid
    from numpy.typing import NDArray

_CLIP = 4.0  # the most that a number may change in a round; a change is sent in steps of 2 * _CLIP / _STEPS
_STEPS = 2**22
_MODULUS = 2**32
_NEIGHBOURS = 21  # of whom a client is masked against where there are more: the work grows with them, not with all
_SHARE = 2 / 3  # of a client's neighbours must stay until the end; as many, with the server, could unmask it
_FAILED = 1  # Flower's error codes of its own are larger
_DRAWING = (
    "flwr.client.mod.secure_aggregation.secaggplus_mod",
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
)
_EXAMPLES = "fitres.num_examples"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SecureSum:
    """What a server learns of a round.

    Attributes:
        change: the weighted mean of what the tensors changed by; None where too few clients stayed.
        nodes: node ids of those who are in it.
        failures: why others are not, by node id.
        sent: bytes of keys, shares and masked tensors, by node id.
    """

    change: dict[str, Tensor] | None
    nodes: frozenset[int]
    failures: dict[int, str]
    sent: dict[int, int]


def mask(message: "Message", context: "Context", answer: "Callable[[Message, Context], Message]") -> "Message":
    """Be a mod of Flower's ClientApp: take part in the protocol if the server asks for it, else do nothing.

    Args:
        message: one of the four of a round; the third has the content that `answer` needs, its `arrays` in float32.
        context: keeps keys and shares from one message of a round to the next.
        answer: trains; its reply has `arrays`, the tensors after the training, and `metrics` with the example count, or
            `config` with a failure.
    """
    from flwr.app import Error, Message
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

    if RECORD_KEY_CONFIGS not in message.content.config_records:
        return answer(message, context)
    from flwr.client.mod import secaggplus_mod

    _use_long_seeds()

    def train(message: "Message", context: "Context") -> "Message":
        return Message(_legacy_answer(message.content, answer(message, context).content), reply_to=message)

    try:
        reply = secaggplus_mod(message, context, train)
    except Exception as error:
        _log.debug("secure aggregation failed", exc_info=True)
        return Message(Error(_FAILED, one_line(str(error))), reply_to=message)
    if _EXAMPLES in reply.content.metric_records:
        # The count is masked with the tensors, and stands beside them in the clear as well.
        reply.content.metric_records[_EXAMPLES]["num_examples"] = 1
    return reply


def secure_sum(
    grid: "Grid",
    messages: Sequence["Message"],
    reference: Mapping[str, Tensor],
    *,
    number: int,
    max_examples: int,
    timeout: float,
) -> SecureSum:
    """Run the four exchanges of a round.

    Args:
        grid: the network.
        messages: what would be sent to each client without masks.
        reference: the global tensors that are in them.
        number: the round's.
        max_examples: the largest weight a client can have; the smaller a client's share of it, the coarser its steps.
        timeout: seconds for each exchange.
    """
    from flwr.server.workflow.secure_aggregation import secaggplus_workflow

    _use_long_seeds()
    contents = {message.metadata.dst_node_id: message.content for message in messages}
    recorder = _Recorder(grid)
    context = _context(contents, number)

    class Workflow(secaggplus_workflow.SecAggPlusWorkflow):
        """Flower's, with our messages for its third exchange."""

        def setup_stage(
            self, grid: "Grid", context: "LegacyContext", state: "secaggplus_workflow.WorkflowState"
        ) -> bool:
            went_well = super().setup_stage(grid, context, state)
            state.nid_to_fitins = contents
            return went_well

    workflow = Workflow(
        1.0 if len(contents) <= _NEIGHBOURS else _NEIGHBOURS,
        _SHARE,
        max_weight=float(max_examples),
        clipping_range=_CLIP,
        quantization_range=_STEPS,
        modulus_range=_MODULUS,
        timeout=timeout,
    )
    workflow(cast(Any, recorder), context)
    arrays, nodes = cast(_Taking, context.strategy).taken
    if arrays is None:
        return SecureSum(None, frozenset(), recorder.failures, dict(recorder.sent))
    change = {
        name: torch.from_numpy(array).to(reference[name].dtype).reshape(reference[name].shape)
        for name, array in zip(sorted(reference), arrays, strict=True)
    }
    return SecureSum(change, nodes, recorder.failures, dict(recorder.sent))


class _Recorder:
    """A grid of which Flower's workflow uses one method, that notes what it would throw away."""

    def __init__(self, grid: "Grid") -> None:
        self._grid = grid
        self.failures: dict[int, str] = {}
        self.sent: Counter[int] = Counter()

    def send_and_receive(self, messages: Iterable["Message"], *, timeout: float | None = None) -> list["Message"]:
        messages = list(messages)
        for message in messages:  # whose content is one for all, and a client in this process takes out what it reads
            message.content = _own(message.content)
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_error():
                self.failures[reply.metadata.src_node_id] = one_line(str(reply.error.reason))
            else:
                self.sent[reply.metadata.src_node_id] += _bytes_of(reply.content)
        return replies


class _Taking:
    """What Flower's workflow needs of a strategy: whom to ask, and where to leave the sum."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = nodes
        self.taken: tuple[Sequence[NDArray[Any]] | None, frozenset[int]] = (None, frozenset())

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, Any]]:
        from flwr.common import FitIns, Parameters

        return [(_Proxy(node), FitIns(Parameters([], "numpy.ndarray"), {})) for node in self._nodes]

    def aggregate_fit(self, server_round: int, results: Sequence[tuple[Any, Any]], failures: Any) -> tuple[None, Any]:
        from flwr.common import parameters_to_ndarrays

        nodes = frozenset(proxy.node_id for proxy, _ in results)
        self.taken = (parameters_to_ndarrays(results[0][1].parameters), nodes)
        return None, {}


@dataclass(frozen=True)
class _Proxy:
    node_id: int


def _context(nodes: Iterable[int], number: int) -> "LegacyContext":
    from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

    state = RecordDict(
        {MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: number}), MAIN_PARAMS_RECORD: ArrayRecord()}
    )
    context = Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
    return LegacyContext(context, strategy=cast(Any, _Taking(nodes)))


def _legacy_answer(asked: "RecordDict", answered: "RecordDict") -> "RecordDict":
    """Put a client's reply into the form that Flower's mod reads: what changed, by name, and the example count."""
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict

    if "config" in answered.config_records:
        raise FederationError(str(answered.config_records["config"]["failure"]))
    start, trained = asked.array_records["arrays"], answered.array_records["arrays"]
    # Of a number that is no array Flower's workflow would not take the clipping off again.
    changes = [np.atleast_1d(trained[name].numpy() - start[name].numpy()) for name in sorted(start)]
    for name, change in zip(sorted(start), changes, strict=True):
        # Flower would cut it off without a word; and of a sum nobody can tell later whose part is not finite.
        if not float(np.abs(change).max(initial=0.0)) <= _CLIP:
            raise FederationError(
                f"a number of tensor {name} changed by more than {_CLIP:g}, which secure aggregation does not carry; "
                "lower its learning rate"
            )
    count = cast(int, answered.metric_records["metrics"]["num-examples"])
    most = cast(int, asked.config_records["config"]["max_examples"])
    if count > most:
        raise FederationError(f"its example count is above max_examples = {most}; correct one of them")
    status = Status(Code.OK, "")
    return fitres_to_recorddict(FitRes(status, ndarrays_to_parameters(changes), count, {}), keep_input=False)


def _own(content: "RecordDict") -> "RecordDict":
    from flwr.app import ConfigRecord, RecordDict

    words = {name: ConfigRecord(dict(record)) for name, record in content.config_records.items()}
    return RecordDict({**content.array_records, **words})


def _bytes_of(content: "RecordDict") -> int:
    values = (value for record in content.config_records.values() for value in record.values())
    parts = (part for value in values for part in (value if isinstance(value, list) else [value]))
    return sum(len(part) for part in parts if isinstance(part, bytes))


def _use_long_seeds() -> None:
    """Have Flower's two sides of the protocol draw masks from the whole secret."""
    for name in _DRAWING:
        cast(Any, importlib.import_module(name)).pseudo_rand_gen = draw_masks


def draw_masks(secret: bytes, modulus: int, shapes: Iterable[tuple[int, ...]]) -> list["NDArray[np.int64]"]:
    """Draw numbers from 0 to `modulus` - 1, by the ChaCha20 key stream of the secret's SHA-256.

    Args:
        secret: shared by those who must draw the same.
        modulus: a power of 2, at most 2**32.
        shapes: of the arrays.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(hashlib.sha256(secret).digest(), bytes(16)), mode=None).encryptor()
    masks = []
    for shape in shapes:
        words = np.frombuffer(stream.update(bytes(4 * int(np.prod(shape, dtype=np.int64)))), dtype="<u4")
        masks.append((words.astype(np.int64) & (modulus - 1)).reshape(shape))
    return masks
