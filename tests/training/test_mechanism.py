import math

import pytest
import torch
from torch import Tensor

from caravan.data.records import Example
from caravan.model.encoder import pad
from caravan.training.checkpoint import Checkpoint
from caravan.training.private import PrivateSteps, StepReport, sum_noise
from caravan.training.trainer import fit, trained_parameters
from toy_privacy import HUGE, OverspentError, Scripted, Spent, only, private_steps, seeded
from toy_training import (
    EXAMPLES,
    UNSEEN,
    VALIDATION,
    Log,
    StoppedError,
    assert_same_bits,
    differ,
    largest_difference,
    move,
    recall,
    toy_config,
    toy_examples,
    toy_retriever,
    trained,
)

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])

DESCENT = {"optimizer": "sgd", "max_gradient_norm": None, "warmup": 0.0}


def one_step(backbone, stage, privacy: PrivateSteps, *, rate: float = 0.5, **settings) -> dict[str, Tensor]:
    """By how much one step of gradient descent moved each tensor, over its learning rate, downhill."""
    retriever = toy_retriever(backbone, hidden=6)
    start = retriever.trainable_state()
    config = toy_config(**{"epochs": 1, "rate": rate, **DESCENT, **settings})
    fit(retriever, EXAMPLES, stage, config, seed=0, privacy=privacy)
    after = retriever.trainable_state()
    rates = {name: rate if name.startswith("head.") else rate / 10 for name in start}
    names = trained_parameters(retriever, stage)
    return {name: (start[name] - after[name]) / rates[name] for name in names}


def gradient_sums(backbone, stage, examples: list[Example], clip: float = HUGE) -> dict[str, Tensor]:
    """The sum of the examples' clipped gradients, by a loop over them with autograd."""
    retriever = toy_retriever(backbone, hidden=6)
    parameters = trained_parameters(retriever, stage)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in examples:
        retriever.zero_grad()
        encoder = retriever.encoder
        scores = retriever.head(encoder(*pad(encoder.tokenize([example.text]), device=torch.device("cpu"))))
        (-scores.log_softmax(dim=1)[0, retriever.catalogue.row(example.doc_ids[0])]).backward()
        norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters.values()))
        for name, parameter in parameters.items():
            sums[name] += parameter.grad * min(1.0, clip / norm)
    return sums


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], scale: float = 1.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name] * scale, rtol=1e-3, atol=1e-5, msg=name)


# Sum, clip, expected size


@both_stages
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_with_nothing_cut_and_nothing_added_all_examples_give_plain_training(backbone, stage, optimizer):
    shared = {**DESCENT, "optimizer": optimizer, "epochs": 4, "weight_decay": 0.1, "label_smoothing": 0.1}
    head = {"hold_unseen": False}
    plain = trained(backbone, stage, toy_config(batch_size=99, **shared), head=head)
    private = trained(backbone, stage, toy_config(batch_size=7, **shared), head=head, privacy=private_steps())
    assert largest_difference(plain, private) < 2e-4
    assert move(toy_retriever(backbone).trainable_state(), plain) > 0.01


@both_stages
@pytest.mark.parametrize("clip", [HUGE, 0.4])
def test_a_step_is_the_clipped_sum_over_the_expected_number_of_units(backbone, stage, clip):
    # 3 of 48 are drawn where 47 are expected: dividing by 3 would let the batch's size out.
    drawn = [2, 11, 40]
    privacy = private_steps(clip=clip, batch=47, source=Scripted([only(drawn, 48)]))
    moved = one_step(backbone, stage, privacy, batch_size=2)
    expected = gradient_sums(backbone, stage, [EXAMPLES[number] for number in drawn], clip)
    assert_close(moved, expected, 1 / 47)


def test_users_are_cut_as_one(backbone):
    # 24 users of two queries each; two are drawn.
    examples = [
        Example(example.text, example.doc_ids, example.query_id, {"user": f"u{number // 2}"})
        for number, example in enumerate(EXAMPLES)
    ]
    source = Scripted([only([3, 7], 24)])
    privacy = private_steps(clip=0.5, batch=23, unit="user", user_column="user", examples_per_user=2, source=source)
    retriever = toy_retriever(backbone, hidden=6)
    start = retriever.trainable_state()
    fit(retriever, examples, "head", toy_config(epochs=1, rate=0.5, batch_size=3, **DESCENT), seed=0, privacy=privacy)
    after = retriever.trainable_state()
    expected = {name: torch.zeros_like(start[name]) for name in trained_parameters(retriever, "head")}
    for user in (3, 7):
        sums = gradient_sums(backbone, "head", EXAMPLES[2 * user : 2 * user + 2])
        norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in sums.values()))
        assert norm > 0.5
        for name, tensor in sums.items():
            expected[name] += tensor * 0.5 / norm
    assert_close({name: (start[name] - after[name]) / 0.5 for name in expected}, expected, 1 / 23)


