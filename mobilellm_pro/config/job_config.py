"""The sections that this project adds to torchtitan's JobConfig.

torchtitan's own sections ([job], [model], [training], [optimizer], ...) keep their names and meaning; the sections here
hold what a distillation run needs beside them. A TOML section is a dataclass field, a TOML key is a field of that
dataclass, and the text under a field is its documentation (`mobilellm-pro show` prints the values in force).

`config/toml.py` builds this class from a file; nothing rewrites it afterwards.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import JobConfig as TitanJobConfig

from mobilellm_pro.config.needle_cells import NeedleCells


@dataclass
class Attention:
    """Shape of the student's attention and of the masks of a packed row."""

    global_layers: list[int] | None = None
    """Layers with full attention; the others see `window` tokens. Default: the flavor's list."""

    window: int | None = None
    """Tokens that a local layer sees, itself included. Default: the flavor's (512 at 1b)."""

    rope_base: float | None = None
    """RoPE base of the student in this phase. Default: the flavor's (10,000)."""

    student_mask: Literal["block_causal", "causal"] = "block_causal"
    """Whether the student attends inside its own document only, or to the whole row before it."""

    teacher_mask: Literal["block_causal", "causal"] = "block_causal"
    """The same choice for the teacher."""

    positions: Literal["continue", "reset"] = "continue"
    """Position numbers inside a packed row: go on over document borders, or start at 0 in every document."""

    context_layout: Literal["contiguous", "head_tail"] = "contiguous"
    """Under context parallelism: one piece of the row a rank, or one from either end, which gives all ranks equal work
    in global layers where rows are long documents or the mask is causal. It costs local layers a second border."""


@dataclass
class Distill:
    """What is minimised."""

    objective: Literal["kl", "ce", "weighted"] = "kl"
    """`kl`: forward KL from the teacher over the full vocabulary. `ce`: next-token cross entropy, no teacher is loaded.
    `weighted`: `kl_weight` times the one plus `ce_weight` times the other."""

    kl_weight: float = 1.0
    """Read only with objective = "weighted"."""

    ce_weight: float = 0.0
    """Read only with objective = "weighted"."""

    temperature: float = 1.0
    """Softmax temperature T of the KL term, which is multiplied by T²."""

    chunk_tokens: int | None = None
    """Tokens whose logits exist at the same time. Default: chosen from a byte budget. More are quicker where that gives
    few, as on a CPU in float32, which holds logits of 128 tokens of two vocabularies of 202,048: try 256."""

    fp32_logits: bool = False
    """Accurate mode under bfloat16: logits good to fp32. Worth its time once the student is close to its teacher."""

    impl: Literal["auto", "torch", "chunked", "triton"] = "auto"
    """Implementation of the loss. `auto`: `triton` on a GPU, else `chunked`. `torch`: the reference, which materialises
    all logits and knows no tensor parallelism."""


