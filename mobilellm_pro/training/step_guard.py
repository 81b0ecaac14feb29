"""What all ranks agree on once a step, between its gradients and the optimizer: whether the step may be applied.

One small reduction and one read of it tell every rank whether any loss or the gradient norm is not finite, whether a
stop is asked for, and whether a checkpoint in the background has failed. So no rank stops or skips alone, and a
micro-batch costs no wait for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from mobilellm_pro.config.job_config import Guard
from mobilellm_pro.data.mixture import Mixture
from mobilellm_pro.training.bad_step import MicroBatch, bad_micro_batches, report_bad_step
from mobilellm_pro.training.checkpoints import RunCheckpoints
from mobilellm_pro.training.metrics import DistillMetrics
from mobilellm_pro.training.step_ranges import GRADIENT_NORM, OPTIMIZER, step_range
from mobilellm_pro.training.stop_request import StopRequest


class Agreement(NamedTuple):
    """The same on every rank."""

    is_finite: bool
    stop: int
    """The greatest `StopRequest.look` of any rank."""

    save_failed: bool


class GuardedOptimizers(OptimizersContainer):
    """torchtitan's optimizers, which ask before every step.

    Attributes:
        may_step: called on all ranks when the gradients are complete and clipped; where it says no, they are dropped
            and neither weights nor moments change.
    """

    may_step: Callable[[], bool] | None = None

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Applies the gradients, or drops them."""
        if self.may_step is None or self.may_step():
            with step_range(OPTIMIZER):
                super().step(*args, **kwargs)
        else:
            self.zero_grad()


class StepGuard:
    """Watches the steps of a run, on one rank.

    Attributes:
        micro_batches: of the step that is being done, so far.
        stop: what all ranks agreed on, see `StopRequest.look`; 0 until somebody asks.
    """

    def __init__(
        self,
        settings: Guard,
        *,
        metrics: DistillMetrics,
        checkpoints: RunCheckpoints,
        mixture: Mixture,
        stop: StopRequest | None,
        search: Callable[[MicroBatch], list[str]],
    ) -> None:
        """
        Args:
            settings: [guard].
            metrics, checkpoints, mixture: of the run.
            stop: where to look for a request; None: there is none.
            search: runs a micro-batch again, on all ranks, and says what of it is not finite on this rank. The weights
                are as they were, so it gives again what it gave.
        """
        self._settings, self._metrics, self._checkpoints = settings, metrics, checkpoints
        self._mixture, self._request, self._search = mixture, stop, search
        self.micro_batches: list[MicroBatch] = []
        self.stop = 0
        self._norm: Tensor | None = None
        self._step, self._skipped_in_a_row = 0, 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Around torchtitan's `train_step`, which keeps the norm of the gradients to itself: here it is noted."""
        self._step, self._norm, self.micro_batches = step, None, []
        clip = dist_utils.clip_grad_norm_

        def noting_clip(*args: Any, **kwargs: Any) -> Tensor:
            with step_range(GRADIENT_NORM):
                self._norm = clip(*args, **kwargs)
            return self._norm

        dist_utils.clip_grad_norm_ = noting_clip
        try:
            yield
        finally:
            dist_utils.clip_grad_norm_ = clip

    def may_step(self) -> bool:
        """Whether the gradients of this step are applied: asked by the optimizers, answered alike on all ranks.

        Raises:
            FloatingPointError: they are not finite, and [guard] says to stop, or too many have been skipped.
            CheckpointFailed: a checkpoint in the background could not be written.
        """
        agreed = self._agree()
        self.stop = max(self.stop, agreed.stop)
        if agreed.save_failed:
            self._checkpoints.wait()
        if agreed.is_finite:
            self._skipped_in_a_row = 0
            self._metrics.terms.keep_step()
            return True
        report = self._report()
        if self._settings.non_finite == "stop":
            logger.error(report)  # before the search, which runs parts of the step again and may fail
            report = self._report(self._find_causes())
            raise FloatingPointError(f'{report}\n(guard.non_finite = "skip" would leave such steps out)')
        self._skipped_in_a_row += 1
        limit = self._settings.max_skipped_steps
        if self._skipped_in_a_row > limit:
            found = f"{self._skipped_in_a_row} steps in a row, more than guard.max_skipped_steps = {limit}"
            raise FloatingPointError(f"{report}\n({found})")
        self._metrics.log_skipped(self._step, report)
        return False

    def _agree(self) -> Agreement:
        assert self._norm is not None, "torchtitan has clipped the gradients by another function"
        losses = torch.stack([micro_batch.loss for micro_batch in self.micro_batches])
        finite = losses.isfinite().all() & self._norm.to(losses.device).isfinite()
        stop = 0 if self._request is None else self._request.look()
        known = torch.tensor([stop, self._checkpoints.has_failed()], dtype=torch.float32)
        flags = torch.cat([(~finite).float().reshape(1), known.to(losses.device, non_blocking=True)])
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        non_finite, agreed_stop, failed = flags.tolist()
        return Agreement(not non_finite, int(agreed_stop), bool(failed))

    def _report(self, causes: dict[int, list[str]] | None = None) -> str:
        assert self._norm is not None
        return report_bad_step(self._step, self._norm.item(), self.micro_batches, self._mixture, causes)

    def _find_causes(self) -> dict[int, list[str]]:
        """What is not finite on this rank, in the micro-batches that are bad on any, or in all if none is."""
        numbers = bad_micro_batches(self.micro_batches) or range(len(self.micro_batches))
        return {number: self._search(self.micro_batches[number]) for number in numbers}
