"""What the service counts, for Prometheus (the only prometheus_client importer)."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # the library's: where several processes add up what they count

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one service; no label holds anything that a client wrote.

    Attributes:
        requests: by route, method and status.
        request_seconds: from the first byte to the last, by route.
        queue_seconds: that texts waited for the encoder.
        inference_seconds: of a batch, text to answer.
        batch_size: texts a batch.
        waiting: texts that wait now.
        documents: in the catalogue now.
        reloads: of the folder, by outcome.
    """

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        self.requests = Counter("caravan_requests", "Requests answered", ["route", "method", "status"], registry=to)
        self.request_seconds = Histogram(
            "caravan_request_seconds", "Time of a request", ["route"], buckets=_SECONDS, registry=to
        )
        self.queue_seconds = Histogram("caravan_queue_seconds", "Time in the queue", buckets=_SECONDS, registry=to)
        self.inference_seconds = Histogram(
            "caravan_inference_seconds", "Time of a batch", buckets=_SECONDS, registry=to
        )
        self.batch_size = Histogram("caravan_batch_size", "Texts in a batch", buckets=_TEXTS, registry=to)
        self.waiting = Gauge("caravan_waiting_texts", "Texts in the queue", multiprocess_mode="livesum", registry=to)
        self.documents = Gauge("caravan_documents", "Documents served", multiprocess_mode="livemax", registry=to)
        self.reloads = Counter("caravan_reloads", "Reloads of the model folder", ["outcome"], registry=to)

    def exposition(self) -> bytes:
        """All counters in Prometheus' text format; with several workers the sum over them."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


def forget_process() -> None:
    """Take what this process says of the present moment out of the sum: it ends."""
    if FOLDER_VARIABLE in os.environ:
        mark_process_dead(os.getpid())
