"""Bad input dies before any process group, with everything that is wrong and how to mend it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mobilellm_pro.config import load
from mobilellm_pro.training.preflight import problems
from tests.training.small_world import SmallWorld


def found(world: SmallWorld, *overrides: str, ranks: int = 1) -> str:
    return "\n".join(problems(load(world.job, overrides), ranks))


def test_the_small_world_is_in_order(world: SmallWorld) -> None:
    assert found(world) == ""
    assert found(world, "--training.local_batch_size", "1", "--parallelism.tensor_parallel_degree", "2", ranks=4) == ""


def test_world_size_that_does_not_fit_the_mesh(world: SmallWorld) -> None:
    text = found(world, "--parallelism.tensor_parallel_degree", "2", ranks=3)
    assert "tensor_parallel_degree 2" in text and "3 processes" in text


def test_tensor_parallel_degree_that_does_not_divide_the_model(world: SmallWorld) -> None:
    text = found(world, "--parallelism.tensor_parallel_degree", "4", ranks=4)
    assert "tensor_parallel_degree = 4 does not divide num_key_value_heads = 2" in text


def test_sequence_that_context_parallelism_cannot_split(world: SmallWorld) -> None:
    with pytest.raises(ValueError, match=r"training.seq_len: found 63; expected a multiple of 2"):
        load(world.job, ["--training.seq_len", "63", "--parallelism.context_parallel_degree", "2"])


def test_replicate_only_data_parallelism(world: SmallWorld) -> None:
    text = found(
        world, "--parallelism.data_parallel_replicate_degree", "2", "--training.local_batch_size", "2", ranks=2
    )
    assert "data_parallel_replicate_degree" in text and "divide the gradients twice" in text


def test_missing_tokenizer(world: SmallWorld) -> None:
    assert "nowhere.model does not exist: correct the path" in found(world, "--data.tokenizer", "nowhere.model")


def test_unknown_model_and_flavor(world: SmallWorld) -> None:
    assert "model.name = 'llama3' is unknown; expected one of mobilellm_pro" in found(world, "--model.name", "llama3")
    assert "model.flavor = '3b' is unknown; expected one of 1b, debug" in found(world, "--model.flavor", "3b")


def test_tokenizer_of_another_size(world: SmallWorld) -> None:
    text = found(world, "--model.flavor", "1b")
    assert "has 4,096 ids, model mobilellm_pro/1b has 202,048" in text
    assert "the teacher's vocabulary has 4,096 ids, the student's 202,048" in text


def test_corrupt_and_missing_corpora(world: SmallWorld, tmp_path: Path) -> None:
    corpus = tmp_path / "a"
    shutil.copytree(world.folder / "tokens/a", corpus)
    shard = next(corpus.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-8])
    text = world.job.read_text().replace(str(world.folder / "tokens/a"), str(corpus))
    (tmp_path / "job.toml").write_text(text)
    assert shard.name in "\n".join(problems(load(tmp_path / "job.toml"), 1))
    (tmp_path / "job.toml").write_text(text.replace(str(corpus), str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in "\n".join(problems(load(tmp_path / "job.toml"), 1))


def test_validation_that_asks_for_more_than_was_held_out(world: SmallWorld) -> None:
    extra = ("--validation.enable", "--validation.seq_len", "64", "--validation.steps", "1000")
    text = found(world, *extra)
    assert "lower validation.steps" in text and "held-out rows of a" in text


def test_teacher_folder_with_missing_tensors(world: SmallWorld, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world.folder / "teacher", teacher)
    tensors = load_file(teacher / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.2.feed_forward.router.weight"):
        del tensors[name]
    save_file(tensors, teacher / "model.safetensors")
    text = found(world, "--teacher.path", str(teacher))
    assert "lm_head.weight is missing" in text and "layers.2.feed_forward.router.weight is missing" in text
    assert "config.json: not found" in found(world, "--teacher.path", str(tmp_path / "nowhere"))


def test_checkpoint_of_another_flavor(world: SmallWorld, tmp_path: Path) -> None:
    saving = ("--checkpoint.enable", "--checkpoint.interval", "3", "--checkpoint.no_last_save_model_only")
    folder = world.run("preflight/teacher", 1, *saving, "--model.name", "llama4_text", "--distill.objective", "ce")
    checkpoint = str(folder / "checkpoint/step-3")
    text = found(world, *saving, "--checkpoint.initial_load_path", checkpoint)
    assert "layers.0.mlp.gate_proj.weight is missing" in text and "another model or flavor" in text
    assert "embed_tokens.weight has shape [4096, 128], expected [4096, 96]" in text
    own_folder = found(world, *saving, "--job.dump_folder", str(folder))
    assert "another model or flavor" in own_folder
    text = found(world, *saving, "--checkpoint.initial_load_path", str(tmp_path / "nowhere"))
    assert "no such folder" in text
    metadata = folder / "checkpoint/step-3/.metadata"
    metadata.write_bytes(metadata.read_bytes()[:100])
    assert "cannot be read" in found(world, *saving, "--job.dump_folder", str(folder))


def test_everything_is_listed_at_once(world: SmallWorld) -> None:
    extra = ("--model.flavor", "3b", "--data.tokenizer", "nowhere.model", "--teacher.path", "nowhere")
    assert found(world, *extra, ranks=3).count("nowhere") == 2 and "3b" in found(world, *extra)


def test_a_teacher_trains_without_tensor_parallelism(world: SmallWorld) -> None:
    extra = ("--model.name", "llama4_text", "--distill.objective", "ce", "--parallelism.tensor_parallel_degree", "2")
    assert "model llama4_text trains with FSDP2 and context parallelism only" in found(world, *extra, ranks=2)


def test_done_says_what_was_reached(world: SmallWorld) -> None:
    done = json.loads((world.run("preflight/done", 1) / "DONE").read_text())
    assert done["steps"] == 3 and done["validation"] is None
    environment = json.loads((world.folder / "preflight/done/environment.json").read_text())
    assert environment["versions"]["torchtitan"] == "0.2.2" and environment["world_size"] == 1
    assert load(world.folder / "preflight/done/config.toml").training.steps == 3
