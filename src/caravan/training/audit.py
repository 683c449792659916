"""An attack on private training: what it finds out must not exceed what the accountant allows.

A canary is a unit that is trained on or not, by the toss of a coin. Who guesses the coins of many canaries of one
training too well proves that it is less private than is said (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846). The
bound is far from tight, so an audit that passes proves nothing: it finds gross faults. What it cannot see: noise or
clipping that is wrong by a small factor; sampling that is not Poisson, as the canaries of `audit_mechanism` are in
every step; adapter and head clipped apart; and clipping of a step's whole sum, where hundreds of canaries drown each
other while a single one could turn it. The mean clipped as a whole is found in the "head" stage, and mostly missed in
the "adapter" stage, where the gradients of canaries overlap.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from caravan.config import AdapterStageConfig, HeadConfig, HeadStageConfig, PrivacyConfig, TrainingConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example
from caravan.errors import PrivacyError
from caravan.model.backbone import Backbone
from caravan.model.retriever import Retriever
from caravan.training.accounting import Mechanism, epsilon, in_figures
from caravan.training.features import FeatureStore
from caravan.training.inputs import Inputs, TokenInputs, VectorInputs
from caravan.training.noise import NoiseSource
from caravan.training.one_run import Audit, count_correct, guesses_of
from caravan.training.optimizer import rate_factor
from caravan.training.private import PrivateSteps
from caravan.training.progress import Report
from caravan.training.sampling import sampling_rate, steps_per_epoch, units_of
from caravan.training.targets import Targets
from caravan.training.trainer import Stage, fit, trained_parameters

CANARIES = 1000  # fewer prove less: with 300, a mechanism without any noise shows an epsilon of 3, with these of 4
_LOUD = 20.0  # norm of a canary's gradient over the clip: clipping left out must show
_UNSURE = 0.2  # spread of the logits at the start; with 0.5 canaries reach into each other's rows, and guesses go wrong
_QUIET = 0.01  # scale of a head whose own gradients are to be small beside the adapter's
_STEEP = 10.0  # there: length of a row's numbers, times scale, over the clip; gradients are about twice that
_TRUST = 0.1  # of the noise that is promised, what the attacker reckons with when he untangles gradients: less than
# would serve him best where it is there, so that he finds everything where it is not
_RATE = 1e-3  # of learning, over the squared clip: low enough that weights and gradients stay what they are


def audit_mechanism(
    backbone: Backbone,
    config: PrivacyConfig,
    sigma: float,
    *,
    delta: float,
    seed: int,
    stage: Stage = "head",
    steps: int = 1,
    canaries: int = CANARIES,
    confidence: float = 0.95,
    source: NoiseSource | None = None,
    store: FeatureStore | None = None,
    report: Report | None = None,
) -> Audit:
    """Attack `fit` with canaries whose gradients are known, and see what the released sums say of them.

    Each canary is gold for a document of its own, and its gradient is 20 times longer than the clip. Those whose coin
    says so are trained on with `fit`, all of them in every step, with plain SGD at a rate so low that the weights
    hardly move: what the weights changed by is then the sum of what the steps released. In the "head" stage the
    gradients lie each in a row of its own, and a canary's score is the product of its gradient, which the attacker
    computes by himself, with what was released. In the "adapter" stage nearly all of them is the adapter's, where they
    overlap: the scores are the coins that fit best to what was released, by least squares with a ridge.

    Args:
        backbone: what the canaries are encoded with.
        config: mode, clip and unit that are audited; with users, each canary is one with so many examples.
        sigma: noise multiplier of a step.
        delta: at which both bounds are given.
        seed: decides coins and texts; must be unknown to the mechanism.
        stage: "head", or "adapter" to attack the gradients of a square adapter, of which the canaries' have to fit into
            memory together.
        steps: how many.
        canaries: how many; a fifth of them is guessed.
        confidence: of the lower bound.
        source: who draws the noise; the operating system if None.
        store: where the canaries' vectors are kept.
        report: called as the work goes on.

    Raises:
        PrivacyError: the audit could not fail, whatever the mechanism does, or `fit` refuses its settings.
    """
    audit = Audit(canaries, guesses_of(canaries), 0, confidence, epsilon([Mechanism(1.0, sigma, steps)], delta))
    if config.mode == "paper":
        raise PrivacyError('privacy.mode = "paper" promises nothing that an audit could refute; audit "dp-sgd"')
    if audit.ceiling <= audit.accounted.epsilon:
        raise PrivacyError(
            f"an audit with {canaries} canaries shows at most epsilon = {in_figures(audit.ceiling)} and could not "
            f"refute {in_figures(audit.accounted.epsilon)}; take more canaries or a smaller epsilon"
        )
    chance, store = torch.Generator().manual_seed(seed), store or FeatureStore()
    units = _loud_canaries(canaries, config, chance)
    attack = _Attack(backbone, [own[0] for own in units], stage, steps, config.clip, store, chance)
    included = torch.rand(canaries, generator=chance) < 0.5
    examples = [example for own, inside in zip(units, included.tolist(), strict=True) if inside for example in own]
    private = PrivateSteps(dataclasses.replace(config, batch=canaries), sigma, _unspent, source=source)
    before = attack.retriever.trainable_state()
    fit(attack.retriever, examples, stage, attack.training, seed=seed, store=store, report=report, privacy=private)
    after = attack.retriever.trainable_state()
    attack.retriever.load_trainable_state(before)
    released = {name: (before[name] - tensor) / attack.rate for name, tensor in after.items()}
    scores = attack.aligned(released) if stage == "head" else attack.untangled(released, sigma)
    return dataclasses.replace(audit, correct=count_correct(scores, included, audit.guesses))


def audit_training(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    private: PrivateSteps,
    *,
    delta: float,
    seed: int,
    canaries: int = CANARIES,
    confidence: float = 0.95,
    store: FeatureStore | None = None,
    report: Report | None = None,
) -> Audit:
    """Attack a whole training through nothing but its result: canaries are nonsense with a document drawn by lot.

    The score of a canary is by how much training lowered its loss. This is far weaker than `audit_mechanism`: it sees
    what a training with such settings gives away to who holds the model, not whether the mechanism keeps its promise.

    Args:
        retriever: trained in place, on the examples and some of the canaries: not to be used afterwards.
        examples: N queries, always trained on.
        stage: what is trained.
        config: settings of both stages.
        private: how a guarantee is kept; what the training spends is told to it.
        delta: at which both bounds are given.
        seed: decides coins, texts and their documents, and the order of examples.
        canaries: how many; a fifth of them is guessed.
        confidence: of the lower bound.
        store: where vectors are kept.
        report: called as the work goes on.

    Raises:
        PrivacyError: `fit` refuses the settings, or the budget is spent.
    """
    chance = torch.Generator().manual_seed(seed)
    names = [document.doc_id for document in retriever.catalogue]
    rows = torch.randint(len(names), (canaries,), generator=chance).tolist()
    texts = _nonsense(canaries, chance)
    dummies = [
        Example(text, (names[row],), columns=_user(private.config, number))
        for number, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]
    included = torch.rand(canaries, generator=chance) < 0.5
    trained_on = [*examples, *(each for each, inside in zip(dummies, included.tolist(), strict=True) if inside)]
    count, batch = len(units_of(trained_on, private.config)), private.config.batch
    epochs = config.head.epochs if stage == "head" else config.adapter.epochs
    spent = Mechanism(sampling_rate(count, batch), private.sigma, epochs * steps_per_epoch(count, batch))
    before = _losses(retriever, dummies)
    fit(retriever, trained_on, stage, config, seed=seed, store=store, report=report, privacy=private)
    guesses = guesses_of(canaries)
    correct = count_correct(before - _losses(retriever, dummies), included, guesses)
    return Audit(canaries, guesses, correct, confidence, epsilon([spent], delta))


def _nonsense(count: int, chance: torch.Generator) -> list[str]:
    """Distinct texts of four words of random letters."""
    letters = torch.randint(26, (count, 4, 4), generator=chance).tolist()
    words = [[bytes(97 + letter for letter in word).decode() for word in text] for text in letters]
    return [" ".join([*text, str(number)]) for number, text in enumerate(words)]


def _user(config: PrivacyConfig, number: int) -> dict[str, str]:
    return {config.user_column: f"canary {number}"} if config.unit == "user" and config.user_column else {}


def _loud_canaries(count: int, config: PrivacyConfig, chance: torch.Generator) -> list[list[Example]]:
    """For each canary its examples; those of a user are alike, so that clipped one by one they would add up."""
    copies = config.examples_per_user if config.unit == "user" else 1
    return [
        [Example(text, (f"d{number}",), columns=_user(config, number))] * copies
        for number, text in enumerate(_nonsense(count, chance))
    ]


def _unspent(steps: int) -> None:
    """Canaries are nobody's: there is no budget to spend."""


