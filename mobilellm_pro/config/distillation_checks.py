"""What the keys of this project's own sections must be to each other."""

from collections import Counter
from collections.abc import Iterator

from mobilellm_pro.config.config_error import Issue
from mobilellm_pro.config.job_config import JobConfig

WEIGHT_SUM_TOLERANCE = 1e-6
"""How far the weights of the corpora may be from 1: room for rounding in their sum, not in the mix."""


def check_distill(config: JobConfig) -> Iterator[Issue]:
    """Objective, its weights, and the teacher that it needs."""
    distill = config.distill
    objective = distill.objective
    if objective != "ce" and not config.teacher.path:
        expected = f'the Hugging Face folder of the teacher, because distill.objective = "{objective}"'
        yield Issue(("teacher.path", "distill.objective"), "nothing", expected)
    weights = {"distill.kl_weight": distill.kl_weight, "distill.ce_weight": distill.ce_weight}
    defaults = {"distill.kl_weight": 1.0, "distill.ce_weight": 0.0}
    for key, weight in weights.items():
        if objective != "weighted" and weight != defaults[key]:
            found = f'{weight} with distill.objective = "{objective}", which does not read it'
            yield Issue((key, "distill.objective"), found, 'distill.objective = "weighted"')
        if objective == "weighted" and weight < 0:
            yield Issue((key,), str(weight), "zero or a positive number")
    if objective == "weighted" and max(weights.values()) <= 0:
        yield Issue(("distill.kl_weight", "distill.ce_weight"), "no positive weight", "kl_weight or ce_weight above 0")
    if distill.temperature <= 0:
        yield Issue(("distill.temperature",), str(distill.temperature), "a positive number")
    if distill.chunk_tokens is not None and distill.chunk_tokens <= 0:
        yield Issue(("distill.chunk_tokens",), str(distill.chunk_tokens), "a positive number of tokens")
    if distill.impl == "torch" and config.parallelism.tensor_parallel_degree > 1:
        keys = ("distill.impl", "parallelism.tensor_parallel_degree")
        yield Issue(keys, f'"torch" on {config.parallelism.tensor_parallel_degree} ranks', '"auto" or "chunked"')


def check_data(config: JobConfig) -> Iterator[Issue]:
    """Tokenizer and corpora."""
    data = config.data
    for name in ("min_document_tokens", "max_document_tokens"):
        limit = getattr(data, name)
        if limit is not None and limit < 1:
            yield Issue((f"data.{name}",), str(limit), "a positive number of tokens; leave it out for no limit")
    if not data.tokenizer:
        yield Issue(("data.tokenizer",), "nothing", 'a file in tiktoken\'s format, or "llama4"')
    if not data.datasets:
        yield Issue(("data.datasets",), "no corpus", "at least one [[data.datasets]] table with name, path and weight")
        return
    for index, dataset in enumerate(data.datasets):
        key = f"data.datasets[{index}]"
        for name in ("name", "path"):
            if not getattr(dataset, name):
                yield Issue((f"{key}.{name}",), "nothing", f"the corpus' {name}")
        if not 0 < dataset.weight < float("inf"):
            yield Issue((f"{key}.weight",), str(dataset.weight), "a positive share; leave the table out for none")
        if dataset.max_epochs is not None and dataset.max_epochs <= 0:
            yield Issue((f"{key}.max_epochs",), str(dataset.max_epochs), "a positive number; leave it out for no limit")
        clusters = dataset.clusters
        if clusters is not None and (not clusters or min(clusters) < 0 or len(set(clusters)) < len(clusters)):
            expected = "numbers of clusters from 0, each once; leave it out for all documents"
            yield Issue((f"{key}.clusters",), str(clusters), expected)
    for name, count in Counter(dataset.name for dataset in data.datasets).items():
        if count > 1 and name:
            yield Issue(("data.datasets",), f'{count} corpora named "{name}"', "one name for one corpus")
    total = sum(dataset.weight for dataset in data.datasets)
    if not data.renormalize_weights and abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        expected = "weights that sum to 1, or data.renormalize_weights = true"
        yield Issue(("data.datasets",), f"weights that sum to {total:.6g}", expected)


def check_attention(config: JobConfig) -> Iterator[Issue]:
    """Window, RoPE base and the layers that see everything."""
    attention = config.attention
    for name in ("window", "rope_base"):
        value = getattr(attention, name)
        if value is not None and value <= 0:
            yield Issue((f"attention.{name}",), str(value), "a positive number")
    layers = attention.global_layers
    if layers is not None and (min(layers, default=0) < 0 or len(set(layers)) < len(layers)):
        yield Issue(("attention.global_layers",), str(layers), "layer numbers from 0, each once")
