"""Quantization-aware training: on every layout the same, resumed to the bit, distilled from the student's own past."""

from pathlib import Path

import pytest
import torch
from torchtitan.config import Optimizer

from mobilellm_pro.config import load
from mobilellm_pro.evaluation.student_checkpoint import load_student
from mobilellm_pro.model.checkpoint import latest_checkpoint, load_model
from mobilellm_pro.model.quantized_modules import StudentQuantization, is_range, quantize_modules
from mobilellm_pro.model.stored_parameters import StoredParameters
from mobilellm_pro.model.student import FLAVORS, Student
from mobilellm_pro.quantization.scheme import SCHEMES
from mobilellm_pro.quantization.weight_quantizer import choose_scales
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.train_spec import build_optimizers
from tests.training.small_world import SmallWorld, losses

SAVE = ("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no_last_save_model_only")
LAYOUTS = {
    "FSDP2": (2, "--parallelism.data_parallel_shard_degree=2", "--training.local_batch_size=2"),
    "TP2": (2, "--parallelism.tensor_parallel_degree=2"),
    "CP2": (2, "--parallelism.context_parallel_degree=2"),
    "FSDP2xTP2xCP2": (
        8,
        "--parallelism.tensor_parallel_degree=2",
        "--parallelism.context_parallel_degree=2",
        "--training.local_batch_size=2",
    ),
}


@pytest.fixture(scope="module")
def full_precision(world: SmallWorld) -> Path:
    """A checkpoint to begin with and to distil from. Rounding it costs 1e-3 nats, of which fp32 knows 1e-7."""
    run = world.run("before_qat", 1, *SAVE, "--training.steps=8", "--optimizer.lr=3e-2")
    found = latest_checkpoint(run / "checkpoint")
    assert found is not None
    return found


def words(scheme: str, checkpoint: Path, *more: str) -> tuple[str, ...]:
    own = (f"--quantization.scheme={scheme}", '--model.converters=["qat"]', f"--teacher.path={checkpoint}")
    return (*own, f"--checkpoint.initial_load_path={checkpoint}", "--quantization.range_lr=1e-3", *SAVE, *more)


@pytest.fixture(scope="module")
def one_rank(world: SmallWorld, full_precision: Path) -> dict[str, Path]:
    return {scheme: world.run(f"qat_{scheme}", 1, *words(scheme, full_precision)) for scheme in SCHEMES}


