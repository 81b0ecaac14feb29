"""A run that reads the teacher's hidden states equals the run that computed them; all else is an error beforehand."""

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobilellm_pro.config import load
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.hugging_face import read_config, teacher_args
from mobilellm_pro.model.shard_loading import load_tensors
from mobilellm_pro.model.teacher import Teacher
from mobilellm_pro.training.hidden_state_cache import attach_reader
from mobilellm_pro.training.loader import MixtureLoader, open_mixture
from mobilellm_pro.training.preflight import problems
from mobilellm_pro.training.run_folder import read_metrics
from tests.ranks import Ranks, run_ranks
from tests.training.small_world import SmallWorld, losses, train_job, wait_for_step

VALIDATION = ("--validation.enable", "--validation.seq_len", "32", "--validation.freq", "2", "--validation.steps", "2")
BF16 = ("--teacher.dtype", "bfloat16", "--training.mixed_precision_param", "bfloat16")
HALF = ("--training.local_batch_size", "2")
CP2 = ("--parallelism.context_parallel_degree", "2")
TP2 = ("--parallelism.tensor_parallel_degree", "2")
UNTIMED = ("loss", "grad_norm", "distill/kl", "distill/ce", "distill/teacher_ce", "distill/teacher_entropy")

# name -> ranks, overrides
LAYOUTS = {
    "one": (1, ()),
    "accumulate2": (1, (*BF16, *HALF)),
    "FSDP2": (2, (*BF16, *HALF)),
    "CP2": (2, CP2),
    "CP2, head and tail": (2, (*CP2, "--attention.context_layout", "head_tail")),
    "TP2": (2, TP2),
}


def cached(world: SmallWorld, mode: str, name: str, *overrides: str) -> list[str]:
    cache = ("--teacher.cache", mode, "--teacher.cache_path", str(world.folder / "cache" / name))
    return [*cache, *VALIDATION, "--validation.local_batch_size", "2", *overrides]


def train_without_teacher(job: str, folder: str, overrides: list[str]) -> None:
    """One rank of a run that must give the body of the teacher no memory."""
    from mobilellm_pro.model.teacher import Teacher

    def fail(self: Teacher, **kwargs: object) -> Teacher:
        raise AssertionError("the teacher was loaded")

    Teacher.to_empty = fail
    train_job(job, folder, overrides)


def write(world: SmallWorld, name: str, ranks: int, *overrides: str) -> Path:
    return world.run(f"cached/{name}/write", ranks, *cached(world, "write", name, *overrides))


def read(world: SmallWorld, name: str, ranks: int, *overrides: str, to: str = "read") -> Path:
    folder = world.folder / f"cached/{name}/{to}"
    run_ranks(train_without_teacher, ranks, str(world.job), str(folder), cached(world, "read", name, *overrides))
    return folder


def numbers(folder: Path) -> dict[str, list[float]]:
    """Everything of training and validation that does not depend on the clock."""
    held_out = read_metrics(folder, "validation")
    found = {f"held out {key}": [record[key] for record in held_out] for key in held_out[0] if key != "kind"}
    return found | {key: losses(folder, key) for key in UNTIMED}


