"""The teacher is stock Llama 4: same logits from its own files, with every feature of Scout switched on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig

from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.hugging_face import read_config, teacher_args, teacher_config
from mobilellm_pro.model.rotary import FrequencyScaling, angles
from mobilellm_pro.model.shard_loading import load_tensors
from mobilellm_pro.model.teacher import FLAVORS, Teacher, TeacherArgs
from mobilellm_pro.model.tensor_files import tensor_problems
from tests.ranks import run_ranks

CHUNK = 16
LENGTH = 3 * CHUNK + 5

ARGS = replace(
    FLAVORS["debug"],
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    attention_chunk_size=CHUNK,
    floor_scale=7,
)


def stock_model(args: TeacherArgs) -> Llama4ForCausalLM:
    """Random weights large enough that routing, norms and temperature matter."""
    config = teacher_config(args, bos_id=1, eos_id=2, pad_id=3, dtype="float32")
    for key in ("architectures", "model_type", "torch_dtype"):
        config.pop(key)
    model = Llama4ForCausalLM(Llama4TextConfig(**config, attn_implementation="eager")).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def stock() -> Llama4ForCausalLM:
    return stock_model(ARGS)


@pytest.fixture(scope="module")
def folder(stock: Llama4ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    stock.save_pretrained(path, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def load(folder: Path) -> Teacher:
    teacher = Teacher(teacher_args(read_config(folder), folder))
    load_tensors(teacher, folder)
    return teacher.eval()


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, ARGS.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def test_logits_equal_stock_transformers(stock: Llama4ForCausalLM, folder: Path) -> None:
    teacher = load(folder)
    assert teacher.model_args == ARGS
    theirs = stock(tokens()).logits
    assert theirs.abs().max() > 1
    torch.testing.assert_close(teacher(tokens()), theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"use_qk_norm": False},
        {"attn_temperature_tuning": False},
        {"rope_scaling": None},
        {"rope_scaling": FrequencyScaling(8.0, 1.0, 4.0, 32)},
        {"attention_chunk_size": 1000},
        {"interleave_moe_layer_step": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_switch_means_the_same_and_matters(change: dict, tmp_path: Path, stock: Llama4ForCausalLM) -> None:
    args = replace(ARGS, **change)
    other = stock_model(args)
    other.save_pretrained(tmp_path)
    ours = load(tmp_path)(tokens())
    torch.testing.assert_close(ours, other(tokens()).logits, atol=1e-5, rtol=0)
    assert (ours - stock(tokens()).logits).abs().max() > 1e-3


@torch.no_grad()
def test_packed_rows_equal_stock_transformers_with_explicit_masks(stock: Llama4ForCausalLM, folder: Path) -> None:
    """With positions that go on, transformers does not notice documents; it is given the masks."""
    documents = (torch.arange(LENGTH) > 20).long() + (torch.arange(LENGTH) > 37).long()
    documents = documents.expand(2, LENGTH)
    teacher, rows = load(folder), PackedRows(documents)
    masks = rows.masks(teacher.spans())
    names = {"full": "full_attention", "chunked": "chunked_attention"}
    theirs = stock(
        tokens(),
        attention_mask={
            names[kind]: torch.where(mask.dense, 0.0, torch.finfo(torch.float32).min) for kind, mask in masks.items()
        },
    ).logits
    ours = teacher(tokens(), rows.positions, masks)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - teacher(tokens())).abs().max() > 1e-2


@torch.no_grad()
def test_text_part_of_a_multimodal_checkpoint(folder: Path, tmp_path: Path) -> None:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file({**renamed, "vision_model.patch_embedding.linear.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": read_config(folder)}))
    assert torch.equal(load(tmp_path)(tokens()), load(folder)(tokens()))


def test_scout_has_its_size_and_layers() -> None:
    with torch.device("meta"):
        scout = Teacher(FLAVORS["scout"])
    assert sum(p.numel() for p in scout.parameters()) == 107_769_861_120
    assert [i for i in range(12) if not FLAVORS["scout"].uses_rope(i)] == [3, 7, 11]


def test_scaled_frequencies_are_finite_where_the_ramp_has_no_width() -> None:
    """Scout's low and high frequency factors are equal: the ramp's formula is 0/0 exactly at the threshold."""
    scaling = FLAVORS["scout"].rope_scaling
    assert scaling is not None
    at_threshold = torch.tensor([2 * torch.pi / 8192, 1.0, 1e-5])
    assert torch.isfinite(scaling.apply(at_threshold)).all()
    assert scaling.apply(torch.tensor([1e-5])).item() == pytest.approx(1e-5 / 16)
    assert angles(torch.tensor([[10_000_000]]), 128, 500_000.0, scaling).isfinite().all()


def test_all_tensor_problems_are_listed_at_once(folder: Path, tmp_path: Path) -> None:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    del tensors["model.layers.1.self_attn.q_proj.weight"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.zeros(3)
    tensors["model.layers.0.surprise"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read_config(folder)))
    with torch.device("meta"):
        problems = tensor_problems(Teacher(ARGS), tmp_path)
    text = "\n".join(problems)
    assert len(problems) == 4
    assert "model.layers.1.self_attn.q_proj.weight is missing" in text and "lm_head.weight is missing" in text
    assert "model.norm.weight has shape [3], expected [64]" in text
    assert "model.layers.0.surprise is not part of the model" in text
    with pytest.raises(ValueError, match="q_proj.weight is missing"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "shard"])
def test_a_damaged_folder_is_named(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "garbage":
        victim.write_bytes(b"\xff" * 64)
    else:
        victim.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=victim.name), torch.device("meta"):
        tensor_problems(Teacher(ARGS), tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type is 'llama'; this model needs 'llama4_text'"):
        teacher_args(read_config(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        read_config(tmp_path / "nowhere")


def test_training_reaches_every_expert_that_was_chosen() -> None:
    torch.manual_seed(0)
    teacher = Teacher(ARGS)
    teacher.init_weights()
    teacher(tokens()).logsumexp(-1).sum().backward()
    experts = teacher.layers["0"].feed_forward.experts
    router = teacher.layers["0"].feed_forward.router
    assert (experts.down_proj.grad.flatten(1) != 0).any(dim=1).sum() >= 2
    assert router.weight.grad.abs().sum() > 0


def gathered_elements(num_ranks: int) -> dict[str, int]:
    """Elements that a rank holds of one layer's gathered FSDP unit, on a pretended mesh, and of the layer itself."""
    import torch.distributed as dist

    from mobilellm_pro.config.job_config import TeacherParallelism
    from mobilellm_pro.model.teacher_layout import teacher_layout
    from mobilellm_pro.model.teacher_sharding import make_groups, shard_frozen

    dist.init_process_group("fake", rank=0, world_size=num_ranks)
    with torch.device("meta"):
        teacher = Teacher(replace(ARGS, num_hidden_layers=1))
    whole = sum(p.numel() for p in teacher.layers["0"].parameters())
    layout = teacher_layout(TeacherParallelism(), world_size=num_ranks, context=1, tensor=1)
    shard_frozen(teacher, make_groups(layout), resident=False)
    shards = sum(p.to_local().numel() for p in teacher.layers["0"].parameters())
    return {"whole": whole, "gathered": shards * num_ranks}


@pytest.mark.parametrize("num_ranks", [2, 16, 32])
def test_more_ranks_than_experts_gather_no_padding(num_ranks: int) -> None:
    """FSDP2 would pad 4 experts to one slice a rank: eight times their bytes on 32 ranks."""
    (counts,) = run_ranks(gathered_elements, 1, num_ranks)
    assert counts["whole"] <= counts["gathered"] < 1.2 * counts["whole"]
