"""Every key of a recipe: its type, its default and what it means, in one line each.

Names are those of PEFT's LoraConfig and transformers' TrainingArguments. Unknown keys are refused, values
are not coerced, and a recipe cannot be changed once it is read. What excludes what across keys stands in
``rules/``.
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_cli.recipe.types import (
    BatchSize,
    Cadence,
    CountOrFraction,
    Initialisation,
    Recomputation,
    Split,
    StringList,
    Strings,
    TextOrTexts,
    TrackerNames,
)

AUTO_ROWS = 4  # of a micro-batch by default, and where auto starts from
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]

Task = Literal["causal_lm", "sequence_classification"]
Method = Literal["lora", "full", "head"]
Format = Literal["auto", "messages", "conversations", "prompt_completion", "instruction", "text", "labelled"]
TooLong = Literal["truncate", "skip", "split", "error"]


class Section(BaseModel):
    """A mapping of the recipe: strict, closed and frozen."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        """`columns: null` means what leaving it out means, where the key holds a list or a mapping."""
        if not isinstance(values, dict):
            return values
        collections = {name for name, field in cls.model_fields.items() if field.default in ({}, [])}
        return {key: value for key, value in values.items() if value is not None or key not in collections}

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """The base model and its tokenizer."""

    path: Text | None = Field(None, description="hub id or folder of the base model; safetensors only")
    config: dict[str, Any] | None = Field(
        None, description="instead of `path`: a transformers configuration, for a random model"
    )
    revision: Text | None = Field(
        None, description="branch, tag or commit on the hub; the commit it resolves to is recorded"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it fast, else float32"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="store the frozen linear layers in 4 or 8 bits (bitsandbytes); they compute in `dtype`"
    )
    attn_implementation: Text = Field("auto", description="auto, or a name that transformers knows")
    tokenizer: Text | None = Field(
        default_factory=lambda data: data.get("path"),
        description="folder or hub id of the tokenizer (default: the model's)",
    )

    @property
    def name(self) -> str:
        return self.path or f"random {(self.config or {}).get('model_type', 'model')}"


class DatasetSection(Section):
    """The rows to train and evaluate on."""

    path: Strings = Field(description="file, folder, glob, a list of them, or a hub id")
    name: Text | None = Field(None, description="configuration of a hub data set")
    split: Split = Field("train", description="split to train on; `train[:1000]` and `train[:10%]` work")
    format: Format = Field("auto", description="how a row reads; auto decides by the columns and prints the choice")
    columns: dict[str, str] = Field(
        {}, description="our name -> their column, e.g. `{prompt: question, completion: answer}`"
    )
    chat_template: Text | None = Field(
        None, description="path of a .jinja file (default: the tokenizer's own template)"
    )
    system_prompt: Text | None = Field(None, description="system turn for rows that have none")
    train_on_prompt: bool = Field(False, description="supervise the prompt's tokens too")
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="tokens of a row at most")
    too_long: TooLong | None = Field(
        None,
        description="longer rows: truncate, skip, split (text only) or error; always reported "
        "(default: split for text, else truncate)",
    )
    new_tokens: StringList = Field(
        [], description="texts that become tokens of their own; their rows of embedding and output head are trained"
    )
    eval_path: Strings | None = Field(None, description="rows to evaluate on, as `path`")
    eval_split: Split | None = Field(None, description="split to evaluate on")
    eval_size: CountOrFraction = Field(0, description="rows (or fraction of them) kept out for evaluation")
    max_samples: PositiveInt | None = Field(None, description="use the first rows only")
    shuffle: bool = Field(True, description="new order each epoch, a pure function of seed and epoch")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be used: stop, or leave it out; named either way"
    )


class EvaSection(Section):
    """How `init_lora_weights: eva` looks at the rows."""

    rho: Annotated[float, Field(ge=1)] = Field(
        2.0, description="a layer's rank at most, as a multiple of r; 1: all keep r"
    )
    tau: Annotated[float, Field(gt=0, le=1)] = Field(
        0.99, description="stop once every direction is this alike (cosine) from one row to the next"
    )
    rows: PositiveInt = Field(256, description="training rows to look at, at most")


class LoraGaSection(Section):
    """How `init_lora_weights: lora_ga` looks at the rows."""

    rows: PositiveInt = Field(32, description="training rows to take the gradient of")


class LoftQSection(Section):
    """How `init_lora_weights: loftq` quantizes the base."""

    loftq_bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight: 2, 3, 4 (nf4) or 8 (int8)")
    loftq_iter: PositiveInt = Field(
        1, description="how often to quantize and decompose by turns; the paper uses 5, the time is proportional"
    )


class LoraSection(Section):
    """The adapter."""

    r: PositiveInt = Field(16, description="rank of the update B·A")
    lora_alpha: PositiveFloat = Field(
        default_factory=lambda data: 2.0 * data.get("r", 16),
        description="the update is scaled by lora_alpha / r (default: 2·r)",
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout on the input of A")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")
    target_modules: TextOrTexts = Field(
        "all-linear",
        description="all-linear, a glob, `re:...`, or a list of name endings, globs, `re:...`; the input embedding "
        "where it is named outright",
    )
    target_parameters: StringList = Field(
        [],
        description="the stacked experts of a mixture to adapt besides, by name ending: `experts.gate_up_proj`, "
        "`experts.down_proj`",
    )
    exclude_modules: StringList = Field([], description="never adapt these; forms as above")
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="adapt these layers only, counted from 0"
    )
    rank_pattern: dict[str, PositiveInt] = Field({}, description="name ending or `re:...` -> its own r")
    alpha_pattern: dict[str, PositiveFloat] = Field({}, description="name ending or `re:...` -> its own lora_alpha")
    modules_to_save: StringList = Field([], description="modules trained in full; a classifier head is added by itself")
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="ids of tokens whose rows of the input embedding (and of a head tied to it) are trained"
    )
    init_from: Text | None = Field(
        None,
        description="folder of an adapter (ours or PEFT's) to go on from: its modules, ranks, scales and kind are "
        "taken over",
    )
    use_dora: bool = Field(
        False, description="DoRA: train the length of each row of the weight apart from its direction"
    )
    init_lora_weights: Initialisation = Field(
        True,
        description="where A and B begin: true (A Kaiming-uniform, B zero), gaussian (A normal, B zero), orthogonal, "
        "pissa or pissa_niter_N (the weight's largest singular directions; N: fast, with N iterations), olora (its QR "
        "decomposition), eva (directions of the rows' activations), lora_ga (directions of their gradient), loftq "
        "(what quantizing the base loses)",
    )
    eva_config: EvaSection = Field(EvaSection(), description="of init_lora_weights: eva")
    lora_ga_config: LoraGaSection = Field(LoraGaSection(), description="of init_lora_weights: lora_ga")
    loftq_config: LoftQSection = Field(
        LoftQSection(), description="of init_lora_weights: loftq; for a base that is not quantized already"
    )

    @property
    def is_loftq(self) -> bool:
        """Whether the run quantizes the base itself, when it begins."""
        return self.init_lora_weights == "loftq"


class TrainingSection(Section):
    """The training run."""

    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None,
        description="LoRA+: the learning rate of every linear layer's B as a multiple of the others' (the paper: 16)",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="decoupled (AdamW); on matrices only")
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches in an optimizer step")
    global_batch_size: PositiveInt | None = Field(
        None,
        description="rows in an optimizer step over all processes, instead of gradient_accumulation_steps: "
        "the same steps on any number of processes",
    )
    per_device_train_batch_size: BatchSize = Field(
        AUTO_ROWS,
        description="rows in a micro-batch; auto: the most that fit into memory, of 4 x gradient_accumulation_steps",
    )
    per_device_eval_batch_size: BatchSize = Field(
        default_factory=lambda data: data.get("per_device_train_batch_size", 4),
        description="rows in an evaluation batch; auto: as in training (default: as in training)",
    )
    num_train_epochs: PositiveFloat = Field(3.0, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps; wins over num_train_epochs")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "cosine_with_min_lr", "wsd"] = Field(
        "linear",
        description="to 0 (linear, cosine), to 10 % (cosine_with_min_lr), constant, "
        "or wsd: constant, then linearly to 0 in the last 10 % of the run",
    )
    warmup_steps: CountOrFraction = Field(0.03, description="steps (or fraction of the run) of linear warm-up")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip the gradient's norm; null: do not")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's beta1")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="AdamW's beta2")
    adam_epsilon: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    gradient_checkpointing: Recomputation = Field(
        False,
        description="recompute activations in the backward pass, for less memory and more time: true (every layer), "
        "selective (every second), or offload (every layer, and what waits for that does so in the host's memory: CUDA "
        "only)",
    )
    cache_frozen_layers: Literal["none", "memory", "disk"] = Field(
        "none",
        description="run the layers below everything that is trained once a row instead of once an epoch, and keep "
        "what they give: none, memory, or disk (in output_dir, while the run lasts)",
    )
    torch_compile: bool = Field(
        False, description="compile element-wise work (or the layers of a model without fused forms); always on CUDA"
    )
    use_liger_kernel: bool = Field(
        False, description="take Liger's Triton kernels for element-wise work where it has one: CUDA only, an extra"
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="of several processes: ddp (each holds the whole base) or fsdp (each holds a part of the frozen "
        "layers; slower, less memory)",
    )
    use_cpu: bool = Field(False, description="stay on the CPU; otherwise cuda, then mps, then cpu")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        42, description="one seed; data order, initialisation and dropout draw from streams of their own"
    )
    logging_steps: PositiveInt = Field(10, description="steps between two lines of metrics")
    eval_steps: Cadence = Field("epoch", description="steps, fraction of the run, or epoch; also at the end")
    save_steps: Cadence = Field("epoch", description="steps, fraction of the run, or epoch; also at the end")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the adapter that is delivered; auto: bfloat16 over a bfloat16 base (half the file) where that "
        "costs less than 2 % of the updates' norm, else float32; checkpoints are always float32",
    )
    save_total_limit: Annotated[int, Field(ge=2)] = Field(
        2, description="newest checkpoints kept; the best one is kept besides"
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="stop after so many evaluations without improvement"
    )
    metric_for_best_model: Text = Field("eval_loss", description="the evaluation metric that decides the best")
    report_to: TrackerNames = Field(
        [], description="none, tensorboard, wandb, trackio, or a list; metrics.jsonl is always written"
    )


class Recipe(Section):
    """One fine-tuning run, from the model to the output folder."""

    task: Task = Field("causal_lm", description="what the model learns to do")
    method: Method = Field(
        "lora", description="lora; or the baselines: full (all weights), head (`modules_to_save` or the head)"
    )
    model: ModelSection = Field(description="the base model; a text is `model.path`")
    dataset: DatasetSection = Field(description="the rows; a text or list is `dataset.path`")
    lora: LoraSection = Field(LoraSection(), description="the adapter")
    training: TrainingSection = Field(TrainingSection(), description="the training run")
    output_dir: Text = Field(description="folder of this run; made if it is not there")

    @property
    def output_path(self) -> Path:
        return Path(os.path.expanduser(self.output_dir))  # unlike Path.expanduser, leaves an unknown ~name as it is
