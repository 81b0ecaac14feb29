"""What may stand in `3_merge.toml`: a dataclass a table, a field a key, the text under it its documentation."""

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["given", "uniform", "coordinate", "nelder_mead", "cma_es"]


@dataclass
class BranchTable:
    """One [[branch]]: a model that is merged."""

    name: str = ""
    """In tables and on the command line."""

    checkpoint: str = ""
    """Folder of its run (the newest checkpoint counts), or one `step-N` folder."""

    weight: float | None = None
    """Of all branches or of none; they sum to 1. With `search.method = "given"` these are taken, with a search they
    are one candidate more."""


@dataclass
class ReportDomainTable:
    """One [[domain]] whose text scores the models."""

    name: str = ""
    """In tables."""

    path: str = ""
    """Folder of a prepared corpus."""

    clusters: list[int] | None = None
    """Only documents of these clusters of it. Default: all."""


@dataclass
class SearchTable:
    """How the weights are found."""

    method: Method = "coordinate"
    """`given`: those of the branches; `uniform`: all alike; else uniform, every branch alone, a greedy soup and random
    weights, and from the best of these by coordinate steps, Nelder-Mead or CMA-ES."""

    objective: Literal["bits_per_byte", "kl", "suite"] = "bits_per_byte"
    """What is minimised: the mean over the domains, on their part "dev", of bits per byte or of the KL from the job's
    teacher, in nats a token (the teacher runs once, in one process); or the mean of 1 - score over a suite's columns.
    """

    suite: str = ""
    """TOML file of lm-eval tasks for objective "suite". Its documents should be none that a report uses, as those of
    training parts, and many: scores move in steps of a document."""

    budget: int = 60
    """Candidates that are scored."""

    draws: int = 16
    """Of them random weights."""

    concentration: float = 1.0
    """Each parameter of their Dirichlet distribution: 1 is even over the simplex, more is closer to uniform weights."""

    layer_groups: list[int] = field(default_factory=list)
    """First layers of groups that get weights of their own, from 0, and the embedding is one more group. Empty: all
    parameters have the same weights."""

    allow_negative: bool = False
    """Weights, given ones too, need only sum to 1."""

    dev_tokens: int | None = None
    """Of each domain that a candidate is scored on. Default: its part of the job's validation."""

    memory_gib: float = 4.0
    """If the branches together are not larger they are kept in memory; else a candidate reads them from disk."""


@dataclass
class WarningTable:
    """What is worth a warning."""

    distance: float = 0.1
    """Of a branch from the parent, relative to the parent's length."""

    barrier: float = 0.02
    """By which the score between a branch and uniform weights exceeds the straight line between the two ends."""

    barrier_points: int = 3
    """Where that line is scored; they count as candidates. 0: not at all."""


@dataclass
class MergeTable:
    """The file."""

    output: str = ""
    """Folder for everything."""

    job: str = ""
    """TOML file of a job, relative to this file's folder: tokenizer, corpora, how much text is validated, teacher."""

    parent: str = ""
    """Checkpoint that all branches began with: a run folder or a `step-N` folder. Default: what the branches'
    configurations name."""

    seed: int = 0
    """Of the search."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the merged checkpoint; sums are float32."""

    hugging_face_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the Hugging Face folder."""

    valid_tokens: int | None = None
    """Of each domain's held-out part that the reported models are tested on. Default: as `search.dev_tokens`."""

    branch: list[BranchTable] = field(default_factory=list)
    domain: list[ReportDomainTable] = field(default_factory=list)
    """Default: the corpora of the job."""

    search: SearchTable = field(default_factory=SearchTable)
    warnings: WarningTable = field(default_factory=WarningTable)
