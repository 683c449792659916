"""Three sites, a training without a model, and what it must come to."""

import torch

from caravan.federation.flower import RoundReport, run_federation
from caravan.federation.rounds import Update, average

SITES = ["oslo", "lima", "pune"]


def start_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"adapter": torch.randn(4, 4, generator=generator), "scale": torch.tensor(20.0)}


def toy_train(client: str, tensors: dict[str, torch.Tensor], round_number: int) -> Update:
    """A step that depends on client, round and the tensors' values, so that nothing can be mixed up unseen."""
    generator = torch.Generator().manual_seed(1000 * round_number + sum(map(ord, client)))
    moved = {name: tensor * 0.9 + torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    return Update(client, moved, len(client) + ord(client[0]) % 7, {"loss": float(moved["adapter"].sum())})


def plain_loop(clients: list[str], rounds: range) -> dict[str, torch.Tensor]:
    tensors = start_tensors()
    for number in rounds:
        tensors = average([toy_train(client, tensors, number) for client in clients])
    return tensors


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes()


def reports_of(local_train, **options) -> list[RoundReport]:
    reports: list[RoundReport] = []
    run_federation(
        start_tensors(),
        SITES,
        local_train,
        on_round=lambda report, _: reports.append(report),
        **{"rounds": 1, **options},
    )
    return reports
