"""What does a private training step cost beside one without privacy, and beside one with Opacus?

Usage: python benchmarks/private_step.py OUT.json [--repeats N] [--shapes BxT ...] [--precision float32|bfloat16]

A step is all that happens to one batch of B texts of T tokens: forward, backward, clipping, noise, gradient descent, of
a square adapter and a flat head of 77 rows on all-MiniLM-L6-v2. "plain" is the step of a training without privacy.
"caravan" clips in closed form and draws its noise from the operating system. "opacus" is Opacus with its hooks on the
same adapter and head as two linear layers, and with its optimizer. Repeats go round the three in one process, in an
order that turns, and what is reported is the median of the ratios within a round, by the clock and by the processor's
time, which other work on the machine disturbs less. Memory is the highest resident size
during two steps above that before them, each side in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from caravan.config import AdapterConfig, AdapterStageConfig, BackboneConfig, HeadConfig, PrivacyConfig, TrainingConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example
from caravan.files import whole_file
from caravan.model.backbone import load_backbone
from caravan.model.retriever import Retriever
from caravan.training.inputs import TokenInputs
from caravan.training.mechanism import NoisedSteps
from caravan.training.private import PrivateSteps
from caravan.training.steps import PlainSteps, Work
from caravan.training.targets import Targets

SIDES = ("plain", "caravan", "opacus")
SHAPES = ("32x32", "32x128", "128x32", "256x32")
DOCUMENTS = 77
RATE, SIGMA, CLIP = 1e-3, 1.0, 1.0
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="texts x tokens")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the frozen blocks")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "shapes": {},
        "repeats": arguments.repeats,
        "precision": arguments.precision,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("caravan", "torch", "transformers", "opacus")},
    }
    for shape in arguments.shapes:
        texts, tokens = map(int, shape.split("x"))
        results["shapes"][shape] = measured(texts, tokens, arguments.precision, arguments.repeats)
        with whole_file(arguments.out) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(shape, json.dumps(results["shapes"][shape]["ratios"]))


def measured(texts: int, tokens: int, precision: str, repeats: int) -> dict[str, Any]:
    """Ratios first, then what they are made of."""
    seconds, busy = timed(texts, tokens, precision, repeats)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {side: pool.apply(peak_mib, (side, texts, tokens, precision)) for side in SIDES}
    return {
        "ratios": {
            **{f"time, caravan to {side}": ratio(seconds, side) for side in ("plain", "opacus")},
            **{f"processor time, caravan to {side}": ratio(busy, side) for side in ("plain", "opacus")},
            **{
                f"memory, caravan to {side}": round(memory["caravan"] / memory[side], 3) for side in ("plain", "opacus")
            },
        },
        "median_seconds": {side: round(statistics.median(each), 4) for side, each in seconds.items()},
        "peak_memory_mib": memory,
        "seconds": {side: [round(one, 4) for one in each] for side, each in seconds.items()},
        "processor_seconds": {side: [round(one, 4) for one in each] for side, each in busy.items()},
    }


def ratio(seconds: dict[str, list[float]], side: str) -> float:
    """The median over rounds of our time to another side's."""
    return round(
        statistics.median(one / other for one, other in zip(seconds["caravan"], seconds[side], strict=True)), 3
    )


def timed(texts: int, tokens: int, precision: str, repeats: int) -> tuple[dict[str, list[float]], ...]:
    """Seconds of every step of every side, by the clock and of the processor, after one of each to warm up."""
    steps = {side: make_step(side, texts, tokens, precision) for side in SIDES}
    seconds, busy = ({side: [] for side in SIDES} for _ in range(2))
    for number in range(repeats + 1):
        for place in range(len(SIDES)):
            side = SIDES[(place + number) % len(SIDES)]
            started, started_busy = time.perf_counter(), time.process_time()
            steps[side]()
            if number:
                seconds[side].append(time.perf_counter() - started)
                busy[side].append(time.process_time() - started_busy)
    return seconds, busy


