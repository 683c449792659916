"""Every setting, frozen, with its default and the reason for it; read from and written to one TOML file."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomli_w
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, core_schema

from caravan.errors import ConfigError

_STRICT = ConfigDict(extra="forbid")

_SHOWN_CHARACTERS = 80  # of a wrong value: a message is one line of a terminal or little more

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # the largest whole number of TOML, and of PyTorch's generators
Port = Annotated[int, Field(ge=1, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AUTO: Literal["auto"] = "auto"


class _OrAuto:
    """Lets "auto" by where a number is asked for, without a second fault in the message about a wrong number."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        del source
        number = handler.generate_schema(PositiveFloat)
        return core_schema.no_info_wrap_validator_function(
            lambda value, check: value if value == AUTO else check(value), number
        )


Rate = Annotated[float | Literal["auto"], _OrAuto()]  # "auto": chosen before the stage starts (docs/theory.md)
StrategyName = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "median", "trimmed_mean", "krum", "multi_krum", "bulyan"
]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Where the words come from (`[data]`)."""

    path: str = "helpdesk"  # the bundled corpus: runs anywhere
    documents: str | None = None  # None: a `documents.*` file beside the queries, else one document a label
    validation: str | None = None  # None: a `validation.*` file beside the queries, else cut from train
    test: str | None = None  # None: a `test.*` file beside the queries; absent is allowed
    text_column: str = "text"
    label_column: str = "label"
    label_separator: str | None = None  # set it where one cell names several documents, e.g. "|"
    on_bad_row: Literal["fail", "skip"] = "fail"  # a silent gap in the data is worse than a stop
    validation_fraction: Fraction = 0.1  # of train, when there is no validation file


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BackboneConfig:
    """Which frozen model, and how its states become one vector (`[backbone]`)."""

    name: str = "minilm"  # "minilm", a local folder, or a Hugging Face id
    revision: str | None = None  # a branch, tag or commit of a Hugging Face id
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # the same vectors on every machine
    device: str = "cpu"
    trust_remote_code: bool = False  # a model folder may bring its own Python: never run it unasked
    pooling: Literal["auto", "mean", "last", "cls"] = "auto"  # auto: mean for encoders, last token for decoders
    max_tokens: PositiveInt = 256  # what all-MiniLM-L6-v2 was made for; shorter texts cost less anyway
    normalize: bool = True  # L2: scores start as cosines, which is what sentence encoders are trained for
    random_weights: bool = False  # the control: the same shape, never pretrained


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdapterConfig:
    """The trainable map on the token embeddings (`[adapter]`)."""

    kind: Literal["full", "lowrank", "core", "none"] = "full"  # the paper's square adapter
    rank: PositiveInt = 32  # lowrank, core: 32 x 32 numbers are 4 KB
    bias: bool = False  # the paper's map has none
    seed: Seed = 0  # core: draws the frozen U and V, so they need not be sent


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class HeadConfig:
    """The classifier, one row a document (`[head]`)."""

    start: Literal["auto", "documents", "centroids"] = "auto"  # auto: whichever ranks the validation queries better
    hidden: Annotated[int, Field(ge=0)] = 768  # width of the pre-classifier layer (the paper's MLP); 0: none
    scale: PositiveFloat = 20.0  # start of the learned factor on cosines, as in sentence-transformers' losses
    hold_unseen: bool = True  # a document without training queries keeps the row it started from


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class HeadStageConfig:
    """Training the head on cached vectors (`[training.head]`)."""

    epochs: Annotated[int, Field(ge=0)] = 30
    batch_size: PositiveInt = 128
    learning_rate: Rate = 1e-3
    weight_decay: NonNegativeFloat = 0.1
    label_smoothing: Fraction = 0.1  # some labels are wrong: banking77's validation gains about a point
    dropout: Fraction = 0.2  # of the query vectors: with few queries a document the head learns them by heart


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdapterStageConfig:
    """Training adapter and head through the frozen blocks (`[training.adapter]`)."""

    epochs: Annotated[int, Field(ge=0)] = 4
    batch_size: PositiveInt = 32
    learning_rate: Rate = 1e-3  # of the adapter: Adam moves all of a square matrix at once, which is far
    head_learning_rate: Rate = 1e-4  # it has been trained already: faster, it learns the queries by heart
    weight_decay: NonNegativeFloat = 0.1  # of the head
    label_smoothing: Fraction = 0.1
    dropout: Fraction = 0.2  # as in the head stage
    token_dropout: Fraction = 0.1  # share of a query's tokens left out, for the same reason


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainingConfig:
    """What both stages share (`[training]`)."""

    mode: Literal["head", "adapter"] = "adapter"
    passages: Annotated[int, Field(ge=0)] = 8  # of a document, trained on like queries; 0: none. More did not help
    head: HeadStageConfig = field(default_factory=HeadStageConfig)
    adapter: AdapterStageConfig = field(default_factory=AdapterStageConfig)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: Fraction = 0.1  # share of all steps
    gradient_accumulation: PositiveInt = 1
    max_gradient_norm: PositiveFloat | None = 1.0
    activation_checkpointing: bool = False  # trades a second forward for memory: only large backbones need it
    precision: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the frozen blocks while training; auto: bfloat16 where the processor multiplies it natively
    )
    patience: Annotated[int, Field(ge=0)] = 0  # epochs without a better validation before stopping; 0: never stop early
    class_weights: Literal["none", "sqrt", "balanced"] = "none"  # recall over queries is what is measured
    checkpoint_seconds: PositiveFloat = 30.0  # the most work a kill can cost


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FederationConfig:
    """Clients that do not pool their queries (`[federation]`)."""

    clients: Annotated[int, Field(ge=0)] = 0  # 0: central training
    partition: Literal["iid", "dirichlet", "column"] = "iid"
    column: str | None = None  # partition = "column": the column that names the client
    alpha: PositiveFloat = 1.0  # partition = "dirichlet": small is uneven
    rounds: PositiveInt = 5  # the stage's epochs are divided over the rounds, so passes equal central training's
    backend: Literal["inprocess", "ray"] = "inprocess"  # ray starts in half a minute and only pays with many cores
    # Who is asked, and how long the server waits.
    clients_per_round: PositiveInt | None = (
        None  # drawn anew each round by (seed, round); None: all, while they are few
    )
    min_clients: PositiveInt = 1  # usable updates a round needs; a robust strategy may need more
    round_retries: Annotated[int, Field(ge=0)] = 1  # a short outage should not end a run, a broken client should
    round_seconds: PositiveFloat | None = None  # None: wait; in process clients run in turn and are never cut short
    # What an update may be. There is no bound that fits every backbone and rate: the reports show what is usual.
    max_update_norm: PositiveFloat | None = None  # L2 distance from the round's start, all tensors together
    max_examples: PositiveInt | None = None  # a client's weight is its own claim: set it to the largest honest shard
    codec: Literal["none", "float32", "float16", "int8"] = "none"  # what is sent both ways: tensors, bit for bit; or
    # what changed, packed, where the line is slow
    secure_aggregation: bool = False  # the server sees the sum of updates alone (SecAgg+): what then cannot be checked
    # or chosen is refused, and max_examples is needed
    sparse_rows: bool = False  # with a codec: head rows that did not change are not sent; the bytes then tell whoever
    # sees them which documents were asked about
    # How updates become the new global tensors.
    strategy: StrategyName = "fedavg"  # one client equals central training, and nothing needs tuning
    rows: Literal["all", "trained"] = "all"  # over which clients an average goes, row by row; "trained": those that
    # changed the row. Plain FedAvg, until measured better everywhere
    proximal_mu: PositiveFloat = 0.01  # fedprox: the middle of the grid in its paper (arXiv:1812.06127)
    server_learning_rate: PositiveFloat | None = None  # None: fedavgm 1, the average itself; fedadam, fedyogi 0.01, a
    # fifth of a typical value in a head's row, where Flower's 0.1 for fedadam would overwrite the row in one round
    server_momentum: Fraction = 0.9  # fedavgm (arXiv:1909.06335); beta_1 of fedadam and fedyogi (arXiv:2003.00295)
    server_second_momentum: Fraction = 0.99  # beta_2 of fedadam and fedyogi, as in arXiv:2003.00295
    server_adaptivity: PositiveFloat = 1e-3  # tau of fedadam and fedyogi, as in arXiv:2003.00295
    byzantine_clients: Annotated[int, Field(ge=0)] = 1  # a robust strategy that withstands nobody is a worse average
    trimmed_share: Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)] = 0.2  # trimmed_mean: Flower's own
    krum_selected: PositiveInt | None = None  # multi_krum: updates averaged; None: as many as are safe
    keep: Literal["last", "best"] = "last"  # "best" needs validation queries, which may be absent


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluationConfig:
    """What is measured beside the trained retriever (`[evaluation]`)."""

    baselines: bool = True
    random_backbone: bool = True  # the same shape, never pretrained: what the pretraining is worth
    bootstrap: Annotated[int, Field(ge=0)] = 1000  # resamples behind each interval; 0: no intervals


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DeploymentConfig:
    """Where a federation of real machines meets (`[deployment]`); `caravan train` does not look at it."""

    nodes: tuple[str, ...] = ()  # their names; the order gives each its seed, as in simulation
    host: str = "127.0.0.1"  # the server, as the nodes reach it
    port: Port = 9092
    bind: str = "127.0.0.1"  # where the server listens: whoever reaches it can start runs, so a proxy stands before it
    bind_port: Port | None = None  # None: the same as port
    insecure: bool = False  # neither TLS nor node keys: for tests on one machine
    connect_seconds: PositiveFloat = 60.0  # a round begins without nodes that are away longer


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PrivacyConfig:
    """What training may reveal about one query, or about all of one user's (`[privacy]`)."""

    mode: Literal["none", "dp-sgd", "dp-sgd-adaptive", "paper", "client-level"] = (
        "none"  # it costs accuracy: ask for it
    )
    # One of these two says how much noise there is.
    epsilon: PositiveFloat | None = None  # of this training as a whole, both stages: what most people can reason about
    noise_multiplier: NonNegativeFloat | None = None  # sigma, instead of epsilon: noise over clip, on the sum
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None  # None: n^-1.1, below one in as many as there are units
    clip: PositiveFloat = 1.0  # L2 norm at which a unit's gradient is cut; adaptive: where it starts
    batch: PositiveInt = 512  # expected units a step: noise does not grow with it, the signal does
    unit: Literal["example", "user"] = "example"  # of whom the guarantee speaks; users need a column that names them
    user_column: str | None = None  # unit = "user": the column of the queries' files
    examples_per_user: PositiveInt = 1  # of a user and step, clipped as one; more cost time and cancel out in part
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5  # adaptive: the share left unclipped, as in arXiv:1905.03871
    clip_rate: PositiveFloat = 0.2  # adaptive: how fast the clip follows, as in arXiv:1905.03871
    epsilon_cap: PositiveFloat | None = None  # over the life of the data, all runs; None: its owner has set no limit
    public_validation: bool = False  # whether validation queries are nobody's: their recall is printed as it is
    # Mode "paper", which proves little (arXiv:2509.16508): its own numbers.
    paper_noise: NonNegativeFloat = 0.1  # noise over clip
    paper_decay: Fraction = 0.9  # of the moving average of norms that the clip is
    paper_quantile: Annotated[float, Field(gt=0, le=1)] = 0.9  # of a batch's norms, that goes into it
    paper_warmup: Annotated[int, Field(ge=0)] = 6  # epochs without noise
    paper_clipping: Literal["batch", "example"] = "batch"  # what is cut: the batch's mean gradient, or each one's


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """All settings of one experiment."""

    seed: Seed = 13
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    deployment: DeploymentConfig = field(default_factory=DeploymentConfig)

    def to_dict(self) -> dict[str, Any]:
        """All settings as nested plain values, as saved with results."""
        values = asdict(self)
        values["deployment"]["nodes"] = list(self.deployment.nodes)  # JSON and TOML know no tuples
        return values

    def to_toml(self) -> str:
        """All settings as TOML; a setting that is None is left out (TOML has no null)."""
        return tomli_w.dumps(_without_none(self.to_dict()))


