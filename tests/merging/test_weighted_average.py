"""sum_b w_b theta_b against float64, and which weights a parameter gets."""

import numpy as np
import pytest
import torch

from mobilellm_pro.merging.drift import barrier, relative_distances
from mobilellm_pro.merging.weighted_average import LayerGroups, weighted_average

WEIGHTS = [0.1, 0.55, -0.05, 0.4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_sum_in_float64_up_to_one_rounding_of_each_term(dtype: torch.dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(37, 11).to(dtype) for _ in WEIGHTS]
    kept = [tensor.clone() for tensor in tensors]
    truth = sum(weight * tensor.double() for weight, tensor in zip(WEIGHTS, tensors))
    ours = weighted_average((tensor for tensor in tensors), WEIGHTS)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    size = sum(abs(weight) * tensor.double().abs() for weight, tensor in zip(WEIGHTS, tensors))
    assert bool(((ours.double() - truth).abs() <= len(WEIGHTS) * torch.finfo(ours.dtype).eps * size).all())
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept)), "inputs stay as they were"


def test_one_branch_alone_is_that_branch_to_the_bit():
    tensor = torch.randn(5, 3)
    assert torch.equal(weighted_average([torch.randn(5, 3), tensor], [0.0, 1.0]), tensor)


def test_tensors_that_cannot_be_averaged():
    with pytest.raises(ValueError, match=r"shape \[1, 3\], expected \[2, 3\]"):  # it would broadcast
        weighted_average([torch.ones(2, 3), torch.ones(1, 3)], [0.5, 0.5])
    with pytest.raises(ValueError, match="at least one"):
        weighted_average([], [])
    with pytest.raises(ValueError, match="fewer tensors than the 2 weights"):
        weighted_average([torch.ones(2)], [0.5, 0.5])
    with pytest.raises(ValueError, match="more tensors than the 1 weights"):
        weighted_average([torch.ones(2), torch.ones(2)], [1.0])


def test_groups_of_layers():
    groups = LayerGroups((0, 4, 12))
    names = ["embed_tokens.weight", "layers.3.mlp.up_proj.weight", "layers.4.a", "model.layers.11.b", "layers.12.c"]
    assert [groups.of(name) for name in names] == [0, 1, 2, 2, 3]
    assert groups.of("norm.weight") == 3
    assert groups.names == ["embedding", "layers 0 to 3", "layers 4 to 11", "layers 12 to end"]
    assert LayerGroups().names == ["all"] and LayerGroups().of("layers.12.c") == 0
    for first in ((1, 4), (0, 4, 4), (0, 4, 2)):
        with pytest.raises(ValueError, match="ascending order, beginning with 0"):
            LayerGroups(first)


def test_distance_from_the_parent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mobilellm_pro.merging.drift.BLOCK_ELEMENTS", 7)  # the last block is not full
    rng = np.random.default_rng(0)
    parent, moved = ({name: rng.normal(size=(5, 4)) for name in "xyz"} for _ in range(2))
    as_tensors = [{name: torch.from_numpy(value) for name, value in model.items()} for model in (parent, moved)]
    readers = [model.__getitem__ for model in as_tensors]
    flat = [np.concatenate([model[name].ravel() for name in "xyz"]) for model in (parent, moved)]
    expected = np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])
    assert relative_distances("xyz", readers[0], readers) == pytest.approx([0.0, expected])


def test_barrier():
    assert barrier((1.0, 2.0), [0.25, 0.5, 0.75], [1.25, 1.9, 1.75]) == pytest.approx(0.4)
    assert barrier((1.0, 2.0), [0.5], [1.2]) == pytest.approx(-0.3), "a valley"
