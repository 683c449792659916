"""What every experiment works with: its settings, its data, and measurements that are never made twice."""

import hashlib
import json
import platform
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from caravan.app.reproduction.findings import Findings
from caravan.app.reproduction.parts import part_of
from caravan.config import BackboneConfig, Config, changed, config_from_dict
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError, StorageError
from caravan.files import make_folder, whole_file
from caravan.model.backbone import Backbone, load_backbone
from caravan.training.features import FeatureStore, default_cache
from caravan.training.progress import Report, prefixed

BUNDLED = "helpdesk"  # what is worked on where there are no other data


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One experiment's place of work.

    Attributes:
        name: of the experiment.
        folder: its own; nobody else writes there.
        settings: from its TOML, the table of the form that is run.
        quick: whether that is the short form.
        data: a folder of data sets, each a folder; None: there is none.
        models: a folder of model folders; None: there is none.
        backbone: the frozen model, and on which device.
        seeds: in order; the first is the one where one is enough.
        command: what repeats the work.
        report: called as the work goes on.
        notes: what was left out, a sentence each; the frame adds them to the findings' own.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    quick: bool
    data: Path | None
    models: Path | None
    backbone: BackboneConfig
    seeds: Sequence[int]
    command: str
    report: Report | None = None
    notes: list[str] = field(default_factory=list)

    def measure(
        self, key: str, work: Callable[[], dict[str, Any]], *, matters: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Give what was measured under this key before, or measure and keep it at once.

        A kill costs the measurement under way and no other.

        Args:
            key: says to people what it is, e.g. "sms_spam/adapter/seed 1".
            work: measures; gives plain values (JSON).
            matters: all settings that change the result, as plain values: with others it is measured anew, and the
                old one stays. None: all settings of the experiment. The backbone always matters; the device does not,
                as each measure says its machine; a seed does not unless it is in here or in the key.

        Returns:
            The plain values, and "seconds" that `work` took unless it has given its own.

        Raises:
            StorageError: the results cannot be read or written.
        """
        backbone = {name: value for name, value in asdict(self.backbone).items() if name != "device"}
        parts = [self.settings if matters is None else matters, backbone]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        place = f"{key} #{digest[:8]}"
        known = self.results()["measures"].get(place)
        if known is not None:
            return known["value"]
        started = time.perf_counter()
        value = work()
        value.setdefault("seconds", round(time.perf_counter() - started, 3))
        results, machine = self.results(), this_machine()
        if machine not in results["machines"]:
            results["machines"].append(machine)
        results["measures"][place] = {"machine": results["machines"].index(machine), "value": value}
        self._write(results)
        return json.loads(json.dumps(value))  # as a rerun would find it: lists for tuples, text for keys

    def results(self) -> dict[str, Any]:
        """All that `results.json` holds: machines, measures by key, and findings once there are some.

        Raises:
            StorageError: the file cannot be read, or is not as caravan writes it.
        """
        return read_results(self.folder)

    def keep(self, findings: Findings) -> None:
        """Write what was found beside the measurements.

        Raises:
            StorageError: the file cannot be written.
        """
        facts = {
            "name": self.name,
            "command": self.command,
            "form": "quick" if self.quick else "full",
            "backbone": asdict(self.backbone),
            "seeds": list(self.seeds),
            "settings": dict(self.settings),
            "machine": this_machine(),
        }
        self._write({**self.results(), **facts, "findings": findings.to_dict()})

    def _write(self, results: Mapping[str, Any]) -> None:
        make_folder(self.folder)
        with whole_file(self.folder / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def present(self, names: Sequence[str]) -> list[str]:
        """Give those of the data sets that are here, and note the others; the bundled corpus where none is."""
        found = [name for name in names if name == BUNDLED or (self.data is not None and (self.data / name).is_dir())]
        missing = [name for name in names if name not in found]
        if missing:
            where = "no folder of data sets was given (--data, or CARAVAN_DATA)" if self.data is None else "not there"
            self.note(f"Without {', '.join(missing)}: {where}.")
        if not found:
            self.note(f"Run on the bundled corpus, {BUNDLED}, in their place.")
        return found or [BUNDLED]

    def small_models(self, names: Sequence[str]) -> list[str]:
        """Give the folders of those of the small models that are here, and note the others."""
        found = [self.models / name for name in names if self.models is not None and (self.models / name).is_dir()]
        missing = [name for name in names if name not in {folder.name for folder in found}]
        if missing:
            self.note(f"Without the models {', '.join(missing)}: not there (CARAVAN_MODELS).")
        return [str(folder) for folder in found]

    def note(self, sentence: str) -> None:
        """Keep a sentence for the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def dataset(
        self,
        name: str,
        *,
        classes: int | None = None,
        train: int | None = None,
        test: int | None = None,
        validation: float = 0.0,
        seed: int = 0,
    ) -> Dataset:
        """Read a data set that is `present`, or a part of it (see `parts.part_of`).

        Args:
            name: as in `present`.
            classes: keep this many documents, the first that have training queries, and their queries.
            train: keep this many training queries, drawn at random.
            test: likewise of the test split.
            validation: share of train that is cut off for it.
            seed: of what is drawn.

        Raises:
            DataError: it cannot be read.
        """
        path = name if name == BUNDLED else str(self._folder_of(name))
        return part_of(
            Dataset.read(path, validation_fraction=validation, seed=seed),
            classes=classes,
            train=train,
            test=test,
            seed=seed,
        )

    def _folder_of(self, name: str) -> Path:
        if self.data is None:
            raise ConfigError(f"{name}: no folder of data sets was given; use --data, or set CARAVAN_DATA")
        return self.data / name

    def config(self, seed: int, changes: Mapping[str, Any] | None = None) -> Config:
        """Give the default settings with this bench's backbone, this seed and some changes by dotted key.

        Raises:
            ConfigError: a setting is unknown or not allowed.
        """
        values = {"seed": seed, "backbone": asdict(self.backbone)}
        return config_from_dict(changed(values, changes or {}), source=f"experiment {self.name}")

    @cached_property
    def model(self) -> Backbone:
        """The frozen model, loaded once."""
        return load_backbone(self.backbone, seed=self.seeds[0])

    @cached_property
    def store(self) -> FeatureStore:
        """The user's cache of vectors; for timing take an empty `FeatureStore()`."""
        return FeatureStore(default_cache())

    def telling(self, what: str) -> Report | None:
        """A report for a piece of the work, which says that it is of this experiment and what it is about.

        Warnings are not passed on: a sweep means its rates, also those that are too high.
        """
        report = prefixed(self.report, f"{self.name}, {what}: ")
        return report and (lambda progress: report(replace(progress, warning=None)))


def counts(dataset: Dataset) -> str:
    """Say a data set with its counts, as in every row."""
    documents = f"{len(dataset.catalogue):,} documents"
    return f"{dataset.name}: {documents}, {len(dataset.train):,} train, {len(dataset.test):,} test"


def read_results(folder: Path) -> dict[str, Any]:
    """Read an experiment's `results.json`; without one, no machine and no measure.

    Raises:
        StorageError: it cannot be read, or is not as caravan writes it.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {"machines": [], "measures": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results["machines"], list) or not isinstance(results["measures"], dict):
            raise TypeError("machines or measures")
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}; check its rights") from None
    except (ValueError, LookupError, TypeError) as error:
        what = f"not as caravan writes it ({type(error).__name__}: {error})"
        raise StorageError(f"{path}: {what}; remove it, or choose another --out") from None
    return results


def read_settings(name: str, *, quick: bool) -> dict[str, Any]:
    """Read the settings of one form of an experiment, as shipped.

    `[full]` has all of them; `[quick]` those that differ.
    """
    text = files("caravan.app.reproduction").joinpath("settings", f"{name}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return {**tables["full"], **(tables["quick"] if quick else {})}


def this_machine() -> dict[str, Any]:
    """What figures were measured on: processor, threads, GPU and versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bfloat16_on_cpu": torch.cpu._is_avx512_bf16_supported(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
