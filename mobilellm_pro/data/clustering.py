"""Sorts the documents of prepared corpora into clusters: `prepare --cluster`.

    mobilellm-pro prepare train_configs/debug/datasets.toml --cluster

K-means on points of documents (`cluster_features`): the first centers are the best of several tries on a sample, then
passes over training documents move them, a batch at a time (Sculley, "Web-scale k-means clustering", 2010, as
scikit-learn has it). A pass has the seeded order of `shuffle`, whatever order the corpus has on disk. Then every
document of every split gets the number of the nearest center; clusters are numbered by their size. Memory holds a
sample, a batch, the centers and a byte or two a document.

A corpus is clustered as a whole or not at all: a run that was killed begins it again and comes to the same clusters.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobilellm_pro.atomic_file import write_atomically
from mobilellm_pro.data.cluster_assignment import Assigner, assign
from mobilellm_pro.data.cluster_config import ClusterConfig
from mobilellm_pro.data.cluster_features import (
    Features,
    document_text,
    features_identity,
    features_problem,
    make_features,
)
from mobilellm_pro.data.cluster_report import describe_clusters, report_text
from mobilellm_pro.data.clusters import (
    FILE,
    REPORT,
    ClusterRecord,
    label_type,
    read_clusters,
    write_clusters,
    write_labels,
)
from mobilellm_pro.data.dataset_config import DatasetsConfig
from mobilellm_pro.data.manifest import read_manifest
from mobilellm_pro.data.shard_writer import full_disk_named
from mobilellm_pro.data.shards import Corpus
from mobilellm_pro.data.shuffle import BlockShuffle, hash_key, sum_blocks
from mobilellm_pro.data.tokenizer import Tokenizer

_SAMPLE_DOCUMENTS = 4096
_TRIES = 10


def cluster_problems(config: DatasetsConfig) -> list[str]:
    """Everything that keeps the corpora of a file from being clustered here, known before they are prepared."""
    wanted = any(dataset.clusters for dataset in config.datasets)
    problem = features_problem(config.cluster) if wanted else ""
    return [problem] if problem else []


def cluster_corpora(
    config: DatasetsConfig, tokenizer: Tokenizer, *, overwrite: bool = False, workers: int | None = None
) -> None:
    """Clusters every prepared corpus of a file that asks for it; what is done is skipped.

    Args:
        config: of the file.
        tokenizer: of the corpora.
        overwrite: cluster afresh what was clustered with other settings, instead of refusing.
        workers: processes that number the documents; None: one a core, 0: this one.

    Raises:
        ValueError: a corpus was clustered with other settings, has fewer documents than clusters, or the disk is full.
    """
    if not any(dataset.clusters for dataset in config.datasets):
        print("nothing to cluster: no [[dataset]] says how many `clusters` it shall have")
        return
    encoder = features_identity(config.cluster)
    wanted = [
        (config.output / dataset.name, config.cluster.settings(dataset.clusters) | encoder)
        for dataset in config.datasets
        if dataset.clusters
    ]
    missing = [item for item in wanted if not _is_done(*item, overwrite)]  # all are looked at before hours of work
    for folder, settings in missing:
        _cluster_corpus(folder, config.cluster, settings, tokenizer, workers)


def _is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether a corpus has the clusters that are asked for; raises ValueError where it has others."""
    try:
        record = read_clusters(folder)
        if record is None:
            return False
        changed = [
            f"{key} was {record.settings.get(key)!r}, now {settings.get(key)!r}"
            for key in sorted(settings | record.settings)
            if record.settings.get(key) != settings.get(key)
        ]
        if record.corpus != {split: corpus.content for split, corpus in _open_splits(folder).items()}:
            changed.append("its documents have changed")
        if changed:
            raise ValueError(
                f"{folder / FILE}: clustered differently: {'; '.join(changed)}. Restore the settings, or set overwrite "
                "to cluster again: jobs that name clusters of this corpus then read other documents"
            )
    except ValueError:
        if not overwrite:
            raise
        return False
    if not (folder / REPORT).exists():
        write_atomically(folder / REPORT, report_text(folder.name, record))
    print(f"{folder.name:<13} already clustered: {record.sizes()}")
    return True


