"""The paper's claims about retrieval held against what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from caravan.app.reproduction.findings import Claim, verdict
from caravan.app.reproduction.frame import Bench
from caravan.app.reproduction.spam import FIGURES, Spam
from caravan.app.reproduction.trials import interval, listed, recall_at_1, seeds_text

PAPER = {
    "MIPS": FIGURES["MIPS"],
    "classifier alone": FIGURES["classifier"],
    "adapter + classifier": FIGURES["adapter + classifier"],
}
_CLASSES = 173  # the paper's, of arXiv

Rows = dict[tuple[str, str], list[dict[str, Any]]]  # by data set and method: an outcome a seed, with "data", the counts


def claims(bench: Bench, found: Rows, sms: Spam | None) -> list[Claim]:
    """Hold each claim against the figures; the three of SMS spam cannot be tested without it."""
    if sms is None:
        three = [_absent(method, figure) for method, figure in PAPER.items()]
    else:
        three = [_mips(bench, found, sms), _head(bench, found), _adapter(bench, found, sms)]
    return [*three, _time(bench, found), _order(bench, found), _classes(bench)]


def _absent(method: str, figure: float) -> Claim:
    return Claim(
        says=f"SMS spam, {method}",
        paper=f"{figure}%",
        ours="-",
        verdict=verdict(None),
        reason="The data set is not here.",
    )


def _mips(bench: Bench, found: Rows, sms: Spam) -> Claim:
    outcomes = found["sms_spam", "MIPS"]
    mean, low, high = recall_at_1(outcomes)
    shares = [100 * trial["right"] / trial["messages"] for trial in sms.prompts]
    best = min(shares, key=lambda each: abs(each - FIGURES["MIPS"]))
    nearest = next(trial for trial, each in zip(sms.prompts, shares, strict=True) if each == best)
    called = 100 * nearest["called_spam"] / nearest["messages"]
    of_distinct = 100 * nearest["right_of_distinct"] / nearest["distinct"]
    return Claim(
        says="SMS spam, MIPS on a frozen model",
        paper=f"{FIGURES['MIPS']}%",
        ours=f"{mean:.2f}%; over {len(shares)} ways of MIPS {min(shares):.2f} to {max(shares):.2f}%",
        interval=interval(low, high),
        verdict=verdict(low <= FIGURES["MIPS"] <= high),
        reason=(
            f"{sms.collection}: a rule that calls every message spam gets {sms.always:.2f}%, so {FIGURES['MIPS']}% is "
            f"what is left where nearly every message is called spam. Of all label texts, poolings and scores tried, "
            f"the nearest got {best:.2f}% ({nearest['backbone']}, {nearest['pooling']}, {nearest['score']}, called "
            f"{called:.0f}% spam; {of_distinct:.2f}% of distinct texts). It measures two label texts, not vector "
            f"search: 1-NN over messages finds {recall_at_1(found['sms_spam', '1-NN'])[0]:.2f}%."
        ),
        data=outcomes[0]["data"],
        seeds="none needed",
    )


def _head(bench: Bench, found: Rows) -> Claim:
    outcomes = found["sms_spam", "classifier alone"]
    mean, low, high = recall_at_1(outcomes)
    return Claim(
        says="SMS spam, classifier alone",
        paper=f"{FIGURES['classifier']}%",
        ours=f"{mean:.2f}%",
        interval=interval(low, high),
        verdict=verdict(mean >= FIGURES["classifier"] or high >= FIGURES["classifier"]),
        reason="Held where ours reaches the figure, or its interval does; held-out messages, no text on both sides.",
        data=outcomes[0]["data"],
        seeds=seeds_text(bench.seeds),
    )


def _adapter(bench: Bench, found: Rows, sms: Spam) -> Claim:
    goal = FIGURES["adapter + classifier"]
    outcomes = found["sms_spam", "adapter + classifier"]
    mean, low, high = recall_at_1(outcomes)
    by_protocol = {
        name: statistics.mean(100 * outcome["adapter"]["recall@1"]["value"] for outcome in each)
        for name, each in sms.protocols.items()
    }
    nearest = min(by_protocol, key=lambda name: abs(by_protocol[name] - goal))
    listed = ", ".join(f"{name} {value:.2f}%" for name, value in by_protocol.items())
    return Claim(
        says="SMS spam, adapter + classifier",
        paper=f"{goal}%",
        ours=f"{mean:.2f}% held out; {listed}",
        interval=interval(low, high),
        verdict=verdict(low <= goal <= high or mean >= goal),
        reason=(
            f"With the paper's passes and no regularisation, the protocol nearest to the figure is: {nearest} "
            f"({by_protocol[nearest]:.2f}%). By arithmetic alone, one ranking can have given all three figures of the "
            f"paper on {' or '.join(sms.fits) or 'no usual part'}, and on no other usual part (see the table)."
        ),
        data=outcomes[0]["data"],
        seeds=seeds_text(bench.seeds),
    )


def _time(bench: Bench, found: Rows) -> Claim:
    name = "sms_spam" if ("sms_spam", "MIPS") in found else next(iter(found))[0]
    head = [method for data, method in found if data == name and method.startswith("classifier alone")][-1]
    seconds = [
        statistics.median(outcome["seconds"] for outcome in found[name, method])
        for method in (head, "adapter + classifier")
    ]
    ratio = seconds[1] / seconds[0]
    return Claim(
        says="Training the classifier alone takes under a minute, with the adapter about 32 minutes",
        paper="< 1 min against 32 min (32 times)",
        ours=f"{seconds[0]:.1f} s against {seconds[1] / 60:.1f} min ({ratio:.0f} times)",
        verdict=verdict(seconds[0] < 60 and ratio > 5) if not bench.quick else verdict(None),
        reason=(
            "Held where the head takes under a minute, encoding included, and the adapter several times (more than 5) "
            "as long; how many times depends on backbone, machine and passes."
            + (" Not judged in the quick form, which trains for few passes on a part." if bench.quick else "")
        ),
        data=found[name, head][0]["data"],
        seeds=seeds_text(bench.seeds),
    )


def _order(bench: Bench, found: Rows) -> Claim:
    """MIPS < classifier < adapter, on every data set."""
    gains, compared = [], []
    for name in dict.fromkeys(name for name, _ in found):
        same = [method for data, method in found if data == name and method.startswith("classifier alone")][-1]
        places = [recall_at_1(found[name, method])[0] for method in ("MIPS", same, "adapter + classifier")]
        gains.append((places[1] - places[0], places[2] - places[1]))
        compared.append(f"{name} {places[0]:.1f} / {places[1]:.1f} / {places[2]:.1f}")
    return Claim(
        says="MIPS < classifier alone < adapter + classifier, whatever the data",
        paper="12.36 < 97.02 < 99.95 on SMS spam",
        ours="; ".join(compared),
        verdict=verdict(all(first > 0 and second > 0 for first, second in gains)),
        reason=_order_reason(gains),
        data=listed(outcomes[0]["data"] for (_, method), outcomes in found.items() if method == "adapter + classifier"),
        seeds=seeds_text(bench.seeds),
    )


def _order_reason(gains: Sequence[tuple[float, float]]) -> str:
    first, second = ([gain[place] for gain in gains] for place in (0, 1))
    return (
        f"Both steps must gain on every data set, trained on the same queries: the classifier gains {min(first):+.1f} "
        f"to {max(first):+.1f} points on MIPS, the adapter {min(second):+.1f} to {max(second):+.1f} on the classifier."
    )


def _classes(bench: Bench) -> Claim:
    here = bench.data is not None and (bench.data / "arxiv").is_dir()
    labels: Mapping[str, None] = {}
    if here:
        dataset = bench.dataset("arxiv")
        labels = dict.fromkeys(doc_id for example in dataset.train for doc_id in example.doc_ids)
    return Claim(
        says="arXiv has 173 primary categories",
        paper=str(_CLASSES),
        ours=str(len(labels)) if here else "-",
        verdict=verdict(len(labels) == _CLASSES if here else None),
        reason=(
            "Primary categories with at least one paper in our data (1990 to 2019, defunct archives included). It "
            "lacks the largest category files and the categories since; the paper does not say which snapshot it took."
            if here
            else "The data set is not here."
        ),
        data="arxiv, all of train" if here else "",
        seeds="none needed",
    )