def peak_mib(side: str, texts: int, tokens: int, precision: str) -> float:
    """The highest resident size during two steps above that before them, in a process of its own."""
    step = make_step(side, texts, tokens, precision)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = resident_kib("VmRSS")
    step()
    step()
    return round((resident_kib("VmHWM") - before) / 1024, 1)


def resident_kib(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def make_step(side: str, texts: int, tokens: int, precision: str) -> Callable[[], None]:
    """Everything from tokens to moved parameters, of one side."""
    retriever, examples, inputs = make_training(texts, tokens, precision)
    numbers = list(range(texts))
    if side == "opacus":
        return opacus_step(retriever, inputs, numbers, torch.tensor([number % DOCUMENTS for number in numbers]))
    targets = Targets(
        [retriever.catalogue.gold_rows(example) for example in examples],
        queries=texts,
        document_count=DOCUMENTS,
        weighting="none",
        device=torch.device("cpu"),
    )
    parameters = dict(retriever.named_trainables())
    work = Work(
        retriever=retriever,
        parameters=parameters,
        inputs=inputs,
        targets=targets,
        count=texts,
        batch_size=texts,
        smoothing=0.0,
        seed=0,
    )
    config = PrivacyConfig(mode="dp-sgd", clip=CLIP, batch=texts)
    steps = (
        PlainSteps(work, 1)
        if side == "plain"
        else NoisedSteps(work, PrivateSteps(config, SIGMA, lambda _: None), examples)
    )
    optimizer, dropout = torch.optim.SGD(parameters.values(), lr=RATE), torch.Generator()

    def step() -> None:
        steps.gradients([numbers], dropout)
        optimizer.step()

    return step


def make_training(texts: int, tokens: int, precision: str) -> tuple[Retriever, list[Example], TokenInputs]:
    """A retriever with a square adapter and a flat head, and texts of exactly so many tokens."""
    backbone = load_backbone(BackboneConfig())
    catalogue = Catalogue([Document(f"d{number}", WORDS[number % len(WORDS)]) for number in range(DOCUMENTS)])
    rows = functional.normalize(
        torch.randn(DOCUMENTS, backbone.hidden_width, generator=torch.Generator().manual_seed(0))
    )
    retriever = Retriever.start(
        backbone, catalogue, rows, adapter=AdapterConfig(kind="full"), head=HeadConfig(hidden=0)
    )
    source = random.Random(0)
    examples = [
        Example(" ".join(source.choices(WORDS, k=tokens - 2)), (f"d{number % DOCUMENTS}",)) for number in range(texts)
    ]
    config = TrainingConfig(precision=precision, adapter=AdapterStageConfig(dropout=0.0, token_dropout=0.0))
    inputs = TokenInputs(retriever.encoder, [example.text for example in examples], config)
    if set(inputs.lengths) != {tokens}:
        raise SystemExit(f"texts of {sorted(set(inputs.lengths))} tokens, wanted are {tokens}")
    return retriever, examples, inputs


def opacus_step(
    retriever: Retriever, inputs: TokenInputs, numbers: list[int], gold: torch.Tensor
) -> Callable[[], None]:
    """Opacus' hooks on the adapter and the head as linear layers around the same blocks."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from caravan.model.encoder import pad

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    encoder, head = retriever.encoder, retriever.head
    width, scale = encoder.adapter.width, float(head.log_scale.detach().exp())
    adapter, linear = nn.Linear(width, width, bias=False), nn.Linear(encoder.width, DOCUMENTS)
    with torch.no_grad():
        adapter.weight.copy_(torch.eye(width))
        linear.weight.copy_(head.rows)
        linear.bias.zero_()
    adapter, linear = GradSampleModule(adapter), GradSampleModule(linear)
    parameters = [*adapter.parameters(), *linear.parameters()]
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=RATE),
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        expected_batch_size=len(numbers),
    )

    def step() -> None:
        input_ids, mask = pad([inputs.tokens[number] for number in numbers], device=torch.device("cpu"))
        soft = adapter(encoder.backbone.embed(input_ids))
        vectors = encoder.vectors(soft, mask, backbone=inputs.backbone)
        functional.cross_entropy(linear(scale * vectors), gold).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
