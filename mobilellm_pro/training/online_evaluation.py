"""Evaluations of the student while it trains: what one must be, and how it meets a model that lies on many ranks.

Training knows no evaluation by name: `pipeline` builds those that a configuration asks for and passes them in. Each
gets a whole, plain copy of the student on every rank, so that it may run without messages between ranks and without the
layout's modules, and gives numbers for the log. Nothing that it does reaches the training: the weights are a copy, and
the states of all random generators are put back.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mobilellm_pro.model.quantized_modules import quantize_modules
from mobilellm_pro.model.student import Student
from mobilellm_pro.training.metrics import DistillMetrics


class OnlineEvaluation(Protocol):
    """One evaluation of a run."""

    name: str
    """Kind of its lines in metrics.jsonl, and prefix of its numbers in TensorBoard."""

    freq: int
    """Steps between two evaluations; one more follows the last step."""

    def problems(self) -> list[str]:
        """What will keep it from running, each with the cure; needs neither the model nor a process group."""
        ...

    def is_done(self, step: int) -> bool:
        """Whether the run has evaluated this step, before it was stopped; asked on the first rank."""
        ...

    def __call__(self, model: Student, step: int) -> Mapping[str, float]:
        """Called on every rank at once.

        Args:
            model: whole on this rank's device, in evaluation mode, without gradients; the same on every rank.
            step: of the training.

        Returns:
            numbers to log, the same on every rank.
        """
        ...


def evaluate_online(
    evaluations: Sequence[OnlineEvaluation],
    model: nn.Module,
    step: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    metrics: DistillMetrics,
) -> None:
    """Runs evaluations and logs what they give; a collective of all ranks.

    Args:
        evaluations: to run now.
        model: the student in training, in any layout.
        step: that it has reached.
        dtype: of the copy's weights, that of the forward pass in training.
        device: of the copy.
        metrics: the run's log.
    """
    if not evaluations:
        return
    start = time.perf_counter()
    with undisturbed_randomness(device):
        whole = whole_copy(model, dtype, device)
        for evaluation in evaluations:
            scores = evaluation(whole, step)
            metrics.log_evaluation(evaluation.name, step, scores, time.perf_counter() - start)
            start = time.perf_counter()


@torch.no_grad()
def whole_copy(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Student:
    """A plain student with the weights of one under FSDP2 and tensor parallelism, gathered parameter by parameter.

    Args:
        model: the student as it trains; wrapped layers (activation checkpointing, compilation) are fine.
        dtype: of the copy; shards are rounded before they travel.
        device: of the copy.
    """
    assert isinstance(model, Student), "only students are evaluated while they train"
    with torch.device("meta"):
        whole = Student(replace(model.model_args))
        if model.quantization is not None:
            quantize_modules(whole, model.quantization)
    whole.to(dtype).to_empty(device=device)
    whole.requires_grad_(False)
    parameters = dict(whole.named_parameters())
    for name, tensor in model.state_dict().items():  # its names are free of wrappers, unlike those of the parameters
        tensor = tensor.to(device=device, dtype=dtype)  # shards that are offloaded to the CPU meet on the device
        parameters.pop(name).copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    assert not parameters, f"not in the model's state: {', '.join(parameters)}"
    return whole.eval()


@contextmanager
def undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """Puts back the state of every random generator: a library may seed them all."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
