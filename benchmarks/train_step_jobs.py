"""The trainers that train_step.py compares: ours, torchtitan's own, and that of `transformers`, for the same shape."""

import json
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from machine import GPU

from mobilellm_pro.config import load
from mobilellm_pro.data.hugging_face_tokenizer import write_hugging_face_tokenizer
from mobilellm_pro.data.prepare import prepare
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.model.hugging_face import student_config
from mobilellm_pro.model.student import FLAVORS, StudentArgs
from mobilellm_pro.model.teacher import FLAVORS as TEACHERS
from mobilellm_pro.model.teacher import Teacher, TeacherArgs
from mobilellm_pro.pipeline.varied_job import words_of
from mobilellm_pro.training import run
from mobilellm_pro.training.distill_trainer import DistillTrainer
from mobilellm_pro.training.train_spec import register
from tests.data.synthetic import DEBUG_TOKENIZER, write_text, write_toml
from tests.training.small_world import write_teacher

if TYPE_CHECKING:
    from torchtitan.models.llama3 import TransformerModelArgs
    from torchtitan.train import Trainer
    from train_step_conversation import Conversation

TEACHER_WIDTH = {"debug": 128, "100m": 384}
TEACHER_DTYPE = torch.bfloat16 if GPU else torch.float32

JOB = """
[job]
dump_folder = "{folder}/run"
[model]
name = "mobilellm_pro"
flavor = "{flavor}"
[data]
tokenizer = "{tokenizer}"
[[data.datasets]]
name = "text"
path = "{world}/tokens/text"
weight = 1.0
"""


@dataclass(frozen=True)
class Job:
    """A way to train; the words of one row of the table."""

    way: str = "ours"
    """ "ours", "torchtitan" or "transformers"."""

    flavor: str = "debug"
    seq_len: int = 2048
    rows: int = 1
    steps: int = 32
    """At most, and those whose hidden states a cache has."""

    objective: str = "ce"
    teacher: str = "none"
    """ "live" or "cached", with objective "kl"; a cached one is "write" in the process that fills the cache."""

    chunk_tokens: int | None = None
    """Tokens whose logits our loss holds at the same time; default: from its budget of bytes."""

    compile: bool = False
    checkpointing: str = "none"
    """ "none", "selective" or "full"."""

    mask: str = "block_causal"
    """Of our student: documents do not see each other; "causal" as torchtitan's."""

    is_global: bool = False
    """Whether every layer of our student sees everything before, as torchtitan's."""

    optimizer: str = "fused"
    float8: bool = False
    """Of our student's linear layers; without a GPU emulated."""

    @property
    def name(self) -> str:
        """In the table."""
        teacher = f", {self.teacher} teacher" if self.objective == "kl" else ""
        switches = {
            f"chunks of {self.chunk_tokens} tokens": self.chunk_tokens is not None,
            "compiled": self.compile,
            "float8 products" + ("" if GPU else ", emulated"): self.float8,
            f"{self.checkpointing} checkpointing": self.checkpointing != "none",
            "all layers global": self.is_global,
            "plain causal mask": self.way == "ours" and self.mask == "causal",
            f"{self.optimizer} AdamW": self.optimizer != "fused",
        }
        return f"{self.way}: {self.objective}{teacher}" + "".join(f", {name}" for name, on in switches.items() if on)


def write_world(jobs: Sequence[Job], world: Path) -> None:
    """What all ways read: this Python's own library, a document a file, as text and as tokens; a tokenizer in
    torchtitan's form; a teacher where a way needs one.

    Args:
        jobs: of one flavor, with rows of one length.
        world: not there yet.
    """
    world.mkdir(parents=True)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in sources}
    write_text(world, texts, "text")
    prepare(write_toml(world, ("text",), holdout=0.0), workers=0)
    write_hugging_face_tokenizer(Tokenizer.load(str(DEBUG_TOKENIZER)), world / "tokenizer")
    if any(job.objective == "kl" for job in jobs):
        with torch.device("meta"):
            teacher = Teacher(teacher_args(jobs[0].flavor))
        write_teacher(teacher.to(TEACHER_DTYPE).to_empty(device="cpu"), world / "teacher")


def teacher_args(flavor: str) -> TeacherArgs:
    """Llama 4 with the student's vocabulary: beside the 1B, Scout with 24 of its 48 layers and 4 of its 16 experts."""
    if flavor == "1b":
        return replace(TEACHERS["scout"], num_hidden_layers=24, num_local_experts=4)
    return replace(TEACHERS["debug"], vocab_size=FLAVORS[flavor].vocab_size, hidden_size=TEACHER_WIDTH[flavor])