@pytest.mark.parametrize(
    ("scheme", "layout"), [("cpu", "FSDP2"), ("cpu", "CP2"), *(("accelerator", layout) for layout in LAYOUTS)]
)
def test_a_layout_equals_one_rank(
    world: SmallWorld, full_precision: Path, one_rank: dict[str, Path], scheme: str, layout: str
) -> None:
    ranks, *own = LAYOUTS[layout]
    ours = world.run(f"qat_{scheme}_{layout}", ranks, *words(scheme, full_precision, *own))
    # A sum in another order moves a weight across a tie now and then: a step of 1/15 of its range.
    assert losses(ours)[0] == pytest.approx(losses(one_rank[scheme])[0], rel=1e-4)
    assert losses(ours) == pytest.approx(losses(one_rank[scheme]), rel=5e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_is_what_is_lost_to_the_teacher(one_rank: dict[str, Path], scheme: str) -> None:
    """The teacher is the very checkpoint that the student begins with: without rounding the loss would be 0."""
    assert 1e-4 < losses(one_rank[scheme])[0] < 0.5


def test_learned_ranges_begin_at_the_computed_ones_and_move(one_rank: dict[str, Path], full_precision: Path) -> None:
    last = latest_checkpoint(one_rank["accelerator"] / "checkpoint")
    assert last is not None
    stored, before = StoredParameters(last), StoredParameters(full_precision)
    model = load_model(one_rank["accelerator"]).model
    ranges = [name for name, _ in model.named_parameters() if is_range(name)]
    assert len(ranges) == 4 * 7 + 2 and "embed_tokens.head_scales" in ranges
    for name in ranges:
        weight = name.replace("head_scales", "weight").replace("weight_scales", "weight")
        begun = choose_scales(before.read(weight), SCHEMES["accelerator"].weights).float()
        moved = (stored.read(name) - begun).abs().max()
        assert 0 < moved < 3 * 1e-3 * 1.1, name  # three steps of Adam at their own rate


def test_learned_ranges_have_their_own_rate_and_no_decay() -> None:
    model = Student(FLAVORS["debug"])
    model.init_weights()
    quantize_modules(model, StudentQuantization("accelerator", range_lr=0.01))
    optimizer = build_optimizers([model], Optimizer(lr=0.1, weight_decay=0.5, implementation="for-loop"), None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter) if is_range(name) else torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # Adam's first step is as long as its rate.
        expected = before[name] - 0.01 if is_range(name) else before[name] * (0.95 if parameter.ndim == 2 else 1)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_resumed_is_undisturbed(world: SmallWorld, full_precision: Path, one_rank: dict[str, Path]) -> None:
    name = "qat_resumed"
    world.run(name, 1, *words("accelerator", full_precision, "--training.steps=2", "--lr_scheduler.total_steps=3"))
    run = world.run(name, 1, *words("accelerator", full_precision))
    ours, theirs = (latest_checkpoint(folder / "checkpoint") for folder in (run, one_rank["accelerator"]))
    assert ours is not None and theirs is not None and ours.name == theirs.name == "step-3"
    model = load_model(run).model
    for parameter in dict(model.named_parameters()):
        assert torch.equal(StoredParameters(ours).read(parameter), StoredParameters(theirs).read(parameter)), parameter


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_layers_are_the_same(
    world: SmallWorld, full_precision: Path, one_rank: dict[str, Path], scheme: str
) -> None:
    own = ("--compile.enable", '--compile.components=["model"]', "--compile.backend=aot_eager")
    ours = world.run(f"qat_{scheme}_compiled", 1, *words(scheme, full_precision, *own))
    assert losses(ours) == pytest.approx(losses(one_rank[scheme]), rel=5e-3)


def test_a_loaded_checkpoint_computes_as_it_was_trained(one_rank: dict[str, Path]) -> None:
    """Its chunks through a cache of its own kind give what the whole row gives."""
    model = load_model(one_rank["cpu"]).model.double()  # fp32's sums may round an input to another of its 255 steps
    assert isinstance(model, Student) and model.cache_dtype == "int8"
    tokens = torch.arange(40).view(1, 40)
    from mobilellm_pro.model.kv_cache import KVCache

    cache = KVCache(40, "int8")
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split(13, dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(tokens), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match='trained for a cache in int8; got one of type "model"'):
        model(tokens, cache=KVCache(40))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluations_multiply_out_what_training_rounds(one_rank: dict[str, Path], scheme: str) -> None:
    trained, evaluated = load_model(one_rank[scheme]).model, load_student(str(one_rank[scheme])).model
    tokens = torch.randint(4096, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(trained(tokens), evaluated(tokens))
    assert not any(is_range(name) for name, _ in evaluated.named_parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.converters=[]"], 'model.converters = ["qat"], or neither'),
        (["--quantization.scheme=none"], 'model.converters = ["qat"], or neither'),
        (["--quantization.range_lr=-1"], "a rate between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_named(world: SmallWorld, full_precision: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="quantization") as caught:
        load(str(world.job), [*words("cpu", full_precision), *more])
    assert message in str(caught.value)


def test_groups_across_ranks_are_refused(world: SmallWorld) -> None:
    own = ("--quantization.scheme=cpu", '--model.converters=["qat"]', "--parallelism.tensor_parallel_degree=2")
    found = "\n".join(problems(load(str(world.job), list(own)), 2))
    assert "layers.0.self_attn.o_proj: tensor_parallel_degree = 2 leaves 48 columns a rank" in found


def test_a_checkpoint_of_another_scheme_is_refused(world: SmallWorld, one_rank: dict[str, Path]) -> None:
    trained = latest_checkpoint(one_rank["cpu"] / "checkpoint")
    config = load(str(world.job), list(words("accelerator", trained)))  # type: ignore[arg-type]
    found = "\n".join(problems(config, 1))
    assert 'was trained with quantization.scheme = "cpu", this job has "accelerator"' in found
    assert "quantized while it trained; take one in full precision" in found  # as a teacher