_ADAPTER = TypeAdapter(Config)

# What noise on single steps asks for, unless it is set: chosen on validation queries (docs/privacy.md).
_NOISED_MODES = ("dp-sgd", "dp-sgd-adaptive")
_NOISED = {
    "head.hidden": 0,  # every number that is trained gets noise, and the pre-classifier has most of them
    "training.head.learning_rate": 3e-2,  # clipped gradients are small
    "adapter.kind": "core",  # 1,024 numbers in place of 147,456
    "training.adapter.learning_rate": 1e-2,
    "training.adapter.head_learning_rate": 1e-3,
}


def config_from_dict(values: Mapping[str, Any], *, source: str = "the settings") -> Config:
    """Check nested plain values and make a `Config` of them.

    Where `privacy.mode` is "dp-sgd" or "dp-sgd-adaptive", some settings that are left out have other defaults than
    those of `Config`: those that noise asks for.

    Raises:
        ConfigError: a key is unknown or a value is not allowed; all such faults are named in one line.
    """
    try:
        config = _ADAPTER.validate_python(_with_noised_defaults(values))
    except ValidationError as error:
        faults = "; ".join(_describe(fault) for fault in error.errors())
        raise ConfigError(f"{source}: {faults}") from None
    if config.federation.partition == "column" and not config.federation.column:
        raise ConfigError(f'{source}: federation.partition = "column" needs federation.column, the name of the column')
    return config