@pytest.fixture(scope="module")
def written(world: SmallWorld) -> Path:
    """A run on one rank that wrote the cache "one"."""
    return write(world, "one", 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reading_equals_the_live_teacher_to_the_bit(world: SmallWorld, written: Path, name: str) -> None:
    ranks, layout = LAYOUTS[name]
    live = written if name == "one" else write(world, name, ranks, *layout)
    assert numbers(read(world, name, ranks, *layout)) == numbers(live)
    assert len(losses(live)) == 3 and len(numbers(live)["held out kl"]) == 2
    if name == "one":
        off = world.run("cached/off", 1, *VALIDATION, "--validation.local_batch_size", "2")
        assert numbers(off) == numbers(live)


def test_written_on_one_rank_and_read_on_two(world: SmallWorld, written: Path) -> None:
    """Whole rows on disk, halves of rows on ranks."""
    ours = numbers(read(world, "one", 2, *CP2, to="CP2"))
    for key, expected in numbers(written).items():
        assert ours[key] == pytest.approx(expected, rel=2e-5, abs=1e-6), key


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_each_row_its_own_hidden_states(world: SmallWorld, written: Path, workers: int) -> None:
    """Against a teacher that runs here: the hidden states belong to the tokens and documents that they come with."""
    config = load(world.job, cached(world, "read", "one"))
    teacher = Teacher(teacher_args(read_config(config.teacher.path), config.teacher.path))
    load_tensors(teacher, config.teacher.path)
    loader = MixtureLoader(open_mixture(config.data, "train", 64), 2, 1, 2, num_workers=workers)
    attach_reader(config, loader, SimpleNamespace(cp=1, cp_enabled=False))
    for _, (rows, _labels) in zip(range(3), loader, strict=False):
        packed = PackedRows(rows["document_ids"])
        masks = packed.masks(teacher.spans())
        with torch.no_grad():
            expected = teacher(rows["input"], packed.positions, masks, head=lambda hidden, weight: hidden)
        torch.testing.assert_close(rows["teacher_hidden"], expected, rtol=1e-4, atol=1e-5)


def test_written_in_halves_and_read_on_one_rank(world: SmallWorld, written: Path) -> None:
    if not (world.folder / "cache/CP2").is_dir():
        write(world, "CP2", 2, *CP2)
    ours = numbers(read(world, "CP2", 1, to="one"))
    for key, expected in numbers(written).items():
        assert ours[key] == pytest.approx(expected, rel=2e-5, abs=1e-6), key


def test_other_weights_read_the_same_rows(world: SmallWorld, written: Path) -> None:
    """What a specialist and an ablation of the mix do: the cache knows rows of corpora, not steps."""
    job = world.folder / "other_weights.toml"
    text = world.job.read_text().replace("weight = 0.7", "weight = 0.5").replace("weight = 0.3", "weight = 0.5")
    job.write_text(text)
    other, steps = SmallWorld(world.folder, job), ("--training.steps", "2")
    live = other.run("cached/other/live", 1, *VALIDATION, *steps, "--validation.local_batch_size", "1")
    ours = read(other, "one", 1, *steps, "--validation.local_batch_size", "1", to="other")
    for key, expected in numbers(live).items():  # the rows were computed beside others: rounding differs
        assert numbers(ours)[key] == pytest.approx(expected, rel=2e-5, abs=1e-6), key
    assert losses(ours, "tokens/b") != losses(written, "tokens/b")[:2]


def test_float8_is_close(world: SmallWorld) -> None:
    """Measured here: KL of the three steps moves by at most 7e-4 of itself, the teacher's cross entropy by 2e-4."""
    live = write(world, "float8", 1, "--teacher.cache_dtype", "float8")
    ours = read(world, "float8", 1, "--teacher.cache_dtype", "float8")
    sizes = [sum(file.stat().st_size for file in (world.folder / f"cache/{name}").rglob("*.safetensors"))
             for name in ("float8", "one")]  # fmt: skip
    assert sizes[0] < 0.4 * sizes[1]  # of float32, at a width that is small beside a scale
    for key in ("distill/kl", "distill/teacher_ce"):
        assert losses(ours, key) == pytest.approx(losses(live, key), rel=3e-3), key
        assert losses(ours, key) != losses(live, key), key


def test_a_cache_of_a_teacher_in_float8(world: SmallWorld, written: Path) -> None:
    """The job that reads says so too, in a layout of its own; without it the cache is another teacher's."""
    pytest.importorskip("torchao")
    float8, whole = ("--teacher.quantization", "float8"), ("--teacher.parallelism.data_parallel_shard_degree", "1")
    live = write(world, "quantized", 1, *float8, *whole)
    assert numbers(read(world, "quantized", 1, *float8)) == numbers(live)
    assert losses(live, "distill/kl") != losses(written, "distill/kl")
    assert "quantization is 'float8' there and 'none' here" in problem(world, "read", "quantized")


SAVING = ("--training.steps", "7", "--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.keep_latest_k",
          "0", "--checkpoint.no_last_save_model_only")  # fmt: skip


def test_a_killed_run_goes_on_without_a_hole(world: SmallWorld) -> None:
    folder, settings = world.folder / "cached/killed/write", cached(world, "write", "killed", *SAVING)
    ranks = Ranks(train_job, 1, str(world.job), str(folder), settings)
    wait_for_step(folder, 3)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    ranks.processes[0].join(timeout=30)
    ranks.stop()
    files = set((world.folder / "cache/killed").rglob("*.safetensors"))
    assert files and "rows of a" in problem(world, "read", "killed", *SAVING)
    write(world, "killed", 1, *SAVING)
    assert files < set((world.folder / "cache/killed").rglob("*.safetensors"))  # what was there is kept as it was
    assert numbers(read(world, "killed", 1, *SAVING)) == numbers(folder)
    # A run that had done its last step, but not its last validation.
    (folder / "DONE").unlink()
    for file in (world.folder / "cache/killed").rglob("valid-*"):
        file.unlink()
    write(world, "killed", 1, *SAVING)
    assert problem(world, "read", "killed", *SAVING) == ""
    # A run whose first steps went unwritten cannot fill the cache.
    (folder / "DONE").unlink()
    shutil.rmtree(world.folder / "cache/killed")
    text = problem(world, "write", "killed", "--job.dump_folder", str(folder), *SAVING)
    assert "the run goes on from step 7, but 19 of the 19 rows of a (train) before it" in text and "b (train)" in text


def problem(world: SmallWorld, mode: str, name: str, *overrides: str, ranks: int = 1) -> str:
    return "\n".join(problems(load(world.job, cached(world, mode, name, *overrides)), ranks))


def test_a_cache_that_fits_has_no_problems(world: SmallWorld, written: Path) -> None:
    assert problem(world, "read", "one") == "" == problem(world, "read", "one", *CP2, ranks=2)
    assert problem(world, "write", "one") == "" == problem(world, "write", "new")


def test_a_hole_is_named(world: SmallWorld, written: Path) -> None:
    text = problem(world, "read", "one", "--training.steps", "6")
    assert "9 of the 17 rows of a (train) that this run reads are not in the cache, the first is row 8" in text
    assert "b (train)" in text and "valid" not in text
    text = problem(world, "read", "one", "--validation.steps", "4")
    assert "a (valid)" in text and "train" not in text.replace("training", "")


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        (("--data.seed", "4"), "seed is 3 there and 4 here"),
        (("--training.seq_len", "32"), "seq_len is 64 there and 32 here"),
        (("--data.packing", "best_fit"), "packing is 'stream' there and 'best_fit' here"),
        (("--data.max_document_tokens", "50"), "packing is 'stream' there and 'max_document_tokens 50' here"),
        (("--attention.teacher_mask", "causal"), "teacher_mask is 'block_causal' there and 'causal' here"),
        (("--attention.positions", "reset"), "positions is 'continue' there and 'reset' here"),
    ],
)
def test_another_order_is_named(world: SmallWorld, written: Path, overrides: tuple[str, ...], difference: str) -> None:
    text = problem(world, "read", "one", *overrides)
    assert f"the cached rows of a (train) are other rows: {difference}: restore" in text
    assert f"the cached rows of b (train) are other rows: {difference}: restore" in text


