"""Whatever the layout, every rank holds exactly its part of the stored tensors, and read little more than that.

The truth is the stored tensor itself, cut by hand. Every element of a stored tensor is distinct.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mobilellm_pro.model import shard_loading
from mobilellm_pro.model.hugging_face import read_config, teacher_args
from mobilellm_pro.model.shard_loading import load_tensors
from mobilellm_pro.model.teacher import Teacher
from tests.model.folders import SMALL_TEACHER, write_stock_teachers
from tests.ranks import run_ranks

SHAPES = {"experts": (6, 10, 16), "matrix": (7, 12), "few": (2, 3), "norm": (5,)}
"""Uneven on 2 and on 4 ranks; `few` leaves ranks without a row."""


def stored(name: str) -> Tensor:
    """The full tensor of a name in `SHAPES`."""
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1000 * (len(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files; the order of the parameters is not that of the tensors in them."""
    path = tmp_path_factory.mktemp("tensors")
    save_file({f"model.{name}": stored(name) for name in ("norm", "experts")}, path / "a.safetensors")
    save_file({f"model.{name}": stored(name) for name in ("few", "matrix")}, path / "b.safetensors")
    return path


def model_of(shapes: Mapping[str, tuple[int, ...]], **options: Any) -> nn.Module:
    """A module with these parameters, filled with NaN; the options are `device` and `dtype`."""
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan, **options)))
    return model


def assert_equal(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("block_bytes", [2**26, 200, 4])
def test_whole_tensors(folder: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_loading, "BLOCK_BYTES", block_bytes)
    model = model_of(SHAPES)
    load_tensors(model, folder)
    assert_equal(model, {name: stored(name) for name in SHAPES})


def test_the_parameters_data_type_counts(folder: Path) -> None:
    model = model_of(SHAPES, dtype=torch.bfloat16)
    load_tensors(model, folder)
    assert_equal(model, {name: stored(name).bfloat16() for name in SHAPES})


def test_only_what_is_named(folder: Path) -> None:
    model = model_of(SHAPES, device="meta")
    model.matrix = nn.Parameter(torch.empty(SHAPES["matrix"]))
    load_tensors(model, folder, names={"matrix"})
    assert torch.equal(model.matrix, stored("matrix"))
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if name != "matrix")
    with pytest.raises(AssertionError, match="allocate the parameter"):
        load_tensors(model, folder)


