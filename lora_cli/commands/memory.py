"""How much memory a run will take, from shapes alone, before a weight is read.

The step of the largest micro-batch is rehearsed on the meta device (``training/rehearsal.py``); what lives all
the time is counted from the parameters; what the process holds is asked of the system.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.commands.kernels import Attention, Sizes, count_kernels
from lora_cli.commands.plan import Plan
from lora_cli.commands.trainable import prepare, quantize_base
from lora_cli.data.batches import StepPlan, collate, evaluation_rows, tokens_of
from lora_cli.data.encoding import Example
from lora_cli.device import KERNELS_KEPT, available_bytes, process_bytes
from lora_cli.distributed import World
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.network import Network
from lora_cli.fusion.outline import outline_batch, outline_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.models import empty_model
from lora_cli.ops.cross_entropy import positions_at_a_time, wide_positions
from lora_cli.ops.products import onednn_multiplies
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight
from lora_cli.ops.tiles import forget_tilings, tiling_of
from lora_cli.recipe.rules.facts import is_quantized
from lora_cli.tasks import TASKS
from lora_cli.training.evaluation import evaluation_size
from lora_cli.training.optimizer import ALIGNMENT
from lora_cli.training.rehearsal import StepBytes, guess_step, rehearse_evaluation, rehearse_step

# Measured, not derived, on the CPU (glibc): what the libraries take when their first products run, and what stands
# free between tensors of different sizes, as a share of what is alive. Recomputing layers in the backward
# pass scatters what is kept among what is not, and about doubles the place it takes.
WAKING_BYTES = 80 * 10**6
HEAP_SHARE, HEAP_SHARE_CHECKPOINTING = 0.2, 1.0
# Of a product's size that oneDNN has met: its kernel, and what it leaves unusable around it. More where more sizes come
# than are kept, and every new one takes an old one's place.
KERNEL_BYTES, KERNEL_BYTES_IN_TURN = 650_000, 800_000
MARGIN = 0.1  # of the limit, left free: other programs and an inexact plan

BY_LOOKS = "how the model is run is judged by the looks of its modules"
BY_SIZES = "this model cannot be rehearsed without values: activations are guessed from the sizes of its layers"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``total`` is the expected peak of `lora train`: of the process, or of the GPU."""

    process: int  # interpreter, libraries, tokenizer and rows; 0 on a GPU
    weights: int  # those that stay frozen; with fsdp this process's part of them, on the CPU beside the mapped files
    adapters: int  # all that is trained, in float32
    gradients: int
    optimizer: int  # two moments
    activations: int  # kept for the backward pass
    logits: int  # in flight at one time
    temporaries: int  # what else is alive when most is
    gathered: int  # with fsdp, layers that are whole while they run: one, and the next one on its way
    cached: int  # states that frozen layers gave, kept in this process
    heap: int  # what the C library holds besides, and the kernels of products
    loading: int  # totals of the other phases
    evaluation: int
    saving: int
    rows: int  # of the largest micro-batch
    tokens: int  # of it, padding included
    limit: int | None  # what this process may take in all
    estimated: str  # what is no count

    @property
    def training(self) -> int:
        step = self.activations + self.logits + self.temporaries + self.gathered
        return self.resident + step + self.heap

    @property
    def resident(self) -> int:
        """What is there in every step and between them."""
        return self.process + self.weights + self.adapters + self.gradients + self.optimizer + self.cached

    @property
    def total(self) -> int:
        return max(self.training, self.loading, self.evaluation, self.saving)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"training": self.training, "total": self.total, "fits": self.fits}