def build_trainer(job: Job, world: Path, folder: Path) -> DistillTrainer:
    """Ours, as `mobilellm-pro train` builds it; one in a process."""
    folder.mkdir(exist_ok=True)
    path = folder / "job.toml"
    path.write_text(JOB.format(folder=folder, world=world, flavor=job.flavor, tokenizer=DEBUG_TOKENIZER))
    settings = titan_settings(job) | {"attention.student_mask": job.mask, "distill.objective": job.objective}
    if GPU:  # else a step would read its rows, and their hidden states, while the GPU waits
        settings |= {"training.dataloader.num_workers": 2, "training.dataloader.pin_memory": True}
    if job.chunk_tokens is not None:
        settings["distill.chunk_tokens"] = job.chunk_tokens
    if job.is_global:
        settings["attention.global_layers"] = list(range(FLAVORS[job.flavor].num_hidden_layers))
    if job.float8:
        settings |= {"model.converters": ["quantize.linear.float8"], "quantize.linear.float8.emulate": not GPU}
    if job.objective == "kl":
        settings |= {"teacher.path": world / "teacher", "teacher.dtype": str(TEACHER_DTYPE).removeprefix("torch.")}
        settings["teacher.compile"] = job.compile and job.teacher == "live"
    if job.teacher in ("cached", "write"):
        mode = {"cached": "read", "write": "write"}[job.teacher]
        settings |= {"teacher.cache": mode, "teacher.cache_path": folder / "hidden_states"}
    run.set_default_environment()
    register()
    return DistillTrainer(load(path, words_of(settings)))


def build_titan(job: Job, world: Path, folder: Path) -> "Trainer":
    """torchtitan's own, with its llama3 model and its data loader."""
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import llama3_args
    from torchtitan.train import Trainer

    llama3_args[job.flavor] = titan_args(FLAVORS[job.flavor])
    config = JobConfig()
    settings = {"model.name": "llama3", "model.flavor": job.flavor, "model.hf_assets_path": str(world / "tokenizer")}
    settings |= {"job.dump_folder": str(folder), "training.dataset_path": str(world / "text")}
    for place, value in (settings | titan_settings(job)).items():
        section, key = place.split(".")
        setattr(getattr(config, section), key, value)
    run.set_default_environment()
    return Trainer(config)


def titan_args(args: StudentArgs) -> "TransformerModelArgs":
    """llama3 with the student's depth, width, heads and vocabulary; its two vocabulary matrices are separate, and all
    of its layers see everything before."""
    from torchtitan.models.llama3 import TransformerModelArgs

    return TransformerModelArgs(
        dim=args.hidden_size,
        n_layers=args.num_hidden_layers,
        n_heads=args.num_attention_heads,
        n_kv_heads=args.num_key_value_heads,
        vocab_size=args.vocab_size,
        multiple_of=args.intermediate_size,  # the next multiple of this is this
        ffn_dim_multiplier=1.0,
        rope_theta=args.rope_theta,
    )


def titan_settings(job: Job) -> dict[str, Any]:
    """What torchtitan's trainer and ours are both told."""
    return {
        "training.seq_len": job.seq_len,
        "training.local_batch_size": job.rows,
        "training.global_batch_size": job.rows,
        "training.steps": job.steps,
        "training.mixed_precision_param": "bfloat16" if GPU else "float32",
        "optimizer.implementation": job.optimizer,
        "lr_scheduler.warmup_steps": 2,
        "activation_checkpoint.mode": job.checkpointing,
        "compile.enable": job.compile,
        "compile.components": ["model"] if job.way == "ours" else ["model", "loss"],
        "checkpoint.enable": False,
        "metrics.enable_tensorboard": False,
        "metrics.log_freq": job.steps,
    }


def run_transformers(job: Job, world: Path, folder: Path, conversation: "Conversation") -> None:
    """The Trainer of `transformers` with our student as it has it, as the examples of its documentation train.

    Its loop cannot be stepped from outside, so it talks to the driver itself, before and after each step. Reading rows
    happens before that and is not counted.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers import Trainer as HuggingFaceTrainer

    args = FLAVORS[job.flavor]
    (folder / "student").mkdir()
    config = student_config(args, max_position_embeddings=job.seq_len, bos_id=1, eos_id=2, pad_id=3, dtype="float32")
    (folder / "student/config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "student"))
    flops = args.get_nparams_and_flops(model, job.seq_len)[1]

    class Told(TrainerCallback):
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not conversation.waits(model, flops):
                raise SystemExit

        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            conversation.answer()

    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        per_device_train_batch_size=job.rows,
        max_steps=job.steps,
        bf16=GPU,
        use_cpu=not GPU,
        torch_compile=job.compile,
        gradient_checkpointing=job.checkpointing != "none",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = packed_rows(world, job.seq_len, job.rows * job.steps)
    HuggingFaceTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[Told()]).train()


def packed_rows(world: Path, seq_len: int, count: int) -> list[dict[str, list[int]]]:
    """Texts end to end, cut into rows."""
    tokenizer, ids = Tokenizer.load(str(DEBUG_TOKENIZER)), list[int]()
    with (world / "text/text.jsonl").open() as lines:
        for line in lines:
            ids += tokenizer.encode(json.loads(line)["text"], bos=True, eos=True)
    rows = [ids[begin : begin + seq_len] for begin in range(0, len(ids) - seq_len, seq_len)]
    rows *= math.ceil(count / len(rows))
    return [{"input_ids": row, "labels": row} for row in rows]
