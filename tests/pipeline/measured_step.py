"""One real training step of small models on this machine, measured: what a plan predicted is compared with it.

The step is the trainer's, without loop and data: teacher, student, loss, backward, optimizer. On several ranks the fake
backend stands for the others: numbers are garbage then, but every buffer is allocated, and FSDP2 holds and frees it as
always. Bytes allocated are those that torch's profiler sees; resident bytes are the process'.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.utils import maybe_enable_amp
from torchtitan.tools.utils import device_type

from mobilellm_pro.config import JobConfig, load
from mobilellm_pro.losses import linear_distillation
from mobilellm_pro.model import key_exchange
from mobilellm_pro.model import student as student_module
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.parallelize import parallelize_student
from mobilellm_pro.model.registry import configured_args, model_on_meta
from mobilellm_pro.model.row_shard import RowShard
from mobilellm_pro.model.student import StudentArgs
from mobilellm_pro.model.teacher import FLAVORS as TEACHER_FLAVORS
from mobilellm_pro.model.teacher import Teacher, TeacherArgs
from mobilellm_pro.model.teacher_sharding import connect, make_groups, shard_frozen
from mobilellm_pro.pipeline.peak_memory import RankMemory, StudentStep, rank_memory
from mobilellm_pro.pipeline.plan import teacher_step
from mobilellm_pro.pipeline.step_shape import StepShape, step_shape
from mobilellm_pro.pipeline.step_work import loss_flops, student_flops, teacher_flops, transfers
from mobilellm_pro.training.fake_ranks import fake_ranks, frozen_teacher_layout, student_shards
from mobilellm_pro.training.frozen_teacher import FrozenTeacher
from mobilellm_pro.training.train_spec import build_optimizers

MID_STUDENT = StudentArgs(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=128,
    global_layers=(0, 4, 5),
)
LARGE_STUDENT = replace(
    MID_STUDENT,
    vocab_size=16_384,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    head_dim=64,
    global_layers=(0, 4, 7),
)
MID_TEACHER = replace(
    TEACHER_FLAVORS["debug"], vocab_size=8192, hidden_size=384, intermediate_size=768, head_dim=96, num_hidden_layers=3
)
LARGE_TEACHER = replace(MID_TEACHER, vocab_size=16_384, hidden_size=768, intermediate_size=1536, head_dim=192)
FLAVORS = cast(dict[str, StudentArgs], student_module.FLAVORS)
FLAVORS |= {"mid": MID_STUDENT, "large": LARGE_STUDENT}
TEACHERS = {"debug": TEACHER_FLAVORS["debug"], "mid": MID_TEACHER, "large": LARGE_TEACHER}
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
"""Environment in which the C library gives freed blocks back to the system, else they stay resident."""

CONFIG = Path(__file__).parents[2] / "train_configs/debug/1_language.toml"


def load_step(flavor: str, *overrides: str) -> tuple[JobConfig, TeacherArgs]:
    """Job and teacher of a flavor: two rows of 512 tokens, one micro-batch."""
    sizes = ("--training.global_batch_size=-1", "--training.local_batch_size=2", "--training.seq_len=512")
    return load(CONFIG, [*sizes, "--validation.no_enable", f"--model.flavor={flavor}", *overrides]), TEACHERS[flavor]


@dataclass
class Predicted:
    """The plan of the same step on this machine's kind of device."""

    shape: StepShape
    memory: RankMemory
    flops: dict[str, float]
    """By part of the step."""

    num_bytes: float
    """Of all transfers."""


def predict(config: JobConfig, world_size: int, args: TeacherArgs) -> Predicted:
    """What a plan says of the step that the functions below measure."""
    shape = step_shape(config, world_size, device="cuda" if device_type == "cuda" else "cpu")
    with fake_ranks(config, world_size) as dims:
        student_args = configured_args(config)
        assert isinstance(student_args, StudentArgs)
        student = StudentStep(student_args, student_shards(config, dims))
        teacher = teacher_step(config, args, world_size)
    own = student_flops(config, student_args, shape)
    flops = {
        "teacher": teacher_flops(config, teacher, shape),
        "student": own["forward"],
        "loss": sum(loss_flops(config, student_args, args.hidden_size, teacher.element_bytes, shape).values()),
        "backward": own["backward"] + own["recomputed"],
    }
    moved = sum(transfer.num_bytes for transfer in transfers(student, teacher, shape))
    return Predicted(shape, rank_memory(config, student, teacher, shape), flops, moved)


@dataclass
class Measured:
    """What one step took."""

    saved_activations: int = 0
    """Bytes that autograd kept of the student, weights apart."""

    parameters: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    teacher: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    """Most bytes allocated in each part of the step, what was there before it included."""