def test_everything_wrong_is_in_one_error(folder: Path) -> None:
    model = model_of({"matrix": (7, 12), "few": (3, 2), "norm": (6,), "absent": (1,)})
    with pytest.raises(ValueError) as caught:
        load_tensors(model, folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert any("tensor model.absent is missing" in line for line in lines)
    assert any("tensor model.experts is not part of the model" in line for line in lines)
    assert any("tensor model.few has shape [2, 3], expected [3, 2]" in line for line in lines)
    assert all(parameter.isnan().all() for parameter in model.parameters()), "nothing is loaded of what does not fit"


def part_of_experts(tensor_rank: int, expert_rank: int) -> tuple[dict[int, Any], Tensor]:
    """Half of the experts, and a quarter of the columns of each half: slices, and the part cut by hand."""
    first, column = expert_rank * 3, tensor_rank * 2
    slices = {0: ((first, first + 3),), 2: ((column, column + 2), (8 + column, 8 + column + 2))}
    experts = stored("experts")[first : first + 3]
    return slices, torch.cat((experts[..., column : column + 2], experts[..., 8 + column : 8 + column + 2]), dim=-1)


@pytest.mark.parametrize("block_bytes", [2**26, 40])
def test_slices(folder: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_loading, "BLOCK_BYTES", block_bytes)
    for tensor_rank in range(4):
        for expert_rank in range(2):
            slices, expected = part_of_experts(tensor_rank, expert_rank)
            model = model_of({**SHAPES, "experts": (3, 10, 4)})
            load_tensors(model, folder, slices={"experts": slices})
            assert_equal(model, {**{name: stored(name) for name in SHAPES}, "experts": expected})


def test_slices_outside_the_stored_tensor(folder: Path) -> None:
    model = model_of({**SHAPES, "experts": (3, 10, 16)})
    with pytest.raises(ValueError, match=r"model\.experts has shape \[6, 10, 16\], expected \[3, 10, 16\]"):
        load_tensors(model, folder, slices={"experts": {0: ((4, 7),)}})


LAYOUTS = {1: [(1,)], 2: [(2,)], 4: [(4,), (2, 2)]}
"""Number of ranks -> meshes: one axis is FSDP2, two are HSDP."""


def load_on_meshes(folder: str, num_ranks: int) -> list[int]:
    """One rank of every layout, each with either dim sharded; returns its smallest shard of each, in elements."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    smallest = []
    for shape in LAYOUTS[num_ranks]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        smallest += [load_on_mesh(folder, mesh, shard_dim, sliced) for shard_dim in (0, 1) for sliced in (False, True)]
    dist.destroy_process_group()
    return smallest


def load_on_mesh(folder: str, mesh: DeviceMesh, shard_dim: int, sliced: bool) -> int:
    """Rows [1] 1 to 9 of the experts, whose number FSDP2 can split evenly: it knows padding of dim 0 only."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    slices, experts = part_of_experts(1, 1) if sliced else ({}, stored("experts"))
    slices, experts = {**slices, 1: ((1, 9),)}, experts[:, 1:9]
    model = model_of({**SHAPES, "experts": tuple(experts.shape)}, device="meta")
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(shard_dim) if p.ndim == 3 else None)
    model.to_empty(device="cpu")
    load_tensors(model, folder, slices={"experts": slices})
    rank, num_shards = mesh.get_local_rank("shard"), mesh.size(-1)
    for name, parameter in model.named_parameters():
        truth, dim = (experts, shard_dim) if name == "experts" else (stored(name), 0)
        parts = truth.chunk(num_shards, dim)
        mine = parts[rank] if rank < len(parts) else truth.narrow(dim, 0, 0)
        assert torch.equal(parameter.to_local(), mine), (name, mesh, shard_dim, sliced)
        assert torch.equal(parameter.full_tensor(), truth), name
    return min(parameter.to_local().numel() for parameter in model.parameters())


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_fsdp_and_hsdp(folder: Path, num_ranks: int) -> None:
    smallest = run_ranks(load_on_meshes, num_ranks, str(folder), num_ranks)
    assert min(smallest[0]) > 0
    if num_ranks == 4:
        assert min(smallest[3]) == 0, "a rank without a row was to be among them"


def load_tensor_parallel(folder: str) -> list[str]:
    """One rank of two that split columns and rows with DTensor, times two of FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = model_of(SHAPES, device="meta")
    for name, dim in {"matrix": 0, "experts": 2, "few": 0}.items():
        split = distribute_tensor(getattr(model, name), mesh["tensor"], [Shard(dim)])
        model.register_parameter(name, nn.Parameter(split))
    fully_shard(model, mesh=mesh["shard"])
    model.to_empty(device="cpu")
    load_tensors(model, folder)
    rank, tensor_rank = mesh.get_local_rank("shard"), mesh.get_local_rank("tensor")
    for name, dim in {"matrix": 0, "experts": 2}.items():
        part = stored(name).chunk(2, dim)[tensor_rank].chunk(2, 0)[rank]
        assert torch.equal(getattr(model, name).to_local(), part), name
    return [str(model.matrix.placements), str(model.experts.placements)]


def test_tensor_parallel_times_fsdp(folder: Path) -> None:
    """7 rows on 2 x 2 ranks: 2, 2 of the first half, 2, 1 of the second, by a strided placement."""
    (matrix, experts), *_ = run_ranks(load_tensor_parallel, 4, str(folder))
    assert "StridedShard" in matrix and "dim=2" in experts


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_stock_teachers(tmp_path_factory.mktemp("stock"))


def load_teachers(folders: list[str], reference: str, num_ranks: int) -> list[list[str]]:
    """One rank of FSDP2 over all ranks, layer by layer: for each folder the tensors that equal the reference."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (num_ranks,))
    tensors, equal = load_file(reference), []
    for folder in folders:
        with torch.device("meta"):
            teacher = Teacher(teacher_args(read_config(folder), folder))
        for unit in (*teacher.layers.values(), teacher):
            fully_shard(unit, mesh=mesh)
        teacher.to_empty(device="cpu")
        load_tensors(teacher, folder)
        full_names = {n if n == "lm_head.weight" else f"model.{n}": p for n, p in teacher.named_parameters()}
        equal.append([n for n, p in full_names.items() if torch.equal(p.full_tensor(), tensors[n])])
    dist.destroy_process_group()
    return equal


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_folders_of_transformers(stock: dict[str, Path], num_ranks: int) -> None:
    folders = [str(stock[kind]) for kind in ("shards", "multimodal")]
    reference = stock["text"] / "model.safetensors"
    for equal in run_ranks(load_teachers, num_ranks, folders, str(reference), num_ranks):
        assert [sorted(names) for names in equal] == [sorted(load_file(reference))] * 2


