"""The layout changes nothing: losses and gradient norms of three steps on every mesh equal those of one rank."""

import pytest

from mobilellm_pro.training.run_folder import read_metrics
from tests.training.small_world import SmallWorld, losses

TP2 = ("--parallelism.tensor_parallel_degree", "2")
CP2 = ("--parallelism.context_parallel_degree", "2")
HEAD_TAIL = ("--attention.context_layout", "head_tail")
COMPILED = ("--compile.enable", "--compile.components", "model", "--compile.backend", "aot_eager")
HSDP = ("--parallelism.data_parallel_replicate_degree", "2")
HALF_BATCH = ("--training.local_batch_size", "2")
VALIDATION = ("--validation.enable", "--validation.seq_len", "64", "--validation.freq", "3")

# name -> ranks, data-parallel ranks, overrides
LAYOUTS = {
    "TP2": (2, 1, TP2),
    "CP2": (2, 1, CP2),
    "CP2, head and tail": (2, 1, (*CP2, *HEAD_TAIL)),
    "CP2, compiled": (2, 1, (*CP2, *COMPILED)),
    "TP2xCP2": (4, 1, (*TP2, *CP2)),
    "FSDP2": (2, 2, ()),
    "FSDP2xTP2": (4, 2, TP2),
    "FSDP2xCP2": (4, 2, CP2),
    "HSDP2x2": (4, 4, HSDP),
    "accumulate4": (1, 1, ("--training.local_batch_size", "1")),
    "FSDP2+accumulate2": (2, 2, ("--training.local_batch_size", "1")),
}


def overrides(data_ranks: int, layout: tuple[str, ...]) -> list[str]:
    """The same four rows a step, and the same eight held-out rows, whatever the number of data-parallel ranks."""
    batch = () if "--training.local_batch_size" in layout else ("--training.local_batch_size", str(4 // data_ranks))
    held_out = ("--validation.local_batch_size", str(4 // data_ranks), "--validation.steps", "2")
    return [*layout, *batch, *VALIDATION, *held_out]


@pytest.fixture(scope="module")
def one_rank(world: SmallWorld) -> dict[str, list[float]]:
    return numbers(world, "one_rank", 1, 1, ())


def numbers(
    world: SmallWorld, name: str, ranks: int, data_ranks: int, layout: tuple[str, ...]
) -> dict[str, list[float]]:
    folder = world.run(f"layouts/{name}", ranks, *overrides(data_ranks, layout))
    held_out = read_metrics(folder, "validation")[-1]
    keys = (
        "loss",
        "grad_norm",
        "distill/kl",
        "distill/ce",
        "distill/teacher_ce",
        "n_tokens_seen",
        "tokens/a",
        "tokens/b",
    )
    table = {key: losses(folder, key) for key in keys}
    return table | {f"held out {key}": [held_out[key]] for key in held_out if isinstance(held_out[key], float)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(world: SmallWorld, one_rank: dict[str, list[float]], name: str) -> None:
    ranks, data_ranks, layout = LAYOUTS[name]
    ours = numbers(world, name, ranks, data_ranks, layout)
    assert len(one_rank["loss"]) == 3 and one_rank["loss"][0] > one_rank["loss"][2] > 0
    for key, expected in one_rank.items():
        assert ours[key] == pytest.approx(expected, rel=2e-5, abs=1e-6), key


def test_one_rank_sees_what_it_should(one_rank: dict[str, list[float]]) -> None:
    assert one_rank["n_tokens_seen"] == [256, 512, 768]
    assert one_rank["tokens/a"][-1] + one_rank["tokens/b"][-1] == 768
    assert one_rank["held out bits_per_byte"][0] > 0
    assert set(one_rank) >= {"held out kl", "held out teacher_bits_per_byte"}
