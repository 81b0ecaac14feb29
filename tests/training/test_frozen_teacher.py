"""The frozen teacher gives every rank the hidden states of stock Llama 4 for its own tokens, whatever its layout."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mobilellm_pro.config import load
from mobilellm_pro.config.job_config import Teacher as TeacherConfig
from mobilellm_pro.config.job_config import TeacherParallelism
from mobilellm_pro.model.attention_mask import DocumentMask, PackedRows, Positions
from mobilellm_pro.model.row_shard import RowShard
from mobilellm_pro.model.teacher import Teacher
from mobilellm_pro.training.preflight import problems
from tests.model.test_teacher import ARGS as TEACHER_ARGS
from tests.model.test_teacher import CHUNK, stock_model
from tests.ranks import run_ranks
from tests.training.small_world import SmallWorld, losses, train_job
from tests.training.test_layouts import numbers

# Layers with experts and without; as many key/value heads as the largest tensor-parallel degree here.
ARGS = replace(TEACHER_ARGS, num_key_value_heads=4, interleave_moe_layer_step=2)
LENGTH = 3 * CHUNK + 8
ROWS = 4


@dataclass(frozen=True)
class Case:
    """A layout of both models."""

    tensor: int = 1
    expert: int = 1
    shard: int = -1
    resident: bool = False
    student_tensor: int = 1
    context: int = 1
    head_tail: bool = False
    rows: int = ROWS
    rows_named: str = "packed"
    compile: bool = False
    dtype: str = "float32"

    def config(self, folder: Path) -> TeacherConfig:
        """The section [teacher]."""
        layout = TeacherParallelism(self.shard, self.tensor, self.expert, self.resident)
        return TeacherConfig(path=str(folder), dtype=self.dtype, compile=self.compile, parallelism=layout)


CASES = {
    1: [Case(), Case(rows_named="whole"), Case(rows_named="reset")],
    2: [
        Case(),
        Case(rows_named="whole"),
        Case(shard=1),
        Case(resident=True),
        Case(tensor=2),
        Case(expert=2),
        Case(expert=2, shard=1),
        Case(student_tensor=2),
        Case(student_tensor=2, rows=3),
        Case(student_tensor=2, tensor=2),
        Case(context=2),
    ],
    4: [
        Case(),
        Case(shard=2),
        Case(tensor=2),
        Case(tensor=2, shard=1),
        Case(tensor=4),
        Case(expert=2),
        Case(expert=2, shard=2),
        Case(expert=4, shard=2),
        Case(expert=2, resident=True),
        Case(tensor=2, expert=2),
        Case(tensor=2, rows_named="reset"),
        Case(student_tensor=2, context=2, rows_named="reset"),
        Case(tensor=2, expert=2, student_tensor=2),
        Case(student_tensor=2),
        Case(student_tensor=2, tensor=4),
        Case(student_tensor=4, rows=3),
        Case(student_tensor=4, tensor=2, rows=3),
        Case(student_tensor=4, tensor=4),
        Case(context=2),
        Case(context=4),
        Case(context=4, head_tail=True, rows_named="whole"),
        Case(context=2, head_tail=True, tensor=2, rows_named="reset"),
        Case(context=2, tensor=2),
        Case(context=2, expert=2),
        Case(context=2, student_tensor=2),
        Case(context=2, student_tensor=2, tensor=2, resident=True),
    ],
}


@dataclass(frozen=True)
class Rows:
    """Rows of tokens that differ in their documents."""

    tokens: torch.Tensor
    document_ids: torch.Tensor
    positions: Positions
    mask: DocumentMask
    hidden: torch.Tensor
    """What to expect, [B, K, D]."""


def make_rows() -> dict[str, Rows]:
    """`packed` and `whole`: stock Llama 4 under explicit masks, without which it does not notice documents.

    `reset`: positions start at 0 in every document. Stock Llama 4 scales queries by the index in the row, whatever the
    position ids say, so that these are the hidden states of our model in one piece.
    """
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, ARGS.vocab_size, (ROWS, LENGTH), generator=generator)
    document_ids = (torch.rand(ROWS, LENGTH, generator=generator) < 0.06).long().cumsum(1)
    assert all(len(row.unique()) > 1 for row in document_ids)
    stock = stock_model(ARGS)
    ours = Teacher(ARGS)
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stock.state_dict().items()})
    rows, masks = {}, dict[str, DocumentMask](packed="block_causal", whole="causal")
    for name, mask in masks.items():
        visible = PackedRows(document_ids).masks(ours.spans(), mask)
        names = {"full": "full_attention", "chunked": "chunked_attention"}
        lowest = torch.finfo(torch.float32).min
        dense = {names[kind]: torch.where(keep.dense, 0.0, lowest) for kind, keep in visible.items()}
        hidden = stock.model(tokens, attention_mask=dense)[0]
        rows[name] = Rows(tokens, document_ids, "continue", mask, hidden)
    reset = PackedRows(document_ids, "reset")
    hidden = ours(tokens, reset.positions, reset.masks(ours.spans()), head=lambda hidden, weight: hidden)
    return rows | {"reset": Rows(tokens, document_ids, "reset", "block_causal", hidden)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock Llama 4 in several files, and rows with their hidden states."""
    path = tmp_path_factory.mktemp("teacher")
    stock_model(ARGS).save_pretrained(path, max_shard_size="400KB")
    with torch.no_grad():
        rows = make_rows()
    for one, other in (("packed", "whole"), ("packed", "reset")):
        assert (rows[one].hidden - rows[other].hidden).abs().max() > 1e-2
    torch.save(rows, path / "rows.pt")
    return path


