"""torchtitan's metrics with those of a distillation: the terms of the loss, tokens and epochs per corpus.

Sums are added up on the device between two logs and reduced over the mesh once a log, so a step that is not logged
costs no synchronisation.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.losses import DistillationLoss
from mobilellm_pro.training.run_folder import METRICS, append_metrics, read_metrics

TERMS = ("kl", "ce", "teacher_ce", "teacher_entropy")


class TermSums:
    """Running sums of the loss's terms over tokens of this rank."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._step: list[torch.Tensor] = []

    def add(self, terms: DistillationLoss, num_tokens: torch.Tensor) -> None:
        """Notes one micro-batch of the step; `num_tokens` are the tokens of this rank that count."""
        values = [getattr(terms, name).detach().double() for name in TERMS] + [num_tokens.double()]
        self._step.append(torch.stack([value.reshape(()) for value in values]))

    def keep_step(self) -> None:
        """Adds what was noted of the step."""
        for stacked in self._step:
            self._sums = stacked if self._sums is None else self._sums + stacked
        self._step = []

    def drop_step(self) -> None:
        """Forgets what was noted of the step, which one NaN would spoil for all steps since the last log."""
        self._step = []

    def reduce(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Means over the tokens of all ranks of the group, in nats a token; forgets the sums."""
        assert self._sums is not None, "nothing was added"
        sums, self._sums = self._sums, None
        if group is not None:
            dist.all_reduce(sums, group=group)
        *terms, num_tokens = sums.tolist()
        return {name: value / num_tokens for name, value in zip(TERMS, terms, strict=True)}


class DistillMetrics(MetricsProcessor):
    """Adds this project's numbers to torchtitan's log, TensorBoard events and metrics.jsonl."""

    data_consumed: Callable[[], dict[str, float]]
    """The loader's count of tokens and epochs; the trainer sets it."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self.terms = TermSums()
        self.has_teacher = job_config.distill.objective != "ce"
        self._folder = Path(job_config.job.dump_folder)
        self._first_log = True
        self._counts_skipped = job_config.guard.non_finite == "skip"
        self._skipped: set[int] = set()

    @property
    def skipped_steps(self) -> int:
        """Steps of this run that were skipped; on the first rank those before a restart too."""
        return len(self._skipped)

    def resume(self, step: int) -> None:
        """The run goes on after this step: what was skipped up to it counts, what comes later is done again."""
        if dist.get_rank() == 0 and (self._folder / METRICS).is_file():
            self._skipped = {r["step"] for r in read_metrics(self._folder, "skipped") if r["step"] <= step}

    def log_skipped(self, step: int, report: str) -> None:
        """A step that was not finite and changed nothing; it gets a line of its own and none of a training step."""
        self.terms.drop_step()
        self._skipped.add(step)
        logger.warning(f"step {step} is skipped, {self.skipped_steps} so far: {report}")
        if dist.get_rank() == 0:
            append_metrics(self._folder, {"kind": "skipped", "step": step, "report": report})

    def should_log(self, step: int) -> bool:
        """As configured, and always the first step of this process: it shows whether the teacher is the right one."""
        return step not in self._skipped and (self._first_log or super().should_log(step))

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Called by torchtitan's loop on every rank at a step that is logged."""
        extra = dict(extra_metrics or {})
        # Every rank of a context-parallel group counted the tokens of the whole row, and its loss is that of its part.
        extra["n_tokens_seen"] = extra["n_tokens_seen"] / self.parallel_dims.cp
        global_max_loss *= self.parallel_dims.cp
        mesh = self.parallel_dims.get_optional_mesh("loss")
        terms = self.terms.reduce(None if mesh is None else mesh.get_group())
        if not self.has_teacher:
            terms = {"ce": terms["ce"]}
        extra |= {f"distill/{name}": value for name, value in terms.items()}
        extra |= self.data_consumed()
        if self._counts_skipped:
            extra["skipped_steps"] = self.skipped_steps
        tokens_per_second = self._tokens_per_second()
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)
        if self.has_teacher:  # else the loss, which torchtitan's line has, is all there is
            summary = "  ".join(f"{name}: {value:.4f}" for name, value in terms.items())
            logger.info(f"step: {step:2}  {summary}  tokens/s: {tokens_per_second:,.0f}")
            if self._first_log:
                self._report_teacher(terms["teacher_ce"])
        self._first_log = False
        if dist.get_rank() == 0:
            record = {"loss": global_avg_loss, "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
            append_metrics(self._folder, {"kind": "train", "step": step, **record, **extra})

    def log_held_out(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Validation numbers of all ranks (already reduced); their time does not count as training's."""
        self.time_last_log += seconds
        self.logger.log({f"validation_metrics/{name}": value for name, value in metrics.items()}, step)
        logger.info(f"validate step: {step:2}  " + "  ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))
        if dist.get_rank() == 0:
            append_metrics(self._folder, {"kind": "validation", "step": step, **metrics})

    def log_evaluation(self, name: str, step: int, scores: Mapping[str, float], seconds: float) -> None:
        """Numbers of an evaluation, the same on every rank; their time does not count as training's."""
        self.time_last_log += seconds
        self.logger.log({f"{name}/{key}": value for key, value in scores.items()}, step)
        said = "  ".join(f"{key}: {value:.2f}" for key, value in scores.items())
        logger.info(f"{name} step: {step:2}  {said}  ({seconds:.1f} s)")
        if dist.get_rank() == 0:
            append_metrics(self._folder, {"kind": name, "step": step, **scores})

    def _tokens_per_second(self) -> float:
        """Of the whole job, since the last log."""
        elapsed = time.perf_counter() - self.time_last_log
        batch_ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        return self.ntokens_since_last_log * batch_ranks / elapsed

    def _report_teacher(self, cross_entropy: float) -> None:
        """A wrong tokenizer or wrong weights show in the very first number."""
        perplexity = torch.tensor(cross_entropy).exp().item()
        logger.info(f"teacher perplexity on the first batch: {perplexity:,.2f}")


def build_metrics(job_config: JobConfig, parallel_dims: ParallelDims, model_args: Any = None) -> DistillMetrics:
    """torchtitan's hook."""
    return DistillMetrics(job_config, parallel_dims)
