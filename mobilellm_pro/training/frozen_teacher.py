"""The teacher beside a student: built and loaded in its own layout, run on the student's rows, without gradients.

Its ranks are the student's, its groups are not (`teacher_layout.py`), so rows are exchanged before and after it runs:

- tensor groups larger than the student's hold different rows: they gather all of these, run them together, and every
  rank keeps its own;
- tensor groups smaller than the student's hold equal rows: each group runs some, and they gather the hidden states.

Tokens are bytes and hidden states kilobytes, so the first is nearly free and the second costs less than running twice.
It is no part of `model_parts`: neither the optimizer nor a checkpoint ever sees it.

Shapes: B rows, S tokens of a row on this rank, K tokens of a whole row, D teacher width, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype

from mobilellm_pro.config.job_config import Teacher as TeacherConfig
from mobilellm_pro.model.attention_mask import DocumentMask, PackedRows
from mobilellm_pro.model.checkpoint import architecture, find_checkpoint
from mobilellm_pro.model.shard_loading import load_tensors
from mobilellm_pro.model.student import Student, StudentArgs
from mobilellm_pro.model.teacher import WHOLE, Split, Teacher, TeacherArgs, TeacherLayer
from mobilellm_pro.model.teacher_layout import TeacherLayout, teacher_layout, teacher_slices
from mobilellm_pro.model.teacher_quantization import quantize_layer
from mobilellm_pro.model.teacher_sharding import (
    TeacherGroups,
    compile_layers,
    connect,
    forget_forward,
    make_groups,
    shard_frozen,
)
from mobilellm_pro.model.tensor_files import Slices

HEAD = "lm_head.weight"


class TeacherHead(nn.Module):
    """The output head alone, for hidden states that come from elsewhere."""

    def __init__(self, args: TeacherArgs | StudentArgs):
        super().__init__()
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)


class PendingHidden:
    """Hidden states that may still be computed on a stream of their own."""

    def __init__(self, hidden: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._hidden = hidden
        self._done = None if stream is None else stream.record_event()

    def wait(self) -> Tensor:
        """[B, S, D], ordered before what the current stream does next."""
        if self._done is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            self._hidden.record_stream(current)  # its memory belongs to the other stream's pool
        return self._hidden


class FrozenTeacher:
    """Runs the teacher on this rank's rows, whatever its layout.

    Args:
        model: the teacher or its head alone, loaded, sharded and in evaluation mode.
        args: architecture of the whole model.
        groups: this rank's process groups.
        mask: whether the documents of a row are invisible to each other.
        resident: weights stay gathered.
    """

    def __init__(
        self,
        model: Teacher | Student | TeacherHead,
        args: TeacherArgs | StudentArgs,
        groups: TeacherGroups,
        *,
        mask: DocumentMask,
        resident: bool = False,
    ) -> None:
        self.model = model
        self.args = args
        self.mask: DocumentMask = mask
        self.resident = resident
        self._rows = RowExchange(groups)
        self._stream: torch.cuda.Stream | None = None

    @property
    def head(self) -> Tensor:
        """[V, D], gathered until `release`."""
        if isinstance(self.model, FSDPModule):
            self.model.unshard()
        model = self.model
        weight = model.embed_tokens.weight if isinstance(model, Student) else model.lm_head.weight
        if self._stream is not None:
            weight.record_stream(torch.cuda.current_stream())
        return weight

    @torch.no_grad()
    def hidden(self, tokens: Tensor, rows: PackedRows) -> Tensor:
        """Last hidden states of this rank's tokens; all ranks must call it together.

        Args:
            tokens: [B, S] ids of this rank's part of the rows.
            rows: their documents, positions and masks.

        Returns:
            [B, S, D], after the last norm.
        """
        assert not isinstance(self.model, TeacherHead), "only the head was loaded"
        num_rows = tokens.shape[0]
        tokens, document_ids = self._rows.before(tokens, rows.document_ids)
        if document_ids is not rows.document_ids:  # else the student has the same masks, where its settings are
            rows = PackedRows(document_ids, rows.numbering, rows.shard)
        masks = rows.masks(self.model.spans(), self.mask)
        hidden = self.model(tokens, rows.positions, masks, head=lambda hidden, weight: hidden)
        forget_forward(self.model)
        return self._rows.after(hidden, num_rows)

    def start(self, tokens: Tensor, rows: PackedRows) -> PendingHidden:
        """`hidden` beside what the current stream does next, on an accelerator; elsewhere at once."""
        if tokens.device.type != "cuda":
            return PendingHidden(self.hidden(tokens, rows), None)
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        # After the step's earlier work: what it released may be reused, what it made may be read.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor in (tokens, rows.document_ids):
                tensor.record_stream(self._stream)
            # Positions and masks of its own: those of the main stream may be gone before they are read here.
            hidden = self.hidden(tokens, PackedRows(rows.document_ids, rows.numbering, rows.shard))
        return PendingHidden(hidden, self._stream)

    def release(self) -> None:
        """Drops what was gathered for the loss, unless the weights are resident."""
        if isinstance(self.model, FSDPModule) and not self.resident:
            self.model.reshard()

    def flops_per_token(self, seq_len: int) -> int:
        """Of a forward pass of the whole model, over all ranks."""
        if isinstance(self.model, TeacherHead):
            return 2 * self.args.vocab_size * self.args.hidden_size
        with torch.device("meta"):
            whole = _model(self.args)
        return self.args.get_nparams_and_flops(whole, seq_len)[1] // 3


class RowExchange:
    """Rows of the student's ranks to the teacher's, and hidden states back."""

    def __init__(self, groups: TeacherGroups) -> None:
        self._gather, self._spread = groups.gather, groups.spread

    def before(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The rows that this rank's teacher runs, of tensors [B, ...] that belong together."""
        if self._gather is not None:
            return tuple(_all_gather(tensor, self._gather) for tensor in rows)
        if self._spread is not None:
            num_rows = rows[0].shape[0]
            count = -(-num_rows // dist.get_world_size(self._spread))
            first = dist.get_rank(self._spread) * count
            # Groups run equally many rows: where they do not divide, the last one is run again.
            index = torch.arange(first, first + count, device=rows[0].device).clamp(max=num_rows - 1)
            return tuple(tensor[index] for tensor in rows)
        return rows

    def after(self, hidden: Tensor, num_rows: int) -> Tensor:
        """This rank's own rows again, [B, S, D]."""
        if self._gather is not None:
            first = dist.get_rank(self._gather) * num_rows
            return hidden[first : first + num_rows].clone()  # the others' rows are freed
        if self._spread is not None:
            return _all_gather(hidden, self._spread)[:num_rows]
        return hidden


# The newer name; torch 2.11 has the older one only.
_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, ...] -> [ranks · B, ...]."""
    gathered = tensor.new_empty(dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:])
    _gather_single(gathered, tensor.contiguous(), group=group)
    return gathered


def load_frozen_teacher(
    config: TeacherConfig,
    teacher_mask: DocumentMask,
    parallel_dims: ParallelDims,
    device: torch.device,
    *,
    head_only: bool = False,
) -> FrozenTeacher:
    """Builds the teacher in the layout of [teacher.parallelism]; every rank must call it.

    It is a Llama 4 of a Hugging Face folder, or, for self-distillation, a student, of such a folder or a checkpoint.

    Args:
        config: the section [teacher].
        teacher_mask: `attention.teacher_mask`.
        parallel_dims: the student's degrees.
        device: where to put it.
        head_only: load nothing but the output head; `hidden` cannot be called.

    Raises:
        ValueError: the folder is no such model, or its tensors do not fit its config.json.
    """
    args = architecture(config.path)
    layout = teacher_layout(
        config.parallelism,
        world_size=parallel_dims.world_size,
        context=parallel_dims.cp,
        tensor=parallel_dims.tp,
    )
    groups = make_groups(layout)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.dtype]):
        model = TeacherHead(args) if head_only else _model(args, layout.split)
    _place(model, groups, config)
    slices = teacher_slices(args, layout, dist.get_rank()) if isinstance(args, TeacherArgs) and not head_only else {}
    if isinstance(model, Teacher) and config.quantization == "float8":
        _load_quantized(model, config.path, slices, device)
    elif not (Path(config.path) / "config.json").is_file():
        model.to_empty(device=device)
        dcp.load(model.state_dict(), checkpoint_id=str(find_checkpoint(config.path).step))
    else:
        model.to_empty(device=device)
        load_tensors(model, config.path, slices=slices, names={HEAD} if head_only else None, show_progress=True)
    _log(model, layout, config.path)
    return FrozenTeacher(model.eval(), args, groups, mask=teacher_mask, resident=config.parallelism.resident)


def _model(args: TeacherArgs | StudentArgs, split: Split = WHOLE) -> Teacher | Student:
    return Student(args) if isinstance(args, StudentArgs) else Teacher(args, split)


def _place(model: Teacher | Student | TeacherHead, groups: TeacherGroups, config: TeacherConfig) -> None:
    if not isinstance(model, TeacherHead):
        connect(model, groups)
        if config.compile:
            compile_layers(model)
    shard_frozen(model, groups, resident=config.parallelism.resident)


def _load_quantized(model: Teacher, path: str, slices: Mapping[str, Slices], device: torch.device) -> None:
    """Layer by layer, so that one layer at a time has its full size."""
    num_layers = len(model.layers)
    for index, (name, layer) in enumerate(model.layers.items()):
        assert isinstance(layer, TeacherLayer)
        layer.to_empty(device=device)
        names = {f"layers.{name}.{parameter}" for parameter, _ in layer.named_parameters()}
        load_tensors(model, path, slices=slices, names=names)
        quantize_layer(layer)
        logger.info(f"teacher: layer {index + 1} of {num_layers} is loaded and in float8")
    rest = {name for name, _ in model.named_parameters() if not name.startswith("layers.")}
    for module in (model.embed_tokens, model.norm, model.lm_head):
        module.to_empty(device=device)
    load_tensors(model, path, names=rest)


def _log(model: nn.Module, layout: TeacherLayout, path: str) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    degrees = f"tensor {layout.tensor}, expert {layout.expert}, shard {layout.shard}"
    logger.info(f"teacher: {num_parameters:,} parameters in a copy on this rank ({degrees}) from {path}")
