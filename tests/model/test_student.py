"""The student is stock SmolLM3: same logits and same greedy text, past the sliding window, from our exported folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mobilellm_pro.convert.conversion import write_safetensors
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.generation import continue_tokens
from mobilellm_pro.model.hugging_face import hugging_face_name, student_args, student_config
from mobilellm_pro.model.kv_cache import KVCache
from mobilellm_pro.model.student import FLAVORS, Student, StudentArgs
from tests.model.folders import write_config

WINDOW = 8


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    # Larger weights than at initialisation, so that attention is far from uniform.
    args = replace(FLAVORS["debug"], initializer_range=0.08, sliding_window=WINDOW, num_key_value_heads=1)
    model = Student(args)
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def stock(student: Student, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    folder = tmp_path_factory.mktemp("student")
    export(student, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def export(student: Student, folder: Path) -> None:
    config = student_config(
        student.model_args, max_position_embeddings=4096, bos_id=1, eos_id=2, pad_id=3, dtype="float32"
    )
    write_config(folder, config)
    write_safetensors({hugging_face_name(k): v for k, v in student.state_dict().items()}, folder)
    assert student_args(config, folder) == replace(student.model_args, initializer_range=config["initializer_range"])


def test_1b_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Student(FLAVORS["1b"])
    assert sum(p.numel() for p in model.parameters()) == 1_084_453_120
    assert "lm_head.weight" not in model.state_dict()
    kinds = [FLAVORS["1b"].kind(i) for i in range(30)]
    assert kinds[0] == kinds[-1] == "global" and kinds.count("global") == 9
    assert kinds[:8] == ["global", "local", "local", "local"] * 2


@pytest.mark.parametrize("length", [1, WINDOW, 5 * WINDOW + 3])
def test_logits_equal_stock_transformers(student: Student, stock: torch.nn.Module, length: int) -> None:
    tokens = torch.randint(0, 4096, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        ours, theirs = student(tokens), stock(tokens).logits
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_greedy_generation_equals_stock_transformers(student: Student, stock: torch.nn.Module) -> None:
    prompt = torch.randint(5, 4096, (2, 5), generator=torch.Generator().manual_seed(1))
    ours = continue_tokens(student, prompt, 4 * WINDOW)
    theirs = stock.generate(prompt, max_new_tokens=4 * WINDOW, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs[:, prompt.shape[1] :])


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [3, 9, 1, 7]])
def test_the_cache_changes_nothing(student: Student, pieces: list[int]) -> None:
    tokens = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(2))
    cache = KVCache(20)
    with torch.no_grad():
        parts = [student(part, cache=cache) for part in tokens.split(pieces, dim=1)]
        whole = student(tokens)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_a_packed_document_is_computed_as_if_alone(student: Student) -> None:
    """Under a block-causal mask and RoPE a document cannot tell where in the row it stands."""
    generator = torch.Generator().manual_seed(3)
    first, second = (
        torch.randint(0, 4096, (1, 11), generator=generator),
        torch.randint(0, 4096, (1, 13), generator=generator),
    )
    tokens = torch.cat((first, second), dim=1)
    documents = torch.tensor([[0] * 11 + [1] * 13])
    with torch.no_grad():
        alone = student(second)
        for rows in (PackedRows(documents), PackedRows(documents, "reset")):
            packed = student(tokens, rows.positions, rows.masks(student.spans()))
            torch.testing.assert_close(packed[:, 11:], alone, atol=2e-5, rtol=0)
        open_row = student(tokens, None, rows.masks(student.spans(), "causal"))
    assert (open_row[:, 11:] - alone).abs().max() > 0.01


def test_head_runs_inside_the_model_and_gradients_reach_the_shared_matrix(student: Student) -> None:
    seen = {}

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen["same"] = weight is student.embed_tokens.weight
        return (hidden @ weight.T).square().mean()

    student.zero_grad()
    student(torch.arange(6).view(1, 6), head=head).backward()
    assert seen["same"]
    gradient = student.embed_tokens.weight.grad
    assert gradient is not None and (gradient != 0).all(dim=1).sum() > 4000  # from the head, not the six looked-up rows
    student.zero_grad()


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_layers names layers \[30\]; the model has layers 0 to 29"):
        StudentArgs(global_layers=(0, 30))


def test_sampling_follows_the_seed_and_stops(student: Student) -> None:
    prompt = torch.tensor([[7, 8, 9]])
    draws = [
        continue_tokens(student, prompt, 12, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    greedy = continue_tokens(student, prompt, 12)
    stop = int(greedy[0, 4])
    stopped = continue_tokens(student, prompt, 12, stop_ids=(stop,))
    assert stopped.shape[1] == greedy[0].tolist().index(stop) + 1
