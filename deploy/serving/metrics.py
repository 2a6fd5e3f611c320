"""What GET /metrics shows to Prometheus."""

from deploy.serving.batching import Batcher

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The service's figures, in a registry of their own. They outlive an app that another one replaces."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("simcse_requests", "Requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("simcse_request_seconds", "Time to answer a request", ["path"],
                                 registry=self.registry)
        self.batch_jobs = Histogram("simcse_batch_requests", "Requests of a batch", registry=self.registry,
                                    buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256])
        self.texts = Counter("simcse_texts", "Texts encoded, repeated ones included", registry=self.registry)
        self.waiting = Gauge("simcse_waiting_texts", "Texts that wait for a batch", registry=self.registry)
        self.documents = Gauge("simcse_documents", "Documents that are searched", registry=self.registry)
        self.outdated = Gauge("simcse_index_is_outdated", "1: the index on disk is newer than the one that is searched",
                              registry=self.registry)
        self.index_is_outdated = False

    def set_outdated(self, outdated: bool) -> None:
        """Show whether the index on disk is newer than the one that is searched."""
        self.index_is_outdated = outdated
        self.outdated.set(outdated)

    def watch(self, batcher: Batcher, documents: int) -> None:
        """Show the batches of this batcher, and this number of documents, from now on."""
        self.waiting.set_function(lambda: batcher.waiting)
        self.documents.set(documents)
        batcher.on_batch = self.count_batch

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def count_batch(self, jobs: int, texts: int) -> None:
        self.batch_jobs.observe(jobs)
        self.texts.inc(texts)