class Step:
    """The models of a configuration on rank 0 of so many ranks, and a micro-batch; used inside `fake_ranks`."""

    def __init__(self, config: JobConfig, teacher_args: TeacherArgs | None, dims: Any) -> None:
        self.config, training = config, config.training
        torch.manual_seed(0)
        student = model_on_meta(config).to(TORCH_DTYPE_MAP[training.dtype])
        parallelize_student(student, dims, config)
        self.student = student.to_empty(device=device_type)
        self.student.init_weights()
        self.amp = maybe_enable_amp(dims, training.mixed_precision_param, device_type)
        self.optimizers = build_optimizers([self.student], config.optimizer, dims)
        vocabulary = student.model_args.vocab_size
        shape = (training.local_batch_size, training.seq_len)
        self.tokens, self.labels = (torch.randint(vocabulary, shape, device=device_type) for _ in range(2))
        # A plan describes the context-parallel rank with the last part of the rows.
        self.shard = RowShard(shape[1], dims.cp, dims.cp - 1, config.attention.context_layout == "head_tail")
        self.document_ids = torch.zeros(shape, dtype=torch.int64, device=device_type)
        self.tokens, self.labels = self.shard.take(self.tokens), self.shard.take(self.labels)
        self.rows: Any = None
        self.teacher = None
        if teacher_args is not None:
            self.teacher = self._frozen(teacher_args, dims.world_size)
            self.teacher_bytes = sum(map(_local_bytes, self.teacher.model.parameters()))
        self.hidden: Any = None
        self.terms: Any = None

    def _frozen(self, args: TeacherArgs, world_size: int) -> FrozenTeacher:
        layout = frozen_teacher_layout(self.config, world_size)
        with torch.device("meta"):
            model = Teacher(args, layout.split).to(TORCH_DTYPE_MAP[self.config.teacher.dtype])
        groups, resident = make_groups(layout), self.config.teacher.parallelism.resident
        connect(model, groups)
        shard_frozen(model, groups, resident=resident)
        model.to_empty(device=device_type)
        model.init_weights()
        return FrozenTeacher(model.eval(), args, groups, mask="block_causal", resident=resident)

    def run_teacher(self) -> None:
        """The teacher's hidden states."""
        self.rows = PackedRows(self.document_ids, "continue", self.shard)
        if self.teacher is not None:
            self.hidden = self.teacher.hidden(self.tokens, self.rows)

    def run_student(self) -> None:
        """The student up to, and without, the loss."""
        masks = self.rows.masks(self.student.spans())
        with self.amp:
            self.last = self.student(self.tokens, self.rows.positions, masks, head=lambda *pair: pair)
            if isinstance(self.amp, torch.autocast):
                dtype = TORCH_DTYPE_MAP[self.config.training.mixed_precision_param]
                self.last = tuple(tensor.to(dtype) for tensor in self.last)

    def run_loss(self) -> None:
        """The loss of both."""
        head = None if self.teacher is None else self.teacher.head
        with torch.autocast(device_type, enabled=False):
            self.terms = linear_distillation(
                *self.last,
                self.hidden,
                head,
                self.labels,
                kl_weight=float(head is not None),
                ce_weight=float(head is None),
                fp32_logits=self.config.distill.fp32_logits,
                chunk_tokens=self.config.distill.chunk_tokens,
            )
        self.last = None
        if self.teacher is not None:
            self.teacher.release()

    def run_backward(self) -> None:
        """Gradients."""
        self.terms.loss.backward()
        self.terms = self.hidden = None

    def run_optimizer(self) -> None:
        """The optimizer's step."""
        self.optimizers.step()

    def parts(self) -> dict[str, Callable[[], None]]:
        """The step, in order."""
        names = ("teacher", "student", "loss", "backward", "optimizer")
        return {name: getattr(self, f"run_{name}") for name in names}

    def clear(self) -> None:
        """Between steps: no gradients, nothing gathered."""
        self.optimizers.zero_grad()
        for module in self.student.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def measure_memory(config: JobConfig, world_size: int, teacher: TeacherArgs | None) -> Measured:
    """The second step: bytes held, kept and allocated."""
    measured = Measured()
    gc.collect()  # what an earlier measurement left behind would be freed in this one
    with fake_ranks(config, world_size) as dims, counted_keys():

        def first_step() -> None:
            nonlocal step
            step = Step(config, teacher, dims)
            kept = KeptTensors(step.student)
            for name, part in step.parts().items():
                with kept if name == "student" else nullcontext():
                    part()
            measured.saved_activations = kept.finish()
            _measure_held(step, measured)
            step.clear()

        step: Any = None
        _, held = allocated(first_step)
        for name, part in step.parts().items():
            peak, net = allocated(part)
            measured.moments[name] = held + peak
            held += net
    return measured