# Noise


@both_stages
@pytest.mark.parametrize("drawn", [[], [2, 11, 40]], ids=["empty", "three"])
def test_noise_of_sigma_times_clip_is_added_to_the_sum_also_of_nothing(backbone, stage, drawn):
    sigma, clip = 1.5, 0.4
    silent = private_steps(clip=clip, batch=47, source=Scripted([only(drawn, 48)]))
    noisy = private_steps(clip=clip, batch=47, source=Scripted([only(drawn, 48)]), sigma=sigma)
    without = one_step(backbone, stage, silent)
    if not drawn:
        assert all(not tensor.any() for tensor in without.values())
    noise = {name: tensor - without[name] for name, tensor in one_step(backbone, stage, noisy).items()}
    for name, tensor in noise.items():
        if tensor.numel() >= 100:
            spread = 6 / math.sqrt(2 * tensor.numel())
            assert float(tensor.std()) * 47 == pytest.approx(sigma * clip, rel=spread), name
            assert abs(float(tensor.mean())) * 47 < 6 * sigma * clip / math.sqrt(tensor.numel()), name
        else:
            assert tensor.abs().min() > 0, name
    together = torch.cat([tensor.flatten() for tensor in noise.values()])
    assert len(together.unique()) > 0.99 * len(together)  # every number has its own


def test_one_noise_is_drawn_for_a_logical_batch_of_many_physical_ones(backbone):
    draws = [Scripted([only(range(40), 48)]) for _ in range(2)]
    moved = [
        one_step(backbone, "head", private_steps(clip=0.4, batch=47, sigma=1.0, source=source), batch_size=size)
        for source, size in zip(draws, (1, 99), strict=True)
    ]
    assert_close(*moved)


# Sampling, spending, what is told


@both_stages
def test_a_private_training_learns_and_tells_no_loss(backbone, stage):
    retriever, log, spent = toy_retriever(backbone), Log(), Spent()
    examples = toy_examples(300, noise=0.2)
    before = recall(retriever, VALIDATION)
    privacy = private_steps(sigma=0.3, clip=1.0, batch=60, spend=spent)
    config = toy_config(epochs=8, rate=0.1)
    history = fit(retriever, examples, stage, config, seed=0, privacy=privacy, report=log, validation=VALIDATION)
    assert recall(retriever, VALIDATION) > before + 0.1
    assert [(record.loss, record.validation_recall) for record in history] == [(None, None)] * 8
    assert spent.steps == [5] * 8
    assert len(log.steps) == 40
    assert (log.steps[-1].done, log.steps[-1].total) == (40, 40)


def test_every_epoch_spends_before_its_first_step_and_stops_where_it_may_not(backbone):
    retriever, log = toy_retriever(backbone), Log()
    privacy = private_steps(sigma=1.0, clip=1.0, batch=12, spend=Spent(most=9))
    with pytest.raises(OverspentError):
        fit(retriever, EXAMPLES, "head", toy_config(epochs=5), seed=0, privacy=privacy, report=log)
    assert privacy.spend.steps == [4, 4]
    assert len(log.steps) == 8


@both_stages
def test_batches_and_dropout_follow_from_the_source_and_not_from_the_seed(backbone, stage):
    # What is dropped too: were it known, one example more would change what is dropped of those after it.
    config = toy_config(epochs=2, dropout=0.3, token_dropout=0.3)

    def result(seed: int, source: int) -> dict[str, Tensor]:
        return trained(backbone, stage, config, seed=seed, privacy=private_steps(batch=12, source=seeded(source)))

    assert_same_bits(result(0, 0), result(1, 0))
    assert "head.rows" in differ(result(0, 0), result(0, 1))


def test_rows_without_queries_are_noised_like_all_others(backbone):
    start = toy_retriever(backbone).trainable_state()
    after = trained(backbone, "head", toy_config(epochs=1), privacy=private_steps(sigma=1.0, clip=1.0))
    assert (after["head.rows"] != start["head.rows"]).all(dim=1)[UNSEEN]
    assert after["head.bias"][UNSEEN] != start["head.bias"][UNSEEN]


