"""torchtitan's Trainer with a frozen teacher beside the student.

The loop, the optimizer, the schedules and the checkpoints are torchtitan's. What changes is one micro-batch: masks and
positions of both models, the teacher's last hidden states without gradients, and a loss that multiplies hidden states
by both heads a chunk of tokens at a time, inside the student's forward, where its embedding is gathered.

Shapes: B rows, S tokens of a row on this rank, D student width, E teacher width, V vocabulary (or this rank's slice).
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype
from torchtitan.train import Trainer

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.config.job_config import Teacher as TeacherConfig
from mobilellm_pro.losses import DistillationLoss, linear_distillation, raise_if_not_finite
from mobilellm_pro.model.attention import build_masks, document_positions
from mobilellm_pro.model.hugging_face import load_tensors, read_config, teacher_args
from mobilellm_pro.model.parallelize import shard_frozen
from mobilellm_pro.model.teacher import Teacher
from mobilellm_pro.training.metrics import DistillMetrics


class DistillTrainer(Trainer):
    """Trains `model.name` on the objective of [distill]."""

    job_config: JobConfig
    metrics_processor: DistillMetrics
    teacher: Teacher | None = None

    def __init__(self, job_config: JobConfig):
        super().__init__(job_config)
        distill = job_config.distill
        self.kl_weight, self.ce_weight = {
            "kl": (1.0, 0.0),
            "ce": (0.0, 1.0),
            "weighted": (distill.kl_weight, distill.ce_weight),
        }[distill.objective]
        if distill.objective != "ce":
            self.teacher = load_frozen_teacher(job_config.teacher, self.parallel_dims, self.device)
            _, flops = self.teacher.model_args.get_nparams_and_flops(self.teacher, job_config.training.seq_len)
            self.metrics_processor.num_flops_per_token += flops // 3  # forward only
        self.metrics_processor.data_consumed = self.dataloader.consumed
        self.last_step = self.dataloader.last_step(job_config.training.steps)
        if job_config.validation.enable:
            self.validator.evaluate = self.distillation_terms

    def should_continue_training(self) -> bool:
        """Until the last step, or until a corpus has been read as often as it may."""
        return self.step < self.last_step

    def train(self) -> None:
        """torchtitan's loop; a run that the data end before `training.steps` is saved and validated like any other."""
        super().train()
        if self.step < self.job_config.training.steps:
            logger.warning(f"stopped after step {self.step}: the next would pass max_epochs of a corpus")
            self.checkpointer.save(self.step, last_step=True)
            if self.job_config.validation.enable and not self.validator.should_validate(self.step):
                self.validator.validate(self.model_parts, self.step)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """Masks and positions from the whole rows, then this rank's part of the rows."""
        tokens, document_ids = input_dict["input"], input_dict["document_ids"]
        positions = document_positions(document_ids)
        if self.job_config.attention.positions == "continue":
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        start, length = 0, tokens.shape[1]
        if self.parallel_dims.cp_enabled:
            length //= self.parallel_dims.cp
            start = self.parallel_dims.get_mesh("cp").get_local_rank() * length
        masks = {}
        for model, mask in (
            (self.model_parts[0], self.job_config.attention.student_mask),
            (self.teacher, self.job_config.attention.teacher_mask),
        ):
            if model is not None:
                own_document = document_ids if mask == "block_causal" else None
                masks[model] = build_masks(
                    model.spans(), positions, own_document, query_start=start, num_queries=length
                )
        part = slice(start, start + length)
        extra = {
            "positions": positions[:, part],
            "masks": masks[self.model_parts[0]],
            "teacher_masks": masks.get(self.teacher),
        }
        return tokens[:, part], labels[:, part], {}, extra

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch; returns this rank's sum of losses over the global number of valid tokens."""
        terms, local_labels = self.distillation_terms(input_dict, labels)
        loss = terms.loss / global_valid_tokens
        loss.backward()
        self.metrics_processor.terms.add(terms, (local_labels != IGNORE_INDEX).sum())
        return loss

    def distillation_terms(self, input_dict: dict[str, Tensor], labels: Tensor) -> tuple[DistillationLoss, Tensor]:
        """Runs both models on a micro-batch: (sums over this rank's tokens, this rank's labels [B, S])."""
        tokens, labels, _, extra = self.post_dataloading_process(input_dict, labels)
        teacher_masks = extra.pop("teacher_masks")
        teacher_hidden = teacher_head = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden, teacher_head = self.teacher(
                    tokens, extra["positions"], teacher_masks, head=lambda hidden, weight: (hidden, weight)
                )
        head = partial(self._loss, labels=labels, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
        with self.maybe_enable_amp:
            terms = self.model_parts[0](tokens, **extra, head=head)
        if isinstance(self.teacher, FSDPModule):
            self.teacher.reshard()
        return terms, labels

    def _loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
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
        with torch.autocast(self.device.type, enabled=False):
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
        tensors: dict[str, Tensor | None] = {"student_hidden": hidden, "student_head": weight}
        tensors |= {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
        raise_if_not_finite(terms.loss, step=self.step, rank=dist.get_rank(), **tensors)
        return terms


def load_frozen_teacher(config: TeacherConfig, parallel_dims: ParallelDims, device: torch.device) -> Teacher:
    """Builds the teacher of a Hugging Face folder, sharded over all ranks, without gradients.

    It is no part of `model_parts`: neither the optimizer nor a checkpoint ever sees it.

    Raises:
        ValueError: the folder is no Llama 4 text model, or its tensors do not fit its config.json.
    """
    args = teacher_args(read_config(config.path), config.path)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.dtype]):
        teacher = Teacher(args)
    mesh = parallel_dims.world_mesh if parallel_dims.world_size > 1 else None
    shard_frozen(teacher, mesh, parallel_dims.get_optional_mesh("cp"))
    teacher.to_empty(device=device)
    load_tensors(teacher, config.path)
    num_parameters = sum(parameter.numel() for parameter in teacher.parameters())
    logger.info(f"teacher: {num_parameters:,} parameters from {config.path}")
    return teacher.eval()