def _with_noised_defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    privacy = values.get("privacy")
    if not isinstance(privacy, Mapping) or cast(Mapping[str, Any], privacy).get("mode") not in _NOISED_MODES:
        return values
    missing: dict[str, Any] = {}
    for key, value in _NOISED.items():
        section: Any = values
        for name in key.split("."):
            section = cast(Mapping[str, Any], section).get(name) if isinstance(section, Mapping) else None
        if section is None:
            missing[key] = value
    try:
        return changed(values, missing)
    except ConfigError:  # a section is a plain value: the checks below tell it as they tell the like elsewhere
        return values


def read_config(path: str | Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or names an unknown or disallowed setting.
    """
    return config_from_dict(read_toml(path), source=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into nested plain values, unchecked.

    Raises:
        ConfigError: the file cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the settings: {error.strerror}; give the path of a TOML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # besides its own, tomllib lets those of int() and of depth through
        raise ConfigError(
            f"{path}: not valid TOML: {error}; `caravan train --print-config` prints a valid file"
        ) from None


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Give a copy of nested plain values in which dotted keys such as "training.adapter.epochs" have new values.

    Raises:
        ConfigError: a key goes through a value that is no section.
    """
    result = {name: _copied(value) for name, value in values.items()}
    for key, value in changes.items():
        *parents, name = key.split(".")
        section = result
        for parent in parents:
            inner: Any = section.setdefault(parent, {})
            if not isinstance(inner, dict):
                what = f"{parent} is a value, not a section"
                raise ConfigError(f"{key}: {what}; `caravan train --print-config` lists all")
            section = cast(dict[str, Any], inner)
        section[name] = value
    return result


def _copied(value: Any) -> Any:
    return changed(cast(Mapping[str, Any], value), {}) if isinstance(value, Mapping) else value


def _describe(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "settings"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown setting {where}; `caravan train --print-config` lists all"
    got = repr(fault["input"])
    got = got if len(got) <= _SHOWN_CHARACTERS else f"{got[:_SHOWN_CHARACTERS]}..."
    return f"{where} = {got}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            kept[name] = _without_none(cast(Mapping[str, Any], value))
        elif value is not None:
            kept[name] = value
    return kept