class MemoryPlanner:
    """Plans for one run; several sizes of its micro-batch can be asked for."""

    def __init__(self, plan: Plan, *, remote_code: bool = False, sharing: int = 1, running: int = 1) -> None:
        """``sharing`` processes have the machine's memory together; so many of them have taken their part already."""
        self.plan, recipe = plan, plan.recipe
        self.process = process_bytes() if plan.device.type != "cuda" else 0
        attention = recipe.model.attn_implementation
        self.model = empty_model(
            copy.deepcopy(plan.model.config),  # it notes how attention is done
            recipe.task,
            dtype=plan.dtype,
            attn_implementation=attention,
            remote_code=remote_code,
        )
        self.read = tensor_bytes(self.model)
        folder = plan.model.folder.path if plan.model.folder else None
        self.quantized = quantize_base(self.model, recipe, folder)
        stored = getattr(plan.model.config, "dtype", None) or torch.float32
        self.stays_mapped = stored == plan.dtype  # else what is read from the files is a copy
        if self.quantized and recipe.model.quantization == "none" and stored != plan.dtype:
            self.read += self.read * stored.itemsize // plan.dtype.itemsize  # a backbone is unpacked as it is stored
        prepare(self.model, recipe, plan.model.new_ids)
        self.model.train()
        how = recipe.training.gradient_checkpointing
        if how:
            checkpoint_activations(self.model, how)
        self.rehearsed = True
        try:
            self.network = outline_network(self.model, recipe.task, plan.device, attention=attention)
        except Exception:  # as in _step
            self.rehearsed, self.network = False, Network(self.model)
        self.limit = available_bytes(plan.device)
        if self.limit is not None and plan.device.type != "cuda":
            self.limit = (self.limit + running * self.process + (sharing - 1) * self._mapped()) // sharing

    def memory(self, steps: StepPlan | None = None) -> MemoryPlan:
        """What the run takes with its steps cut like this."""
        forget_tilings()  # the run makes them, whatever this process has planned before
        steps = steps or self.plan.steps
        batch = steps.largest_micro_batch(self.plan.dataset.train, self.plan.total_steps, self.network.layout)
        step = self._step(batch)
        logits = logits_bytes(self.network, batch, self.plan)
        frozen, trained, largest = self._parameters()
        in_pieces, gathered = self._in_pieces()
        on_cpu = self.plan.device.type == "cpu"
        share = HEAP_SHARE_CHECKPOINTING if self.plan.recipe.training.gradient_checkpointing else HEAP_SHARE
        leftover = largest + WAKING_BYTES if on_cpu else 0
        peak = max(step.peak, step.kept + (logits if self.network.head is not None else 0))
        kept = frozen - in_pieces + -(-in_pieces // steps.num_processes)
        # The processes of a machine share a mapped file's pages, and each one's account holds them.
        if on_cpu and self.stays_mapped and not self.quantized:
            kept += in_pieces
        whole = frozen if on_cpu else kept  # the host reads all of the base's files
        cached = self.plan.cache.bytes_in_memory if on_cpu and self.plan.cache is not None else 0
        resident = self.process + kept + 4 * trained + cached
        evaluated = self._evaluated(steps)
        evaluation = self._evaluation(evaluated)
        kernels = self._kernels(steps, evaluated) if on_cpu else 0
        around = leftover + (int(HEAP_SHARE * evaluation) + kernels if on_cpu and evaluated else 0)
        return MemoryPlan(
            process=self.process,
            weights=kept,
            adapters=trained,
            gradients=trained,
            optimizer=2 * trained,
            activations=step.kept,
            logits=min(logits, peak - step.kept) if self.network.head is None else logits,
            temporaries=max(0, peak - step.kept - logits),
            gathered=gathered,
            cached=cached,
            heap=leftover + int(share * peak) + kernels if on_cpu else 0,
            loading=self.process + self._loading(whole + trained, on_cpu) + (leftover if on_cpu else largest),
            evaluation=resident + gathered + evaluation + around,
            saving=resident + leftover + 4 * trained,  # moments cut apart, and their bytes
            rows=len(batch),
            tokens=tokens_of(batch, self.network.layout),
            limit=self.limit,
            estimated=BY_LOOKS if self.rehearsed else BY_SIZES,
        )

    def _kernels(self, steps: StepPlan, evaluated: list[list[Example]]) -> int:
        """What oneDNN keeps for the sizes of products that the run brings, its first evaluation among it."""
        if self.plan.dtype != torch.bfloat16 and not onednn_multiplies():
            return 0
        made = self._sizes_met(steps, evaluated)
        return made * KERNEL_BYTES if made <= KERNELS_KEPT else KERNELS_KEPT * KERNEL_BYTES_IN_TURN

    def _sizes_met(self, steps: StepPlan, evaluated: list[list[Example]]) -> int:
        first, of_steps = World(0, steps.num_processes), range(self.plan.total_steps)
        trained = (rows for step in of_steps for rows in steps.micro_batches(self.plan.dataset.train, step, first))
        return count_kernels(*(self._sizes(groups) for groups in (trained, evaluated)))

    def _sizes(self, groups: Iterable[list[Example]]) -> Sizes:
        layout, config = self.network.layout, self.model.config
        heads = int(getattr(config, "num_attention_heads", 0) or 0) if layout.end_to_end else 0
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        attention = Attention(heads, kv_heads, self.plan.dtype, self._is_causal)
        vocabulary = int(getattr(config.get_text_config(), "vocab_size", 1))
        most = positions_at_a_time(vocabulary, self.plan.device.type)
        return Sizes.of((collate(rows, 0, layout) for rows in groups), attention, most)

    def _loading(self, kept: int, on_cpu: bool) -> int:
        """A base is quantized where it is read, from a dense one that is there as a whole."""
        return max(self.read, kept) if self.quantized and on_cpu else kept

    def _step(self, batch: list[Example]) -> StepBytes:
        if self.rehearsed:
            outline = outline_batch(batch, self.network.layout, self.plan.device)
            try:
                return rehearse_step(self.network, TASKS[self.plan.recipe.task], outline, self.plan.device)
            except Exception:  # whatever a model raises that asks for values: from now on it is guessed
                self.rehearsed = False
        return self._guess(batch, bool(self.plan.recipe.training.gradient_checkpointing))

    def _guess(self, rows: list[Example], checkpointing: bool) -> StepBytes:
        tokens, layout = tokens_of(rows, self.network.layout), self.network.layout
        in_tiles = layout.end_to_end and self.plan.device.type == "cpu"
        probabilities = self._probabilities(rows) if in_tiles else 0
        return guess_step(self.model, tokens, probabilities, self.plan.dtype.itemsize, checkpointing)

    def _probabilities(self, rows: list[Example]) -> int:
        """What attention keeps in each layer."""
        heads = int(getattr(self.model.config, "num_attention_heads", 0) or 1)
        query = torch.empty(1, heads, 1, dtype=self.plan.dtype, device="meta")
        sight = Sight(1.0, causal=self._is_causal)
        return tiling_of(Rows.of([len(row.input_ids) for row in rows]), query, query, sight).num_kept

    def _evaluated(self, steps: StepPlan) -> list[list[Example]]:
        """The rows of each batch of an evaluation."""
        plan, layout = self.plan, self.network.layout
        asked = plan.recipe.training.per_device_eval_batch_size
        size, tokens = evaluation_size(asked, steps, plan.dataset.train, plan.total_steps, layout)
        return list(evaluation_rows(plan.dataset.eval, size, layout, tokens))

    def _evaluation(self, evaluated: list[list[Example]]) -> int:
        if not evaluated:
            return 0
        rows = max(evaluated, key=lambda some: tokens_of(some, self.network.layout))
        if not self.rehearsed:  # what one layer keeps is about what is alive at one time
            guessed = self._guess(rows, checkpointing=False)
            return guessed.peak - guessed.kept
        outline = outline_batch(rows, self.network.layout, self.plan.device)
        return rehearse_evaluation(self.network, TASKS[self.plan.recipe.task], outline, self.plan.device)

    @property
    def _is_causal(self) -> bool:
        return self.plan.recipe.task == "causal_lm" or hasattr(self.model, "score")

    def _mapped(self) -> int:
        """Bytes of weights whose pages are the files' own: the processes of a machine have them once together."""
        if self.plan.device.type != "cpu" or not self.stays_mapped or self.quantized:
            return 0
        return sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)

    def _in_pieces(self) -> tuple[int, int]:
        """Bytes of the frozen weights that the processes hold in pieces, and of those that are whole at one time."""
        if not self.plan.is_sharded:
            return 0, 0
        layers = [
            sum(p.nbytes for p in layer.parameters() if not p.requires_grad)
            for layer in repeated_layers(self.model).values()
        ]
        return sum(layers), 2 * max(layers)

    def _parameters(self) -> tuple[int, int, int]:
        """Bytes of the frozen ones with buffers, of the trained ones in their vector, and what checking the
        largest for finite values takes: its magnitudes and a byte each."""
        parameters = list(self.model.parameters())
        frozen = sum(p.nbytes for p in parameters if not p.requires_grad) + sum(b.nbytes for b in self.model.buffers())
        trained = sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT * 4 for p in parameters if p.requires_grad)
        return frozen, trained, max(p.nbytes + p.numel() for p in parameters)