def largest_errors(folder: Path, cases: list[Case]) -> list[float]:
    """One rank: the largest difference to stock Llama 4 over two passes, case by case."""
    import os

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rows = torch.load(folder / "rows.pt", weights_only=False)
    return [_largest_error(folder, case, rows[case.rows_named], int(os.environ["WORLD_SIZE"])) for case in cases]


def _largest_error(folder: Path, case: Case, rows: Rows, world_size: int) -> float:
    import torch.distributed as dist
    from torchtitan.distributed import ParallelDims

    from mobilellm_pro.training.frozen_teacher import load_frozen_teacher

    dims = ParallelDims(1, -1, case.context, case.student_tensor, pp=1, ep=1, etp=1, world_size=world_size)
    teacher = load_frozen_teacher(case.config(folder), rows.mask, dims, torch.device("cpu"))
    rank, num_rows = dist.get_rank(), case.rows // dims.dp_shard
    first = rank // (case.context * case.student_tensor) * num_rows
    own = slice(first, first + num_rows)
    shard = RowShard(LENGTH, case.context, rank // case.student_tensor % case.context, case.head_tail)
    error = 0.0
    for _ in range(2):  # the second finds the weights as the first left them
        packed = PackedRows(rows.document_ids[own], rows.positions, shard)
        hidden = teacher.hidden(shard.take(rows.tokens[own]), packed)
        head = teacher.head
        assert head.shape == (ARGS.vocab_size, ARGS.hidden_size) and not hidden.requires_grad
        error = max(error, (hidden - shard.take(rows.hidden[own])).abs().max().item())
        teacher.release()
    assert passes_remembered(teacher.model) == 0, "FSDP2's record of forward passes would grow without end"
    return error


def passes_remembered(model: torch.nn.Module) -> int:
    """Forward passes of its units for which FSDP2 still expects a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
    return sum(len(group._post_forward_indices) + len(group.comm_ctx.post_forward_order) for group in groups if group)


@pytest.mark.parametrize("world_size", CASES)
def test_hidden_states_equal_stock_transformers_on_every_layout(folder: Path, world_size: int) -> None:
    cases = CASES[world_size]
    for rank, errors in enumerate(run_ranks(largest_errors, world_size, folder, cases, timeout_seconds=240)):
        for case, error in zip(cases, errors, strict=True):
            assert error < 1e-5, f"rank {rank}: {case}"


COMPILED = {
    1: [Case(compile=True)],
    2: [Case(compile=True), Case(tensor=2, compile=True), Case(context=2, compile=True), Case(expert=2, compile=True)],
}


def compiled_errors(folder: Path, cases: list[Case], backend: str) -> tuple[list[float], list[float], int]:
    """One rank: the errors of `cases` in float32, in bfloat16, and the number of compiled graphs."""
    from functools import partial

    import torch._dynamo

    from mobilellm_pro.training import frozen_teacher

    frozen_teacher.compile_layers = partial(frozen_teacher.compile_layers, backend=backend)
    errors, num_graphs = [], 0
    for case in [*cases, *(replace(case, dtype="bfloat16") for case in cases)]:
        errors += largest_errors(folder, [case])
        num_graphs += torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.compiler.reset()  # one teacher a process is the rule; torch compiles a function eight times at most
        torch._dynamo.utils.counters.clear()
    return errors[: len(cases)], errors[len(cases) :], num_graphs


@pytest.mark.parametrize(
    ("world_size", "backend"), [pytest.param(1, "inductor", marks=pytest.mark.slow), (2, "aot_eager")]
)
def test_compiled_layers_give_the_same_hidden_states(folder: Path, world_size: int, backend: str) -> None:
    """In bfloat16 layers compile whole; there a last bit may choose another expert, and only aot_eager keeps all."""
    cases = COMPILED[world_size]
    eager = [replace(case, compile=False, dtype="bfloat16") for case in cases]
    all_plain = run_ranks(largest_errors, world_size, folder, eager)
    all_compiled = run_ranks(compiled_errors, world_size, folder, cases, backend)
    for plain, (errors, rounded, num_graphs) in zip(all_plain, all_compiled, strict=True):
        assert max(errors) < 1e-5 and num_graphs >= 6 * len(cases)
        if backend == "aot_eager":
            assert rounded == plain
        else:
            assert max(rounded) < 2 * max(plain)


def test_the_head_alone(folder: Path) -> None:
    (same,) = run_ranks(head_only, 1, folder)
    assert same


def head_only(folder: Path) -> bool:
    """One rank: the head, loaded without the body, is the stock model's."""
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torchtitan.distributed import ParallelDims

    from mobilellm_pro.training.frozen_teacher import load_frozen_teacher

    dist.init_process_group("gloo")
    dims = ParallelDims(1, -1, 1, 1, pp=1, ep=1, etp=1, world_size=1)
    teacher = load_frozen_teacher(Case().config(folder), "causal", dims, torch.device("cpu"), head_only=True)
    assert [name for name, _ in teacher.model.named_parameters()] == ["lm_head.weight"]
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return torch.equal(teacher.head, stored["lm_head.weight"])


def train_ahead(job: str, dump_folder: str, overrides: list[str]) -> int:
    """One rank of a run in which the teacher runs ahead; how often it did."""
    from mobilellm_pro.training import preflight
    from mobilellm_pro.training.frozen_teacher import FrozenTeacher

    preflight.check_machine = lambda config, device_type: []  # which refuses overlap without CUDA
    starts, start = [], FrozenTeacher.start
    FrozenTeacher.start = lambda *args, **kwargs: starts.append(1) or start(*args, **kwargs)
    train_job(job, dump_folder, [*overrides, "--teacher.overlap"])
    return len(starts)


def test_running_ahead_changes_no_bit(world: SmallWorld) -> None:
    """Three steps of two micro-batches on two ranks that share the teacher's layers: one pass ahead in each step."""
    layout = ["--training.local_batch_size", "1", "--teacher.parallelism.tensor_parallel_degree", "2"]
    folder = world.folder / "frozen/ahead"
    assert run_ranks(train_ahead, 2, str(world.job), str(folder), layout) == [3, 3]
    plain = world.run("frozen/plain", 2, *layout)
    for key in ("loss", "grad_norm", "distill/kl", "distill/teacher_ce"):
        assert losses(folder, key) == losses(plain, key)
    alone = world.run("frozen/alone", 1)
    assert losses(plain) == pytest.approx(losses(alone), rel=2e-5, abs=1e-6)


def test_a_run_with_a_split_teacher_equals_one_rank(world: SmallWorld) -> None:
    """Half of the experts on each data rank; the student's tensor ranks share the rows out, in validation too."""
    layout = ("--parallelism.tensor_parallel_degree", "2", "--teacher.parallelism.expert_parallel_degree", "2")
    expected = numbers(world, "split/one_rank", 1, 1, ())
    ours = numbers(world, "split/four_ranks", 4, 2, (*layout, "--teacher.parallelism.resident"))
    for key, values in expected.items():
        assert ours[key] == pytest.approx(values, rel=2e-5, abs=1e-6), key


def quantized(folder: Path, compiled: bool) -> tuple[float, dict[str, tuple[str, float]]]:
    """One rank of tensor and expert groups: difference between hidden states in float8 and with restored weights, and
    each parameter's type and error."""
    import torch.distributed as dist
    from torchtitan.distributed import ParallelDims

    from mobilellm_pro.training.frozen_teacher import load_frozen_teacher

    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    dims = ParallelDims(1, -1, 1, 1, pp=1, ep=1, etp=1, world_size=world_size)
    layout = Case(shard=1, tensor=world_size // 2 or 1, expert=min(2, world_size), compile=compiled).config(folder)
    plain = load_frozen_teacher(layout, "block_causal", dims, torch.device("cpu"))
    layout = replace(layout, quantization="float8")
    teacher = load_frozen_teacher(layout, "block_causal", dims, torch.device("cpu"))
    rows = torch.load(folder / "rows.pt", weights_only=False)["packed"]
    packed = PackedRows(rows.document_ids)
    hidden = teacher.hidden(rows.tokens, packed)
    found = {}
    for (name, full), (_, kept) in zip(plain.model.named_parameters(), teacher.model.named_parameters(), strict=True):
        restored = kept.dequantize() if type(kept.data) is not torch.Tensor else kept
        # e4m3 has 3 bits of mantissa: half a step is 1/16 of a number, but for those under the scale's smallest.
        allowed = full.abs() / 16 + full.abs().amax(dim=min(1, full.ndim - 1), keepdim=True) * 2**-16
        error = ((restored - full).abs() / allowed).max().item()
        found[name] = type(kept.data).__name__, error if kept is not restored else float(not torch.equal(kept, full))
        full.data.copy_(restored)
    return (hidden - plain.hidden(rows.tokens, packed)).abs().max().item(), found


@pytest.mark.parametrize(("world_size", "compiled"), [(1, False), (1, True), (4, False)])
def test_float8_weights(folder: Path, world_size: int, compiled: bool) -> None:
    """Rounded as e4m3 rounds, for each output channel; and nothing else differs from the plain model."""
    pytest.importorskip("torchao")
    for difference, parameters in run_ranks(quantized, world_size, folder, compiled):
        assert difference < 1e-5
        for name, (kind, error) in parameters.items():
            in_float8 = "_proj" in name
            assert (kind == "Float8Tensor") is in_float8, name
            assert 0 < error <= 1.01 if in_float8 else error == 0, name


def test_a_layout_that_does_not_divide_the_teacher_dies_before_the_job(world: SmallWorld) -> None:
    """The small teacher has 4 heads, 2 key/value heads and 4 experts."""

    def found(ranks: int, **degrees: str) -> str:
        overrides = [f"--teacher.parallelism.{name}_parallel_degree={degree}" for name, degree in degrees.items()]
        return "\n".join(problems(load(world.job, ["--training.local_batch_size=1", *overrides]), ranks))

    assert found(4, tensor="2", expert="2") == ""
    assert "tensor_parallel_degree = 4 does not divide num_key_value_heads = 2" in found(4, tensor="4")
    assert "expert_parallel_degree = 3 does not divide the 4 experts" in found(3, expert="3")
    assert "found 3 on 4 data-parallel ranks (4 processes)" in found(4, expert="3")


def on_a_gpu(folder: Path) -> tuple[float, bool]:
    """One rank: the error in float32, and whether a pass on a second stream gives the same bits."""
    import torch.distributed as dist
    from torchtitan.distributed import ParallelDims

    from mobilellm_pro.training.frozen_teacher import load_frozen_teacher

    device = torch.device("cuda")
    dist.init_process_group("nccl")
    dims = ParallelDims(1, -1, 1, 1, pp=1, ep=1, etp=1, world_size=1)
    teacher = load_frozen_teacher(Case().config(folder), "block_causal", dims, device)
    rows = torch.load(folder / "rows.pt", weights_only=False)["reset"]
    arguments = [tensor.to(device) for tensor in (rows.tokens, rows.document_ids)]
    positions: Positions = "reset"
    hidden = teacher.hidden(arguments[0], PackedRows(arguments[1], positions))
    teacher._stream = torch.cuda.Stream()
    same = True
    for _ in range(3):
        teacher.release()
        torch.cuda._sleep(
            100_000_000
        )  # inputs that are late, and a pass that ends late: who does not wait reads garbage
        tokens, documents = (tensor + torch.zeros_like(tensor) for tensor in arguments)
        late = PackedRows(documents, positions)
        with torch.cuda.stream(teacher._stream):
            torch.cuda._sleep(200_000_000)
        pending = teacher.start(tokens, late)
        del tokens, documents, late
        busy = torch.randn(2048, 2048, device=device)
        busy = torch.tanh(busy @ busy)  # the backward pass that it runs beside
        same = same and torch.equal(pending.wait() @ teacher.head.T, hidden @ teacher.head.T)
    return (hidden.cpu() - rows.hidden).abs().max().item(), same


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a second stream needs an NVIDIA GPU")
def test_a_second_stream_gives_the_same_bits(folder: Path) -> None:
    ((error, same),) = run_ranks(on_a_gpu, 1, folder)
    assert error < 1e-4 and same