def test_the_whole_gradient_is_not_clipped_again(backbone):
    privacy = [private_steps(sigma=1.0, clip=1.0, source=seeded(3)) for _ in range(2)]
    free, bound = (
        one_step(backbone, "head", steps, max_gradient_norm=limit)
        for steps, limit in zip(privacy, (None, 1e-3), strict=True)
    )
    assert_close(free, bound)


def test_whoever_asks_is_told_what_a_step_did(backbone):
    reports: list[StepReport] = []
    source = Scripted([only([2, 11, 40], 48)])
    privacy = private_steps(sigma=0.5, clip=1e-3, batch=47, source=source, reports=reports)
    one_step(backbone, "head", privacy)
    (report,) = reports
    assert (report.units, report.clipped, report.clip) == (3, 3, 1e-3)
    count = sum(parameter.numel() for parameter in toy_retriever(backbone, hidden=6).head.parameters())
    summed = gradient_sums(backbone, "head", [EXAMPLES[number] for number in (2, 11, 40)], 1e-3)
    signal = math.sqrt(sum(float(tensor.square().sum()) for tensor in summed.values()))
    assert report.noise_to_signal == pytest.approx(0.5e-3 * math.sqrt(count) / signal, rel=1e-3)


# Adaptive clipping


def test_the_clip_moves_by_the_geometric_rule(backbone):
    # Nothing is cut: the share below the clip is 1 of the 47 drawn, so C · exp(-0.2 (47/47 · 1/2 + 1/2 - 0.5)).
    privacy = private_steps(mode="dp-sgd-adaptive", batch=47, source=Scripted([only(range(47), 48)]))
    one_step(backbone, "head", privacy)
    assert privacy.clip == pytest.approx(HUGE * math.exp(-0.2 * 0.5))
    # Everything is cut: the share is 0 among 10 drawn where 47 are expected: -10/2 / 47 + 1/2.
    privacy = private_steps(mode="dp-sgd-adaptive", clip=1e-6, batch=47, source=Scripted([only(range(10), 48)]))
    one_step(backbone, "head", privacy)
    assert privacy.clip == pytest.approx(1e-6 * math.exp(-0.2 * (0.5 - 5 / 47 - 0.5)))


def test_the_clip_finds_the_quantile_of_the_norms(backbone):
    reports: list[StepReport] = []
    config = toy_config(epochs=60, rate=1e-9)
    privacy = private_steps(mode="dp-sgd-adaptive", clip=6.0, quantile=0.25, clip_rate=0.03, reports=reports)
    fit(toy_retriever(backbone), EXAMPLES, "head", config, seed=0, privacy=privacy)
    assert reports[0].clipped == 0
    assert reports[-1].clipped / 48 == pytest.approx(0.75, abs=0.05)


def test_the_count_is_noised_and_the_sum_noised_more_in_return(backbone):
    sigma, clip, moves = 1.0, 0.4, []
    for seed in range(40):
        privacy = private_steps(mode="dp-sgd-adaptive", sigma=sigma, clip=clip, batch=40, source=seeded(seed))
        moved = one_step(backbone, "head", privacy)
        moves.append(-math.log(privacy.clip / clip) / 0.2)  # share - quantile
    # 2.0 on a count of expected 40, beside what the sampling itself varies (40 of 48: at most 0.5 · 2.6 / 40).
    deviation = float(torch.tensor(moves).std())
    assert 0.7 * 2.0 / 40 < deviation < 1.5 * 2.0 / 40
    noise = moved["head.pre.inner"].flatten()  # at the start its gradient is 0: noise alone
    assert float(noise.std()) * 40 == pytest.approx(sum_noise(1.0, 40) * clip, rel=6 / math.sqrt(2 * len(noise)))
    assert sum_noise(1.0, 40) == pytest.approx((1 - 1 / 16) ** -0.5)


# Going on after a stop