def _open_splits(folder: Path) -> dict[str, Corpus]:
    return {split: Corpus.open(folder, split) for split, shards in read_manifest(folder).shards.items() if shards}


def _cluster_corpus(
    folder: Path, config: ClusterConfig, settings: dict[str, Any], tokenizer: Tokenizer, workers: int | None
) -> None:
    from threadpoolctl import threadpool_limits

    corpora, number = _open_splits(folder), settings["clusters"]
    train = corpora.get("train")
    if train is None or train.num_documents < number:
        found = 0 if train is None else train.num_documents
        raise ValueError(
            f"{folder}: {found} training documents, too few for {number} clusters: lower `clusters` of this dataset"
        )
    features = make_features(config)
    # Sums in one order, so that the number of cores changes no cluster; an encoder may have torch's threads.
    threads = threadpool_limits(1) if features.in_processes else nullcontext()
    fitted = min(train.num_documents, config.fit_documents)
    total = fitted * (config.passes + features.must_learn) + sum(c.num_documents for c in corpora.values())
    words = {"desc": f"clustering {folder.name}", "unit": " documents", "unit_scale": True, "disable": None}
    with tqdm(total=total, **words) as bar, threads:
        model = _fit(train, features, config, number, tokenizer, bar.update)
        assigner = Assigner(model, corpora, features, config.document_tokens, tokenizer)
        labels = assign(assigner, config.batch_documents, workers, bar.update)
    order = np.argsort(-np.bincount(labels["train"], minlength=number), kind="stable")
    rank = np.empty(number, dtype=label_type(number))
    rank[order] = np.arange(number)
    labels = {split: rank[values] for split, values in labels.items()}

    def read(split: str, document: int) -> str:
        return document_text(corpora[split], document, config.document_tokens, tokenizer)

    clusters = describe_clusters(corpora, labels, number, read)
    with full_disk_named(folder / FILE):
        files = write_labels(folder, labels)
        record = ClusterRecord(settings, {split: c.content for split, c in corpora.items()}, files, clusters)
        write_atomically(folder / REPORT, report_text(folder.name, record))
        write_clusters(folder, record)
    tqdm.write(f"{folder.name:<13} clustered: {record.sizes()}; described in {folder / REPORT}")


def _fit(
    corpus: Corpus, features: Features, config: ClusterConfig, number: int, tokenizer: Tokenizer,
    progress: Callable[[int], Any],
) -> Any:  # fmt: skip
    """The centers, as a fitted scikit-learn model."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    def texts_of(epoch: int, size: int) -> Iterator[list[str]]:
        for documents in _batches(_order(corpus, config, epoch), size):
            yield [document_text(corpus, document, config.document_tokens, tokenizer) for document in documents]

    if features.must_learn:
        for texts in texts_of(0, config.batch_documents):
            features.learn(texts)
            progress(len(texts))
    sample = next(texts_of(0, max(_SAMPLE_DOCUMENTS, number)))
    features.settle(sample)
    centers = KMeans(number, n_init=_TRIES, random_state=config.seed).fit(features.points(sample)).cluster_centers_
    del sample
    model = MiniBatchKMeans(number, init=centers, n_init=1, random_state=config.seed, compute_labels=False)
    model.reassignment_ratio = 0.0  # no center leaves its place in the middle of a pass
    for epoch in range(config.passes):
        for texts in texts_of(epoch, config.batch_documents):
            model.partial_fit(features.points(texts))
            progress(len(texts))
    return model


def _order(corpus: Corpus, config: ClusterConfig, epoch: int) -> Iterator[int]:
    """Numbers of the documents of a pass."""
    size, left = corpus.num_documents, min(corpus.num_documents, config.fit_documents)
    ones = sum_blocks(size, lambda first, last: np.ones(last - first, dtype=np.int64))
    shuffle = BlockShuffle(size, hash_key(config.seed, corpus.name), ones)
    group = 0
    while left > 0:
        documents = shuffle.items(epoch, group)[:left]
        yield from documents.tolist()
        left, group = left - len(documents), group + 1


def _batches(documents: Iterator[int], size: int) -> Iterator[list[int]]:
    """`size` documents at a time, the last ones fewer."""
    while batch := list(islice(documents, size)):
        yield batch
