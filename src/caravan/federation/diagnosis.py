"""What ails a federation, told from its rounds: clients that pull apart, and lines slower than the work."""

from collections.abc import Mapping, Sequence
from typing import Any

from caravan.config import Config
from caravan.training.diagnosis import Finding

_UNDONE = 0.5  # nearer to the start than to where clients ended; 0.05 to 0.2 in trainings here that went well
_DWARFED = 4.0  # times the work: four fifths of the time goes to the line


def drifting(stage: str, rounds: Sequence[Mapping[str, Any]], config: Config) -> Finding | None:
    """Averaging undoes most of what clients have gained, since each went its own way; see `undone_share`.

    The cosine of changes is evidence beside it, but no test of its own: clients with like data, too, go at right angles
    once what they have in common is learned (-0.03 in trainings here that went well, 0.06 in one that did not).
    """
    cosine, undone = _mean_cosine(rounds), undone_share(rounds)
    if undone is None or undone < _UNDONE:
        return None
    federation, epochs = config.federation, getattr(config.training, stage).epochs
    local = epochs / max(1, len(rounds))
    together = "" if cosine is None else f"; the mean cosine between two clients' changes is {cosine:.2f}"
    more = min(epochs, 3 * len(rounds))
    change, settings = [], []
    if more > len(rounds):
        change.append(f"more, shorter rounds: raise federation.rounds to {more} with the same epochs")
        settings.append(f"federation.rounds={more}")
    if federation.strategy == "fedavg":
        change.append('momentum on the server (federation.strategy = "fedavgm"), or hold clients back ("fedprox")')
        settings += ["federation.strategy=fedavgm"]
    elif federation.strategy == "fedprox":
        change.append("hold clients back more: raise federation.proximal_mu")
        settings.append(f"federation.proximal_mu={10 * federation.proximal_mu:g}")
    change.append(f"or lower training.{stage}.learning_rate")
    return Finding(
        f"{stage}: clients drift apart",
        f"the last average but one undid {undone:.0%} of what clients had gained on their own queries{together}",
        f"{local:.3g} epochs on its own between two averages take each client to its own queries' optimum, and uneven "
        "clients to different ones",
        "; ".join(change),
        tuple(settings),
        2,
    )


def undone_share(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """What the last average but one undid, as a share of all that clients had gained until then.

    Only the latest one counts: early averages always undo much, and the next round makes up for it, or does not.

    Returns:
        0 where clients begin their last round as they ended the one before, 1 where they begin it as they began the
        first; None where they say no losses, or had none to compare.
    """
    first: dict[str, float] = {}
    last: dict[str, tuple[float, float, float]] = {}
    ended: dict[str, float] = {}
    for each in rounds:
        for client, metrics in zip(each["clients"], each["metrics"], strict=True):
            if "first_loss" not in metrics or "last_loss" not in metrics:
                continue
            began = metrics["first_loss"]
            first.setdefault(client, began)
            if client in ended:
                last[client] = (first[client], ended[client], began)
            ended[client] = metrics["last_loss"]
    gained = sum(start - end for start, end, _ in last.values())
    lost = sum(again - end for _, end, again in last.values())
    return lost / gained if gained > 0 else None


def _mean_cosine(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """From the agreement s + (1 - s) cos of changes of like length, s being the sum of squared weights."""
    found = []
    for each in rounds:
        total = sum(each["examples"])
        if each.get("agreement") is None or not total:
            continue
        own = sum((count / total) ** 2 for count in each["examples"])
        if own < 1:
            found.append((each["agreement"] - own) / (1 - own))
    return sum(found) / len(found) if found else None


def line_bound(
    stage: str, rounds: Sequence[Mapping[str, Any]], config: Config, *, mbit: float, measured: bool
) -> Finding | None:
    """Sending takes several times as long as working.

    Args:
        stage: what was trained.
        rounds: of that stage, as recorded.
        config: all settings.
        mbit: of the line each way, Mbit/s, of which rounds that were simulated know nothing.
        measured: whether the rounds went over a network; then their own times are taken.
    """
    work = line = sent = 0.0
    for each in rounds:
        seconds = [metrics["seconds"] for metrics in each["metrics"] if "seconds" in metrics]
        if not seconds:
            continue
        most = max((own["up"] + own["down"] for own in each["traffic"].values()), default=0)
        work, sent = work + max(seconds), sent + most
        line += max(0.0, each["seconds"] - max(seconds)) if measured else 8 * most / (mbit * 1e6)
    if not work or line < _DWARFED * work:
        return None
    how = "waiting took" if measured else f"at {mbit:g} Mbit/s sending would take"
    change, settings = [], []
    if config.federation.codec in ("none", "float32", "float16") and not config.federation.secure_aggregation:
        change.append('pack what is sent: federation.codec = "int8"')
        settings.append("federation.codec=int8")
    if stage == "adapter" and config.adapter.kind in ("full", "lowrank"):
        change.append('train fewer numbers: adapter.kind = "core"')
        settings.append("adapter.kind=core")
    if config.head.hidden:
        change.append("a head without a pre-classifier: head.hidden = 0")
        settings.append("head.hidden=0")
    if len(rounds) > 1:
        change.append("more work between two rounds: fewer federation.rounds with the same epochs")
        settings.append(f"federation.rounds={max(1, len(rounds) // 2)}")
    return Finding(
        f"{stage}: the line takes longer than the work",
        f"{sent / 2**20 / len(rounds):.2f} MiB a client and round: {how} {line:.2f} s in all, the slowest clients' "
        f"work {work:.2f} s",
        f"much is sent for little work: {getattr(config.training, stage).epochs} epochs in {len(rounds)} rounds",
        "; ".join(change) or "a faster line",
        tuple(settings),
        1,
    )