class _Attack:
    """What the attacker of one mechanism knows and makes: m canaries, and a retriever of which a step tells most.

    Attributes:
        retriever: one document a canary.
        training: plain SGD that hardly moves.
        rate: by which a constant gradient is multiplied in the whole training.
    """

    def __init__(
        self,
        backbone: Backbone,
        canaries: Sequence[Example],
        stage: Stage,
        steps: int,
        clip: float,
        store: FeatureStore,
        chance: torch.Generator,
    ) -> None:
        self.canaries, self.steps, self.clip = canaries, steps, clip
        self.stage: Stage = stage
        self.texts = [example.text for example in canaries]
        head = HeadConfig(hidden=0, scale=_LOUD * clip if stage == "head" else _QUIET)
        rows = torch.randn(len(canaries), backbone.hidden_width, generator=chance).to(backbone.config.device)
        catalogue = Catalogue([Document(example.doc_ids[0], example.text) for example in canaries])
        self.retriever = Retriever.start(backbone, catalogue, rows, head=head)
        self.vectors = store.encode(self.retriever.encoder, self.texts)
        with torch.no_grad():
            if stage == "adapter":  # what all vectors share would be in all scores, and make the scale's gradient long
                shared = self.vectors.mean(dim=0) / self.vectors.mean(dim=0).norm()
                rows -= torch.outer(rows @ shared, shared)
            self.retriever.head.rows.copy_(rows * ((_UNSURE if stage == "head" else _STEEP * clip) / head.scale))
        rate = _RATE / clip**2
        plain = {"epochs": steps, "weight_decay": 0.0, "label_smoothing": 0.0, "dropout": 0.0}
        self.training = TrainingConfig(
            head=HeadStageConfig(learning_rate=rate, **plain),
            adapter=AdapterStageConfig(learning_rate=rate, head_learning_rate=rate, token_dropout=0.0, **plain),
            optimizer="sgd",
            warmup=0.0,
            precision="float32",
        )
        self.rate = rate * sum(rate_factor(step, steps, 0.0) for step in range(steps))

    def aligned(self, released: Mapping[str, Tensor]) -> Tensor:
        """Products of each canary's gradient with what was released, float64 (m,)."""
        products = [
            [(gradient * released[name].to(gradient.device)).sum(dtype=torch.float64) for name, gradient in own.items()]
            for own in self._gradients()
        ]
        return torch.tensor([sum(map(float, own)) for own in products], dtype=torch.float64)

    def untangled(self, released: Mapping[str, Tensor], sigma: float) -> Tensor:
        """Least-squares coins of the canaries, float64 (m,), from the adapter's part of what was released."""
        clipped = []
        for own in self._gradients():
            norm = torch.stack([gradient.norm() for gradient in own.values()]).norm()
            clipped.append(_adapter_part(own) * (self.clip / norm).clamp_max(1))
        matrix = torch.stack(clipped)
        surprise = _adapter_part(released) * (len(matrix) / 2) - matrix.sum(dim=0) / 2  # half of them took part
        ridge = (_TRUST * sigma * self.clip) ** 2 / self.steps
        inner = matrix @ matrix.T / 4 + ridge * torch.eye(len(matrix), dtype=torch.float64)
        return torch.linalg.solve(inner, matrix @ surprise)

    def _gradients(self) -> Iterator[dict[str, Tensor]]:
        """Of each canary at the start, by name, from a backward pass of its own."""
        parameters = trained_parameters(self.retriever, self.stage)
        encoder = self.retriever.encoder
        inputs: Inputs = (
            VectorInputs(self.vectors) if self.stage == "head" else TokenInputs(encoder, self.texts, self.training)
        )
        for number, example in enumerate(self.canaries):
            logits = self.retriever.head(inputs.queries([number]))
            loss = -logits.log_softmax(dim=1)[0, self.retriever.catalogue.row(example.doc_ids[0])]
            yield dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _adapter_part(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of the adapter's numbers in a row, float64."""
    return torch.cat([each.flatten().cpu().double() for name, each in tensors.items() if name.startswith("adapter.")])


@torch.no_grad()
def _losses(retriever: Retriever, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy of each example, float32 (m,), nats."""
    targets = Targets(
        [retriever.catalogue.gold_rows(example) for example in examples],
        queries=len(examples),
        document_count=len(retriever.catalogue),
        weighting="none",
        device=retriever.encoder.device,
    )
    scores = torch.cat(list(retriever.score_batches([example.text for example in examples])))
    return targets.losses(scores, range(len(examples)), 0.0).cpu()