def test_another_teacher_is_named(world: SmallWorld, written: Path, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher/model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for mode in ("read", "write"):
        text = problem(world, mode, "one", "--teacher.path", str(tmp_path / "teacher"))
        assert f"{world.folder}/cache/one/cache.json" in text and f"the job's is {tmp_path}/teacher" in text
        assert "fingerprint is " in text and text.count(" there and ") == 1
        text = problem(world, mode, "one", "--teacher.dtype", "bfloat16")
        assert "dtype is 'float32' there and 'bfloat16' here" in text
        text = problem(world, mode, "one", "--teacher.cache_dtype", "float8")
        assert "cache_dtype is 'teacher' there and 'float8' here" in text


def test_missing_and_damaged_caches_are_named(world: SmallWorld, written: Path) -> None:
    assert "cache/nowhere/cache.json does not exist" in problem(world, "read", "nowhere")
    shutil.copytree(world.folder / "cache/one", world.folder / "cache/damaged")
    file = next((world.folder / "cache/damaged/a").glob("train-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    for mode in ("read", "write"):
        assert f"{file}: truncated or changed" in problem(world, mode, "damaged")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AssertionError, match=rf"{file.name}: hidden states of a \(train\), row \d+: sha256 differs"):
        read(world, "damaged", 1)


def test_a_disk_that_is_too_small(world: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 rows of 64 tokens and 4 of 32 at 512 bytes a token: 458,752 bytes."""
    usage = shutil.disk_usage(world.folder)
    for free, fits in ((458_752, True), (458_751, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        text = problem(world, "write", "new")
        assert fits == (text == "")
    assert "have to write" not in text and "take 0.459 MB, 0.459 MB are free" in text and "float8" in text


def test_a_folder_that_cannot_be_written(world: SmallWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", source)

    monkeypatch.setattr(os, "link", no_links)
    text = problem(world, "write", "new")
    assert f"teacher.cache_path = '{world.folder}/cache/new': no cache can be written" in text and "hard links" in text


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("--teacher.cache", "write"), "teacher.cache_path"),
        (("--teacher.cache_path", "x"), "teacher.cache_path"),
        (("--teacher.cache_dtype", "float8"), "teacher.cache_dtype"),
        (("--teacher.cache_file_mib", "0"), "teacher.cache_file_mib"),
        (("--teacher.cache", "read", "--teacher.cache_path", "x", "--teacher.compile"), "teacher.compile"),
        (("--teacher.cache", "read", "--teacher.cache_path", "x", "--distill.objective", "ce"), "teacher.cache"),
        (
            ("--teacher.cache", "read", "--teacher.cache_path", "x", "--teacher.parallelism.resident"),
            "teacher.parallelism.resident",
        ),
    ],
)
def test_keys_that_disagree(world: SmallWorld, overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ValueError, match=rf"1 problem in the configuration .*\n.*{key}: found"):
        load(world.job, overrides)