@dataclass
class TeacherParallelism:
    """How the frozen teacher lies on the ranks; independent of the student's [parallelism] but for the context axis."""

    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the weights (FSDP2). -1: all that the other degrees leave; 1: no sharding."""

    tensor_parallel_degree: int = 1
    """Ranks that split heads and feed-forward columns of every layer."""

    expert_parallel_degree: int = 1
    """Ranks that split the experts of every layer and send each other their tokens."""

    resident: bool = False
    """Weights stay gathered after their first use: no traffic, one whole copy (of this rank's heads and experts)."""


@dataclass
class Teacher:
    """The frozen teacher."""

    path: str = ""
    """Hugging Face folder of a Llama 4 text model: config.json and safetensors, sharded or not."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type that the teacher's weights are held and computed in."""

    quantization: Literal["none", "float8"] = "none"
    """`float8`: linear and expert weights are held in FP8 with a scale per output channel (torchao)."""

    compile: bool = False
    """Compile the teacher layer by layer."""

    overlap: bool = False
    """Run the teacher for the next micro-batch of a step beside the student's backward pass (second CUDA stream)."""

    cache: Literal["off", "write", "read"] = "off"
    """The teacher's last hidden states on disk. `write`: keep those of every row; `read`: take them from there and load
    the teacher's head only."""

    cache_path: str = ""
    """Folder of the cache."""

    cache_dtype: Literal["teacher", "float8"] = "teacher"
    """`teacher`: as computed, without loss. `float8`: e4m3 with a scale per token, half of bfloat16."""

    cache_file_mib: int = 256
    """Size at which a rank begins another file."""

    parallelism: TeacherParallelism = field(default_factory=TeacherParallelism)
    """Layout of its own."""


@dataclass
class Dataset:
    """One corpus of the mixture."""

    name: str = ""
    """Name in logs and metrics."""

    path: str = ""
    """Folder that `mobilellm-pro prepare` wrote."""

    weight: float = 0.0
    """Share of the training tokens; the weights of all datasets sum to 1 (see `renormalize_weights`)."""

    max_epochs: float | None = None
    """Passes over the corpus that training must not exceed; `data.on_max_epochs` says what happens then."""

    clusters: list[int] | None = None
    """Only documents of these clusters are used, those of training and the held-out ones: numbers in the clusters.md
    that `mobilellm-pro prepare --cluster` wrote beside the corpus. Default: all documents. A corpus may stand in
    several tables, under other names with other clusters."""


@dataclass
class Data:
    """Token shards and their mixture."""

    tokenizer: str = ""
    """File in tiktoken's format, or "llama4" for the file inside the installed `llama-models` package."""

    datasets: list[Dataset] = field(default_factory=list)
    """The corpora, as `[[data.datasets]]` tables."""

    mix: str = ""
    """TOML file with such tables, as `mobilellm-pro mix` writes it. They replace those of the base when the file is
    loaded, which leaves this key empty."""

    renormalize_weights: bool = False
    """Divide the weights by their sum instead of refusing a sum other than 1."""

    seed: int = 0
    """Seed of the order: what is in step k is a function of (seed, k) alone."""

    packing: Literal["stream", "best_fit"] = "stream"
    """`stream`: documents follow one another and rows cut them anywhere, no token is lost. `best_fit`: a document that
    fits into a row is never cut; what stays empty is padded."""

    max_document_tokens: int | None = None
    """Only the first so many tokens of each document are used."""

    min_document_tokens: int | None = None
    """Only documents of at least so many tokens are used, those of training and the held-out ones. Their length before
    `max_document_tokens` counts, so that both keys together mean the beginnings of long documents."""

    on_max_epochs: Literal["error", "stop"] = "error"
    """When a corpus would pass its `max_epochs` before the last step: refuse to start, or stop before that step."""


QAT, FLOAT8 = "qat", "quantize.linear.float8"
"""Of `model.converters`: ours, which [quantization] sets up, and torchtitan's, of [quantize.linear.float8]."""


@dataclass
class Quantization:
    """Quantization-aware training, which `model.converters = ["qat"]` switches on."""

    scheme: Literal["none", "cpu", "accelerator"] = "none"
    """`cpu`: weights of 4 bits in groups of 32, activations and cache of 8 bits. `accelerator`: weights of 4 bits with
    a range for each output channel, everything else in the model's type. Exported is what was trained."""

    learned_ranges: bool | None = None
    """Whether the ranges of the weights are parameters, or follow from the weights. Default: the scheme's (`cpu`:
    computed, `accelerator`: learned)."""

    range_lr: float = 1e-4
    """Peak learning rate of learned ranges; they have no weight decay. A range is about as large as a weight."""


@dataclass
class Needle(NeedleCells):
    """The needle test during training (`mobilellm-pro needle` tests a finished checkpoint)."""

    enable: bool = False
    """Run it every `freq` steps and after the last one; the score goes where the losses go, the cells into needle/ of
    the run's folder."""

    freq: int = 1000
    """Steps between two tests. All ranks stop for one: each gathers the whole student (2.2 GB in bfloat16 at 1b), runs
    its share of the cells, and waits for the others. Waiting may take `comm.train_timeout_seconds` at most: give every
    rank about as many cells, or raise that key."""

    allow_longer: bool = False
    """Whether lengths above training.seq_len are meant, to see what the student does beyond what it is trained on."""


@dataclass
class Evaluation:
    """A suite of lm-eval-harness tasks during training (`mobilellm-pro evaluate` runs one on a finished checkpoint)."""

    suite: str = ""
    """TOML file as train_configs/suites/base.toml; a `limit` in it keeps the tests short. Empty: none."""

    freq: int = 1000
    """Steps between two tests, and one after the last step. All ranks stop for one, as for the needle test."""


@dataclass
class Guard:
    """What happens when a step is not finite: a loss or the norm of the gradients is NaN or infinite on any rank."""

    non_finite: Literal["stop", "skip"] = "stop"
    """`stop`: end the run with an error that names the step, the rank, the micro-batch, its rows and documents, and
    what in it is not finite. `skip`: drop the gradients on all ranks and go on with the next step; weights and moments
    stay as they are, the schedule of the learning rate goes on. Skipped steps are lines of their own in metrics.jsonl,
    and counted there and in DONE."""

    max_skipped_steps: int = 10
    """So many steps in a row may be skipped; one more stops the run: what does not end by itself is no accident of the
    data. Read only with non_finite = "skip"."""


@dataclass
class JobConfig(TitanJobConfig):
    """torchtitan's configuration with the sections of this project."""

    attention: Attention = field(default_factory=Attention)
    distill: Distill = field(default_factory=Distill)
    teacher: Teacher = field(default_factory=Teacher)
    data: Data = field(default_factory=Data)
    needle: Needle = field(default_factory=Needle)
    evaluation: Evaluation = field(default_factory=Evaluation)
    guard: Guard = field(default_factory=Guard)
    quantization: Quantization = field(default_factory=Quantization)