def tensor_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def logits_bytes(network: Network, batch: list[Example], plan: Plan) -> int:
    """Logits alive at one time: a chunk in the model's dtype and some of it in float32, or all with their gradient.

    Where they are float32 already, the chunk is turned into its own gradient in place.
    """
    output = network.model.get_output_embeddings()
    if plan.recipe.task != "causal_lm" or output is None:
        return 0
    vocabulary, size = output.weight.shape[0], plan.dtype.itemsize
    positions = sum(example.num_targets for example in batch)
    if network.head is None:
        return positions * vocabulary * (size + (4 if size < 4 else 0) + 4)
    chunk, widened = (limit(vocabulary, plan.device.type) for limit in (positions_at_a_time, wide_positions))
    return vocabulary * (min(chunk, positions) * size + (min(widened, positions) * 4 if size < 4 else 0))


def _would_pay_packed(memory: MemoryPlan, plan: Plan) -> bool:
    """Whether the frozen weights are most of it, on a device that never sees them dense."""
    recipe = plan.recipe
    packable = recipe.method == "lora" and not is_quantized(recipe)
    return packable and plan.device.type == "cuda" and memory.weights > memory.total / 2


def memory_note(memory: MemoryPlan, plan: Plan) -> str | None:
    """What to change where it will not fit; None where it will."""
    if memory.fits or memory.limit is None:
        return None
    training, cures = plan.recipe.training, []
    if memory.activations + memory.temporaries > memory.weights and memory.rows > 1:
        cures.append("training.per_device_train_batch_size (and raise gradient_accumulation_steps)")
    if plan.recipe.dataset.max_length > 128:
        cures.append("dataset.max_length")
    text = f"lower {' or '.join(cures)}" if cures else ""
    if not training.gradient_checkpointing and plan.model.skeleton.supports_gradient_checkpointing:
        text += f"{', ' if text else ''}set training.gradient_checkpointing: true"
    if _would_pay_packed(memory, plan):
        text += f"{', ' if text else ''}set model.quantization: nf4"
    if plan.dtype == torch.float32 and plan.recipe.method != "full":
        text += f"{', or ' if text else ''}model.dtype: bfloat16"
    planned, there = memory.total / 1e9, memory.limit / 1e9
    return f"memory: {planned:,.1f} GB are planned and {there:,.1f} GB are there; {text or 'use a smaller model'}"
