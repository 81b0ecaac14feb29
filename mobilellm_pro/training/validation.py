"""Validation on held-out documents: cross entropy, KL and bits per byte.

torchtitan's stock validator multiplies the loss by the context-parallel degree; this one adds up sums over tokens and
bytes on every rank's part of the rows and divides once at the end, so every layout gives the same numbers. Bits per
byte (total nats / ln 2 / UTF-8 bytes of the predicted tokens) compares models whatever their tokenizers.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.data.tokenizer import Tokenizer
from mobilellm_pro.losses import DistillationLoss
from mobilellm_pro.training.loader import MixtureLoader, open_mixture
from mobilellm_pro.training.metrics import TERMS, DistillMetrics

Evaluate = Callable[[dict[str, Tensor], Tensor], tuple[DistillationLoss, Tensor]]
"""(input_dict, labels) -> (sums over this rank's tokens, this rank's labels)."""


class HeldOutValidator(BaseValidator):
    """Runs `validation.steps` batches of the held-out split every `validation.freq` steps and after the last step."""

    evaluate: Evaluate
    """How to run a batch; the trainer, which owns the teacher and the layout, sets it."""

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Tokenizer,
        parallel_dims: ParallelDims,
        metrics_processor: DistillMetrics,
        **unused: Any,
    ):
        """Takes what torchtitan passes to a validator; its loss and its pipeline stages have no use here."""
        super().__init__(job_config)
        self.parallel_dims = parallel_dims
        self.metrics_processor = metrics_processor
        self.has_teacher = job_config.distill.objective != "ce"
        settings = job_config.validation
        mixture = open_mixture(job_config.data, "valid", settings.seq_len, tokenizer.fingerprint, check_index=False)
        self.loader = MixtureLoader(mixture, settings.local_batch_size, dp_rank, dp_world_size)
        self._token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device_type)

    def should_validate(self, step: int) -> bool:
        """Every `validation.freq` steps and after the last one."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Logs nats a token and bits per byte over the whole held-out set of the run; always the same rows.

        Raises:
            FloatingPointError: on all ranks, where a loss is not finite.
        """
        start = time.perf_counter()
        for model in model_parts:
            model.eval()
        sums = torch.zeros(len(TERMS) + 2, dtype=torch.float64, device=device_type)
        self.loader.next_sequence = 0
        rows = iter(self.loader)
        for _ in range(self.job_config.validation.steps):
            input_dict, labels = next(rows)
            input_dict = {key: tensor.to(device_type) for key, tensor in input_dict.items()}
            sums += self._batch_sums(input_dict, labels.to(device_type))
        for model in model_parts:
            if isinstance(model, FSDPModule):
                model.reshard()  # without a backward pass nothing else does
            model.train()
        mesh = self.parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            dist.all_reduce(sums, group=mesh.get_group())
        summary = self._summary(sums.tolist())
        bad = [f"{name} is {value}" for name, value in summary.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"on held-out documents after step {step}: {', '.join(bad)}")
        self.metrics_processor.log_held_out(step, summary, time.perf_counter() - start)

    def _batch_sums(self, input_dict: dict[str, Tensor], labels: Tensor) -> Tensor:
        terms, local_labels = self.evaluate(input_dict, labels)
        counted = local_labels[local_labels != IGNORE_INDEX]
        values = [getattr(terms, name).double() for name in TERMS]
        values += [torch.tensor(float(counted.numel())), self._token_bytes[counted].sum().double()]
        return torch.stack([value.to(device_type).reshape(()) for value in values])

    def _summary(self, sums: list[float]) -> dict[str, float]:
        *terms, num_tokens, num_bytes = sums
        by_name = dict(zip(TERMS, terms, strict=True))
        bits = 1 / (math.log(2) * num_bytes)
        summary = {"bits_per_byte": by_name["ce"] * bits, "ce": by_name["ce"] / num_tokens, "tokens": num_tokens}
        if self.has_teacher:
            summary["kl"] = by_name["kl"] / num_tokens
            summary["teacher_bits_per_byte"] = by_name["teacher_ce"] * bits
        return summary