def test_a_wider_teacher_than_its_files(stock: dict[str, Path]) -> None:
    with pytest.raises(ValueError) as caught:
        load_tensors(Teacher(replace(SMALL_TEACHER, num_local_experts=4)), stock["multimodal"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 * SMALL_TEACHER.num_hidden_layers  # router and both stacks of experts
    assert all("tensor language_model.model.layers." in line and "has shape [3, " in line for line in lines)


def test_progress_is_logged_every_tenth(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtitan.tools.logging import logger

    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(shard_loading, "_QUIET_SECONDS", -1.0)
    monkeypatch.setattr(shard_loading, "BLOCK_BYTES", 64)
    with caplog.at_level(logging.INFO):
        load_tensors(model_of(SHAPES), folder)
        assert not caplog.records
        load_tensors(model_of(SHAPES), folder, show_progress=True)
    shares = [record.getMessage().split(": ")[1].split(" % of 0.00 GB loaded")[0] for record in caplog.records]
    assert shares == [str(share) for share in range(10, 101, 10)]
    caplog.clear()
    monkeypatch.setattr(shard_loading, "_QUIET_SECONDS", 60.0)
    load_tensors(model_of(SHAPES), folder, show_progress=True)
    assert not caplog.records, "a short load needs no lines"


MEMORY_SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import safetensors.torch
from mobilellm_pro.model.shard_loading import load_tensors
torch.set_num_threads(1)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024

def load(folder, rows, columns, whole_files=False):
    files = sorted(Path(folder).glob("*.safetensors"))
    names = [f"t{i}" for i in range(6 * len(files))]
    model = torch.nn.Module()
    for name in names:
        model.register_parameter(name, torch.nn.Parameter(torch.empty(rows, columns, device="meta")))
    slices = {name: {0: ((4096 - rows, 4096),), 1: ((2048 - columns, 2048),)} for name in names}
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model.to_empty(device="cpu")
    if not whole_files:
        load_tensors(model, folder, slices=slices)
    for file in files if whole_files else ():
        for name, tensor in safetensors.torch.load(file.read_bytes()).items():
            getattr(model, name.removeprefix("model.")).data.copy_(tensor[-rows:, -columns:])
        del tensor
    peak = status("VmHWM") - before
    assert all((parameter == 7).all() for parameter in model.parameters())
    return peak

small, large = sys.argv[1:]
load(small, 4096, 2048)  # what is imported and allocated once
cases = {
    "whole": (4096, 2048), "rows": (2048, 2048), "columns": (4096, 1024), "both": (1024, 512),
    "read whole": (4096, 2048, True), "read half": (2048, 2048, True),
}
for name, case in cases.items():
    child = os.fork()  # or memory that the case before has freed would be used again
    if not child:
        print(json.dumps([name, load(large, *case)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_shard_and_little_more(tmp_path: Path) -> None:
    """Two files of 6 tensors of 32 MiB, resident peak of a fresh process; reading whole files must exceed the bar."""
    tensor, shard = 4096 * 2048 * 4 / 2**20, 12 * 4096 * 2048 * 4 / 2**20
    full = torch.full((4096, 2048), 7.0)
    for name, first in {"small/a": 0, "large/a": 0, "large/b": 6}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tensors = {f"model.t{first + i}": full.clone() for i in range(6)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    bars = {name: 1.25 * shard * part + tensor for name, part in (("whole", 1), ("rows", 0.5), ("columns", 0.5))}
    bars["both"] = 1.25 * shard / 16 + tensor
    assert all(peaks[name] <= bar for name, bar in bars.items()), (peaks, bars)
    assert peaks["read whole"] > bars["whole"] and peaks["read half"] > bars["rows"], (peaks, bars)
