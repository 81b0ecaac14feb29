"""Quantization-aware training as torchtitan's model converter "qat", which [quantization] sets up."""

from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from mobilellm_pro.config.job_config import JobConfig
from mobilellm_pro.model.quantized_modules import is_range, quantize_modules
from mobilellm_pro.model.registry import configured_quantization


class QatConverter:
    """Puts quantized modules into the student before it is put on its mesh; nothing is done after a step."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        self._quantization = configured_quantization(job_config)

    def convert(self, model: nn.Module) -> None:
        """Changes the model, which is on the meta device, in place."""
        assert self._quantization is not None, "the configuration's checks ask for a scheme"
        quantize_modules(model, self._quantization)
        ranges = sum(parameter.numel() for name, parameter in model.named_parameters() if is_range(name))
        logger.info(f"quantized while it trains: {self._quantization.name}, {ranges:,} learned ranges")

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Called after every step."""