def _measure_held(step: Step, measured: Measured) -> None:
    parameters = list(step.student.parameters())
    measured.parameters = sum(map(_local_bytes, parameters))
    measured.gradients = sum(_local_bytes(parameter.grad) for parameter in parameters)
    state = step.optimizers.optimizers[0].state
    measured.optimizer_state = sum(_local_bytes(tensor) for values in state.values() for tensor in values.values())
    if step.teacher is not None:
        measured.teacher = step.teacher_bytes


def measure_flops(config: JobConfig, world_size: int, teacher: TeacherArgs | None) -> dict[str, int]:
    """Products of one step as torch's counter sees them, with the CPU's kernels that it does not know."""
    counted = {}
    with fake_ranks(config, world_size) as dims, counted_keys():
        step = Step(config, teacher, dims)
        for name, part in step.parts().items():
            with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
                part()
            counted[name] = counter.get_total_flops()
    return counted


def measure_resident(config: JobConfig, teacher: TeacherArgs | None) -> int:
    """Most bytes resident in the second step on one rank, above the process before it had models: models included."""
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = _status("VmRSS")
    with fake_ranks(config, 1) as dims:
        step = Step(config, teacher, dims)
        for part in step.parts().values():
            part()
        step.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        for part in step.parts().values():
            part()
        return _status("VmHWM") - before


def measure_transfers(config: JobConfig, world_size: int, teacher: TeacherArgs | None) -> float:
    """Bytes that the collectives of one step would bring to rank 0."""
    with fake_ranks(config, world_size) as dims, counted_keys() as keys:
        step = Step(config, teacher, dims)
        for part in step.parts().values():  # what stays gathered is gathered here
            part()
        step.clear()
        keys.clear()
        with Arriving() as arriving:
            for part in step.parts().values():
                part()
        return arriving.num_bytes + sum(keys)


@contextmanager
def counted_keys() -> Iterator[list[int]]:
    """Keys and values come from nowhere, and their bytes are listed.

    torch's fake backend copies what is sent to where something is received; the last part of a row sends nothing.
    """
    received_bytes: list[int] = []

    def arrive(sent: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Any) -> Tensor:
        received = sent.new_zeros(sum(receive), *sent.shape[1:])
        received_bytes.append(received.nbytes)
        return received

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_exchange, "_all_to_all", arrive)
        yield received_bytes


class Arriving(TorchDispatchMode):
    """Counts the bytes that collectives bring; one of a single number counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "c10d::_allgather_base_":
            self.num_bytes += args[0].nbytes - args[1].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.num_bytes += args[1].nbytes - args[0].nbytes
        elif name == "c10d::allreduce_":
            size = dist.ProcessGroup.unbox(args[1]).size()
            self.num_bytes += sum(2 * tensor.nbytes * (size - 1) / size for tensor in args[0])
        elif name.startswith(("c10d::", "_c10d_functional::")):
            raise AssertionError(f"a collective that is not counted: {name}")
        return func(*args, **(kwargs or {}))


class KeptTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages that autograd keeps, each once, without the model's own and without masks of bits."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.num_bytes = 0
        self._alive: list[Tensor] = []
        self._weights = {_local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
        self._seen: set[int] = set()
        super().__init__(self._count, lambda tensor: tensor)

    def finish(self) -> int:
        """What was counted, and nothing is held any more."""
        self._alive.clear()
        return self.num_bytes

    def _count(self, tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        address = storage.data_ptr()
        if address not in self._weights | self._seen and tensor.dtype != torch.bool:
            self._seen.add(address)
            self._alive.append(tensor)  # so that no address is used twice
            self.num_bytes += storage.nbytes()
        return tensor


def allocated(function: Callable[[], None]) -> tuple[int, int]:
    """Calls it; (most bytes allocated above the start, bytes more at the end)."""
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, num_bytes in changes:
        now += num_bytes
        most = max(most, now)
    return most, now


def _sdpa(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, *_as_many_heads(query, key, value))


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, *_as_many_heads(query, key, value))


def _as_many_heads(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    rows, heads = query[:2]
    return (rows, heads, *key[2:]), (rows, heads, *value[2:])


def _grouped(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """Every token meets one matrix of the group."""
    return 2 * x[0] * x[1] * weight[-1]


CPU_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    torch.ops.aten._grouped_mm: _grouped,
}
"""The counter's own table knows the kernels of a GPU only."""


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _local_bytes(tensor: Any) -> int:
    return _local(tensor).nbytes


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