@pytest.mark.parametrize("mode", ["dp-sgd-adaptive", "paper"])
def test_a_stopped_training_goes_on_with_its_clip_and_spends_for_what_is_left(backbone, tmp_path, mode):
    config = toy_config(epochs=3, checkpoint_seconds=1e-9)
    checkpoint = Checkpoint(tmp_path / "c.safetensors", "x")
    first = private_steps(mode=mode, clip=3.0, batch=12)
    with pytest.raises(StoppedError):
        fit(
            toy_retriever(backbone), EXAMPLES, "head", config, seed=0, privacy=first, checkpoint=checkpoint,
            report=Log(stop_after=6),
        )  # fmt: skip
    snapshot = checkpoint.load()
    assert snapshot is not None
    assert (snapshot.values["epoch"], snapshot.values["vitals"]["loss"]) == ({"paper": 0}.get(mode, 1), 0.0)
    done = snapshot.values["step_in_epoch"]
    second = private_steps(mode=mode, clip=3.0, batch=12)
    reports: list[StepReport] = []
    second.diagnose = reports.append
    history = fit(toy_retriever(backbone), EXAMPLES, "head", config, seed=0, privacy=second, checkpoint=checkpoint)
    assert [record.epoch for record in history] == [0, 1, 2]
    assert reports[0].clip == pytest.approx(snapshot.values["privacy"]["clip"])
    assert reports[0].clip != 3.0
    if mode == "paper":
        assert first.spend.steps == second.spend.steps == []
    else:
        assert first.spend.steps == [4, 4]
        assert second.spend.steps == [4 - done, 4]


# The paper's mode


@both_stages
@pytest.mark.parametrize("clipping", ["batch", "example"])
def test_the_papers_warm_up_with_nothing_cut_is_plain_training(backbone, stage, clipping):
    shared = {**DESCENT, "epochs": 2, "batch_size": 8, "gradient_accumulation": 2}
    plain = trained(backbone, stage, toy_config(**shared), head={"hold_unseen": False})
    privacy = private_steps(mode="paper", paper_clipping=clipping)
    private = trained(backbone, stage, toy_config(**shared), privacy=privacy)
    assert largest_difference(plain, private) < 1e-4


def test_the_paper_cuts_the_mean_gradient_of_a_batch_and_adds_noise_to_it(backbone):
    sums = gradient_sums(backbone, "head", EXAMPLES)
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in sums.values())) / 48
    reports: list[StepReport] = []
    settings = {"mode": "paper", "paper_warmup": 0, "clip": norm / 2, "reports": reports}
    privacy = private_steps(paper_noise=0.0, **settings)
    moved = one_step(backbone, "head", privacy, batch_size=99)
    assert_close(moved, sums, 0.5 / 48)
    assert privacy.clip == pytest.approx(0.9 * norm / 2 + 0.1 * norm, rel=1e-4)
    assert (reports[0].units, reports[0].clipped) == (48, 1)
    noisy = one_step(backbone, "head", private_steps(paper_noise=3.0, **settings), batch_size=99)
    noise = noisy["head.pre.inner"].flatten()
    assert float(noise.std()) == pytest.approx(3.0 * norm / 2, rel=6 / math.sqrt(2 * len(noise)))


def test_the_paper_can_cut_each_example_at_the_moving_quantile(backbone):
    norms = [
        math.sqrt(sum(float(tensor.square().sum()) for tensor in gradient_sums(backbone, "head", [example]).values()))
        for example in EXAMPLES
    ]
    clip = sorted(norms)[24]
    settings = {"mode": "paper", "paper_warmup": 0, "paper_clipping": "example", "clip": clip}
    privacy = private_steps(paper_noise=0.0, **settings)
    moved = one_step(backbone, "head", privacy, batch_size=99)
    assert_close(moved, gradient_sums(backbone, "head", EXAMPLES, clip), 1 / 48)
    quantile = float(torch.tensor(norms, dtype=torch.float64).quantile(0.9))
    assert privacy.clip == pytest.approx(0.9 * clip + 0.1 * quantile, rel=1e-4)
    noise = one_step(backbone, "head", private_steps(paper_noise=3.0, **settings), batch_size=99)["head.pre.inner"]
    assert float(noise.std()) * 48 == pytest.approx(3.0 * clip, rel=6 / math.sqrt(2 * noise.numel()))


def test_the_papers_noise_begins_after_its_warm_up(backbone):
    states = []
    for warm in (1, 2):
        privacy = private_steps(mode="paper", paper_warmup=warm, clip=1.0, paper_noise=1.0)
        states.append(
            [trained(backbone, "head", toy_config(epochs=2), epochs=range(n), privacy=privacy) for n in (1, 2)]
        )
    assert_same_bits(states[0][0], states[1][0])
    assert "head.rows" in differ(states[0][1], states[1][1])
