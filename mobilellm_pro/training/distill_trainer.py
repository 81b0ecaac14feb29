"""torchtitan's Trainer with a frozen teacher beside the student.

The loop, the optimizer, the schedules and the checkpoints are torchtitan's. What changes is one micro-batch: masks and
positions of both models, the teacher's last hidden states without gradients, and a loss that multiplies hidden states
by both heads a chunk of tokens at a time, inside the student's forward, where its embedding is gathered.

Shapes: B rows, S tokens of a row on this rank, D student width, E teacher width, V vocabulary (or this rank's slice).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.losses import DistillationLoss, linear_distillation, non_finite_reports
from mobilellm_pro.model.attention_mask import PackedRows
from mobilellm_pro.model.row_shard import own_shard
from mobilellm_pro.training.bad_step import MicroBatch, non_finite_gradients
from mobilellm_pro.training.checkpoints import RunCheckpoints, run_checkpoints
from mobilellm_pro.training.frozen_teacher import FrozenTeacher, PendingHidden, load_frozen_teacher
from mobilellm_pro.training.hidden_state_cache import CacheWriter, attach_reader
from mobilellm_pro.training.metrics import DistillMetrics
from mobilellm_pro.training.online_evaluation import OnlineEvaluation, evaluate_online
from mobilellm_pro.training.step_guard import GuardedOptimizers, StepGuard
from mobilellm_pro.training.step_ranges import BACKWARD, DATA, LOSS, STUDENT, TEACHER, profiler_without_gpu, step_range
from mobilellm_pro.training.stop_request import StopRequest, in_words
from mobilellm_pro.training.stragglers import CollectiveTimeouts


class DistillTrainer(Trainer):
    """Trains `model.name` on the objective of [distill]."""

    job_config: JobConfig
    metrics_processor: DistillMetrics
    optimizers: GuardedOptimizers
    checkpointer: RunCheckpoints
    teacher: FrozenTeacher | None = None
    cache: CacheWriter | None = None

    def __init__(
        self, job_config: JobConfig, evaluations: Sequence[OnlineEvaluation] = (), stop: StopRequest | None = None
    ):
        super().__init__(job_config)
        self.checkpointer = run_checkpoints(self)
        self.evaluations = evaluations
        self._resumed_step: int | None = None
        self._timeouts = CollectiveTimeouts(job_config.comm, self.parallel_dims)
        self._guard = StepGuard(
            job_config.guard,
            metrics=self.metrics_processor,
            checkpoints=self.checkpointer,
            mixture=self.dataloader.mixture,
            stop=stop,
            search=self._search,
        )
        self.optimizers.may_step = self._guard.may_step
        self._coming: deque[dict[str, Tensor]] = deque()
        self._ahead: tuple[dict[str, Tensor], PendingHidden] | None = None
        distill = job_config.distill
        self.kl_weight, self.ce_weight = {
            "kl": (1.0, 0.0),
            "ce": (0.0, 1.0),
            "weighted": (distill.kl_weight, distill.ce_weight),
        }[distill.objective]
        if distill.objective != "ce":
            mask = job_config.attention.teacher_mask
            cached = job_config.teacher.cache == "read"
            self.teacher = load_frozen_teacher(
                job_config.teacher, mask, self.parallel_dims, self.device, head_only=cached
            )
            flops = self.teacher.flops_per_token(job_config.training.seq_len)
            self.metrics_processor.num_flops_per_token += flops
        self.metrics_processor.data_consumed = self.dataloader.consumed
        self.last_step = self.dataloader.last_step(job_config.training.steps)
        if job_config.validation.enable:
            self.validator.evaluate = partial(self.distillation_terms, split="valid")
        self._connect_cache()

    def _connect_cache(self) -> None:
        """Hidden states come with the rows, or are kept as the teacher computes them."""
        validators = [self.validator.loader] if self.job_config.validation.enable else []
        loaders = [self.dataloader, *validators]
        if self.job_config.teacher.cache == "read":
            for loader in loaders:
                attach_reader(self.job_config, loader, self.parallel_dims)
        if self.job_config.teacher.cache == "write":
            self.cache = CacheWriter(self.job_config, [loader.mixture for loader in loaders], self.parallel_dims)

    def should_continue_training(self) -> bool:
        """Until the last step, until a corpus has been read as often as it may, or until all agree to stop."""
        return self.step < self.last_step and not self._guard.stop

    @property
    def stopped(self) -> bool:
        """Whether the run ends early because somebody asked for it."""
        return bool(self._guard.stop) and self.step < self.last_step

    def train(self) -> None:
        """torchtitan's loop; a run that the data end before `training.steps` is saved and validated like any other.

        Raises:
            FloatingPointError, TimeoutError, CheckpointFailed: see `StepGuard`, `CollectiveTimeouts`, `RunCheckpoints`.
        """
        with self._timeouts.explained(), profiler_without_gpu():
            super().train()
        if self.stopped:
            then = "start again to go on" if self.checkpointer.save_to_go_on(self.step) else "checkpoints are off"
            logger.info(f"stopped after step {self.step} as {in_words(self._guard.stop)}; {then}")
            return
        if self.step < self.job_config.training.steps:
            logger.warning(f"stopped after step {self.step}: the next would pass max_epochs of a corpus")
            self.checkpointer.save(self.step, last_step=True)
            if self.job_config.validation.enable and not self.validator.should_validate(self.step):
                self.validator.validate(self.model_parts, self.step)
        if self.cache is not None:
            if self.job_config.validation.enable and not self.cache.has_kept("valid"):
                # The run was stopped between its last checkpoint and its last validation.
                self.validator.validate(self.model_parts, self.step)
            self.cache.finish()
        self._evaluate(self.step)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """torchtitan's step, after the evaluations of the one before, whose checkpoint is written by now."""
        first = self._resumed_step is None
        if first:
            self.metrics_processor.resume(self.step - 1)
        self._evaluate(self.step - 1)
        with self._guard.watching(self.step):
            super().train_step(data_iterator)
        if first:
            self._timeouts.shorten(self.step)

    def _search(self, micro_batch: MicroBatch) -> list[str]:
        """Tensors that go into the loss of a micro-batch and are not finite, or gradients where all those are."""
        self.optimizers.zero_grad()
        input_dict, found = micro_batch.input_dict, list[str]()
        if self.dataloader.hidden is not None:
            rows = (input_dict[key].tolist() for key in ("corpus", "row"))
            input_dict["teacher_hidden"] = self.dataloader.hidden.read(*rows).to(self.device)
        terms, _ = self.distillation_terms(input_dict, micro_batch.labels, found=found)
        (terms.loss / micro_batch.valid_tokens).backward()
        if not found:
            found += non_finite_gradients(self.model_parts[0])
        return found

    def _evaluate(self, step: int) -> None:
        """What is due after a step; what a run did before it was stopped is not done again."""
        due = [e for e in self.evaluations if step > 0 and (step % e.freq == 0 or step == self.last_step)]
        if self._resumed_step is None:
            self._resumed_step = step
        if due and step == self._resumed_step:
            missing = [[not evaluation.is_done(step) for evaluation in due]]
            dist.broadcast_object_list(missing, src=0)
            due = [evaluation for evaluation, is_missing in zip(due, missing[0], strict=True) if is_missing]
        evaluate_online(
            due,
            self.model_parts[0],
            step,
            dtype=TORCH_DTYPE_MAP[self.job_config.training.mixed_precision_param],
            device=self.device,
            metrics=self.metrics_processor,
        )

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's part of a checkpoint; hidden states of its steps are on disk before it is."""
        if self.cache is not None:
            self.cache.flush()
        return super().state_dict()

    def batch_generator(
        self, data_iterable: Iterable[tuple[dict[str, Tensor], Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """torchtitan's batches. It collects all micro-batches of a step first, so those to come are known."""
        batches = super().batch_generator(data_iterable)
        while True:
            with step_range(DATA):
                input_dict, labels = next(batches)
            self._coming.append(input_dict)
            yield input_dict, labels

    def _rows(self, input_dict: dict[str, Tensor]) -> PackedRows:
        """Positions and masks of a micro-batch, and which of its tokens are this rank's."""
        document_ids, attention = input_dict["document_ids"], self.job_config.attention
        shard = own_shard(document_ids.shape[1], self.parallel_dims, attention.context_layout)
        return PackedRows(document_ids, attention.positions, shard)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch; returns this rank's sum of losses over the global number of valid tokens."""
        own = self._coming.popleft()
        assert own is input_dict, "micro-batches came in another order than they were generated"
        terms, local_labels = self.distillation_terms(input_dict, labels)
        if self.job_config.teacher.overlap and self._coming:
            self._run_ahead(self._coming[0])
        loss = terms.loss / global_valid_tokens
        with step_range(BACKWARD):
            loss.backward()
        self._guard.micro_batches.append(MicroBatch(input_dict, labels, global_valid_tokens, loss.detach()))
        self.metrics_processor.terms.add(terms, (local_labels != IGNORE_INDEX).sum())
        return loss

    def _run_ahead(self, input_dict: dict[str, Tensor]) -> None:
        """Starts the teacher on the step's next micro-batch beside the backward pass of this one."""
        if self.teacher is not None:
            input_dict.update({key: tensor.to(self.device) for key, tensor in input_dict.items()})
            rows = self._rows(input_dict)
            self._ahead = input_dict, self.teacher.start(rows.shard.take(input_dict["input"]), rows)

    def _teacher_hidden(
        self, teacher: FrozenTeacher, input_dict: dict[str, Tensor], tokens: Tensor, rows: PackedRows
    ) -> Tensor:
        """[B, S, D]: as read with the rows, or of the pass that ran ahead for them, or of one that runs now."""
        if "teacher_hidden" in input_dict:
            return input_dict.pop("teacher_hidden")  # torchtitan keeps a step's micro-batches to its end
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            assert ahead[0] is input_dict, "the teacher ran ahead on another micro-batch"
            return ahead[1].wait()
        return teacher.hidden(tokens, rows)

    def distillation_terms(
        self, input_dict: dict[str, Tensor], labels: Tensor, split: str = "train", found: list[str] | None = None
    ) -> tuple[DistillationLoss, Tensor]:
        """Runs both models on a micro-batch of a split: (sums over this rank's tokens, this rank's labels [B, S]).

        With `found`, adds to it what is not finite of what goes into the loss.
        """
        rows = self._rows(input_dict)
        tokens, labels = rows.shard.take(input_dict["input"]), rows.shard.take(labels)
        teacher_hidden = teacher_head = None
        if self.teacher is not None:
            with step_range(TEACHER):
                teacher_hidden = self._teacher_hidden(self.teacher, input_dict, tokens, rows)
            teacher_head = self.teacher.head
        head = partial(self._loss, labels=labels, teacher_hidden=teacher_hidden, teacher_head=teacher_head, found=found)
        student = self.model_parts[0]
        with step_range(STUDENT), self.maybe_enable_amp:
            masks = rows.masks(student.spans(), self.job_config.attention.student_mask)
            terms = student(tokens, rows.positions, masks, head)
        if self.teacher is not None:
            self.teacher.release()
        if self.cache is not None and teacher_hidden is not None and teacher_hidden.isfinite().all():
            self.cache.keep(split, input_dict, teacher_hidden, rows.shard)
        return terms, labels

    def _loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        found: list[str] | None,
    ) -> DistillationLoss:
        """The student's head: [B, S, D] and [V, D] to the loss, on local tensors with explicit collectives.

        DTensor's own loss parallelism gives wrong gradients for KL, so under tensor parallelism every rank takes its
        rows of both heads and the loss reduces over the group itself.
        """
        group = None
        if self.parallel_dims.tp_enabled:
            mesh = self.parallel_dims.get_mesh("tp")
            group = mesh.get_group()
            assert isinstance(hidden, DTensor) and isinstance(weight, DTensor)
            hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
            weight = weight.to_local()
            if teacher_head is not None:
                teacher_head = teacher_head.chunk(mesh.size())[mesh.get_local_rank()]
        with step_range(LOSS), torch.autocast(self.device.type, enabled=False):
            if isinstance(self.maybe_enable_amp, torch.autocast):
                dtype = TORCH_DTYPE_MAP[self.job_config.training.mixed_precision_param]
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            distill = self.job_config.distill
            terms = linear_distillation(
                hidden,
                weight,
                teacher_hidden,
                teacher_head,
                labels,
                kl_weight=self.kl_weight,
                ce_weight=self.ce_weight,
                temperature=distill.temperature,
                chunk_tokens=distill.chunk_tokens,
                fp32_logits=distill.fp32_logits,
                impl=distill.impl,
                vocab_group=group,
            )
        if found is not None:
            tensors: dict[str, Tensor | None] = {"student_hidden": hidden, "student_head": weight}
            found += non_finite_reports(**tensors, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
        return terms
