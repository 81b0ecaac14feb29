"""Merged checkpoints: the numbers of mergekit and of float64, the formats of `convert`, and one tensor of memory."""

import gc
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mobilellm_pro.config import load
from mobilellm_pro.convert.conversion import convert, whole_folder, write_computed_safetensors, write_safetensors
from mobilellm_pro.convert.merged_checkpoint import Branches, write_hugging_face_copy, write_merged
from mobilellm_pro.merging.weighted_average import LayerGroups
from mobilellm_pro.model.checkpoint import empty_model, load_model
from mobilellm_pro.model.stored_parameters import ParameterKind, StoredParameters, write_parameters
from tests.data.synthetic import DEBUG_TOKENIZER
from tests.ranks import run_ranks

WEIGHTS = np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2], [0.0, 0.4, 0.6]])
GROUPS = LayerGroups((0, 2))
JOB = """
[model]
name = "mobilellm_pro"
flavor = "debug"
[data]
tokenizer = "{tokenizer}"
[[data.datasets]]
name = "a"
path = "tokens/a"
weight = 1.0
[distill]
objective = "ce"
[training]
seq_len = 64
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random students as run folders."""
    folders = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp(f"run{seed}")
        (folder / "config.toml").write_text(JOB.format(tokenizer=DEBUG_TOKENIZER))
        torch.manual_seed(seed)
        model = empty_model(load(folder / "config.toml"))
        model.init_weights()
        write_parameters(folder / "checkpoint/step-1", *_in_memory(model.state_dict()))
        folders.append(folder)
    return folders


def _in_memory(tensors: dict[str, torch.Tensor]):
    return {name: ParameterKind(tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.__getitem__


def _merge(runs: list[Path], folder: Path, weights: np.ndarray = WEIGHTS, groups: LayerGroups = GROUPS) -> Path:
    """A run folder of the merged model."""
    config = load(runs[0] / "config.toml")
    branches = Branches([run / "checkpoint/step-1" for run in runs], list(load_model(runs[0]).model.state_dict()))
    write_merged(folder / "checkpoint/step-0", config, branches, weights, groups, "float32")
    (folder / "config.toml").write_text((runs[0] / "config.toml").read_text())
    return folder


def test_every_parameter_is_the_average_of_its_group(runs: list[Path], tmp_path: Path):
    ours = load_model(_merge(runs, tmp_path / "merged")).model.state_dict()
    states = [load_model(run).model.state_dict() for run in runs]
    assert ours.keys() == states[0].keys()
    for name, tensor in ours.items():
        weights = WEIGHTS[GROUPS.of(name)]
        truth = sum(weight * state[name].double() for weight, state in zip(weights, states))
        torch.testing.assert_close(tensor.double(), truth, rtol=0, atol=3e-7 * float(truth.abs().max()))


def test_the_hugging_face_folder_is_that_of_convert_to_the_byte(runs: list[Path], tmp_path: Path):
    merged = _merge(runs, tmp_path / "merged")
    for dtype in ("float32", "bfloat16"):
        convert(str(merged), str(tmp_path / "converted"), dtype=dtype, overwrite=True)
        with whole_folder(tmp_path / dtype) as folder:
            step = merged / "checkpoint/step-0"
            write_hugging_face_copy(folder, load(merged / "config.toml"), step, dtype)
        files = {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / dtype).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()


def test_files_have_the_bytes_that_safetensors_itself_writes(tmp_path: Path):
    torch.manual_seed(0)
    tensors = {"b.w": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).double()}
    tensors |= {"x.y": torch.randn(()), 'é"': torch.randn(0, 4), "half": torch.randn(9, 1).half()}
    write_safetensors(tensors, tmp_path)
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()
    with pytest.raises(ValueError, match="x: torch.int64; expected one of"):
        write_safetensors({"x": torch.ones(2, dtype=torch.int64)}, tmp_path)


def test_tensors_are_computed_once_and_in_the_order_of_the_file(tmp_path: Path):
    kinds = {f"t{number}": ParameterKind((100,), torch.float32) for number in range(6)}
    asked: list[str] = []

    def compute(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((100,), float(name[1:]))

    write_computed_safetensors(kinds, compute, tmp_path, shard_bytes=1000)
    assert asked == list(kinds) and len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert float(load_file(tmp_path / "model-00003-of-00003.safetensors")["t5"][0]) == 5


def _save_sharded(folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)
        for name, tensor, dim in (
            ("rows", _numbers(7, 3), 0),
            ("columns", _numbers(4, 5), 1),
            ("short", _numbers(1), 0),
        )
    }
    dcp.save({**state, "optimizer.state": torch.ones(3)}, checkpoint_id=folder)
    dist.destroy_process_group()


def _numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).view(shape)


def test_parameters_of_several_ranks_are_put_together(tmp_path: Path):
    """Uneven shards, along either dim, and a rank that holds nothing of a tensor."""
    run_ranks(_save_sharded, 3, str(tmp_path / "step-1"))
    stored = StoredParameters(tmp_path / "step-1")
    assert torch.equal(stored.read("rows"), _numbers(7, 3)) and torch.equal(stored.read("columns"), _numbers(4, 5))
    assert torch.equal(stored.read("short"), _numbers(1))
    assert stored.kind("columns") == ParameterKind((4, 5), torch.float32)
    with pytest.raises(KeyError):
        stored.read("norm.weight")


def test_a_branch_is_read_once_where_all_fit_into_memory(runs: list[Path], monkeypatch: pytest.MonkeyPatch):
    reads: list[str] = []
    original = StoredParameters.read
    monkeypatch.setattr(StoredParameters, "read", lambda self, name: (reads.append(name), original(self, name))[1])
    steps, names = [run / "checkpoint/step-1" for run in runs], ["norm.weight", "layers.0.mlp.up_proj.weight"]
    for memory, expected in ((2**30, 6), (1000, 12)):
        reads.clear()
        branches = Branches(steps, names, memory)
        first, second = ([branches.average(name, [0.2, 0.3, 0.5]) for name in names] for _ in range(2))
        assert len(reads) == expected and all(torch.equal(a, b) for a, b in zip(first, second))
    reads.clear()
    branches.average("norm.weight", [0.0, 1.0, 0.0])
    assert len(reads) == 1, "branches of weight 0 are not read"


def test_what_a_kill_left_is_replaced(tmp_path: Path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp/half").write_text("half")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that was read; of sums also the one before, which torch lets go when it has the next."""
    alive = {"read": 0, "sum": 0}
    most = dict(alive)

    def counted(kind: str, tensor: torch.Tensor) -> torch.Tensor:
        alive[kind] += 1
        most[kind] = max(most[kind], alive[kind])
        weakref.finalize(tensor.untyped_storage(), lambda: alive.update({kind: alive[kind] - 1}))
        return tensor

    kinds = {f"layers.{number}.w": ParameterKind((64, 64), torch.float32) for number in range(12)}
    for branch in range(3):
        write_parameters(tmp_path / str(branch), kinds, lambda name, n=branch: torch.full((64, 64), float(n)))
    original = StoredParameters.read
    monkeypatch.setattr(StoredParameters, "read", lambda self, name: counted("read", original(self, name)))
    branches = Branches([tmp_path / str(branch) for branch in range(3)], list(kinds))
    write_parameters(tmp_path / "merged", kinds, lambda name: counted("sum", branches.average(name, [0.5, 0.25, 0.25])))
    merged = StoredParameters(tmp_path / "merged")
    assert float(merged.read("layers.7.w")[3, 3]) == 0.75
    write_computed_safetensors(kinds, merged.read, tmp_path)
    assert most == {"read": 1, "sum": 2}, most
    gc.collect()
    assert not any(alive.values())


@pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed (the extra `dev` has it)")
def test_it_equals_mergekit_to_the_bit(runs: list[Path], tmp_path: Path):
    """The same weights, both from folders that `convert` exported."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    weights = [0.2, 0.5, 0.3]
    for run, name in zip(runs, "abc"):
        convert(str(run), str(tmp_path / name))
    models = [{"model": str(tmp_path / n), "parameters": {"weight": w}} for n, w in zip("abc", weights)]
    plan = {"merge_method": "linear", "dtype": "float32", "parameters": {"normalize": False}, "models": models}
    run_merge(MergeConfiguration.model_validate(plan), str(tmp_path / "theirs"), MergeOptions(quiet=True))
    convert(str(_merge(runs, tmp_path / "merged", np.array([weights]), LayerGroups())), str(tmp_path / "ours"))
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() - {"lm_head.weight"} == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
