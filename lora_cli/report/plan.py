"""What is known before the first step, on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lora_cli.commands.autosize import is_auto
from lora_cli.commands.check import Check
from lora_cli.commands.plan import Plan
from lora_cli.data.dataset import Counts, label_counts
from lora_cli.report.console import facts, table
from lora_cli.report.grouping import group_targets
from lora_cli.report.numbers import endings, number, plural, size

SHOWN_BAD_ROWS = 5
EXCERPT_CHARACTERS = 600


def plan_facts(plan: Plan, progress: str) -> list[tuple[str, str]]:
    """The start block: name and text of each line."""
    rows = [("model", _model(plan)), ("parameters", _parameters(plan))]
    if plan.recipe.method == "lora":
        rows.append(("adapter", _adapter(plan)))
    if plan.model.saved:
        rows.append(("in full", ", ".join(plan.model.saved)))
    if tokens := plan.recipe.dataset.new_tokens:
        rows.append(("new tokens", f"{', '.join(tokens[:8])}{' ...' if len(tokens) > 8 else ''}"))
    if tables := plan.model.rows:
        rows.append(
            ("single rows", ", ".join(f"{plural(len(ids), 'token')} of {name}" for name, ids in tables.items()))
        )
    if plan.labels:
        rows.append(("labels", ", ".join(plan.labels[:12]) + (" ..." if len(plan.labels) > 12 else "")))
    rows += [("rows", _rows(plan)), ("tokens", _tokens(plan))]
    cut = plan.dataset.train_counts.truncated + plan.dataset.eval_counts.truncated
    if cut:
        limit = plan.recipe.dataset.max_length
        rows.append(("cut", f"{plural(cut, 'row')} at max_length {limit}: what stands behind it is not learned"))
    left_out = _left_out(plan.dataset.train_counts, plan.dataset.eval_counts)
    if left_out:
        rows.append(("left out", left_out))
    rows += [("step", _step(plan)), ("run", _run(plan)), ("output", f"{plan.recipe.output_dir} ({progress})")]
    return rows + [("note", note) for note in plan.notes]


def _model(plan: Plan) -> str:
    config, commit = plan.model.config, plan.model.folder.commit if plan.model.folder else None
    dtype = str(plan.dtype).removeprefix("torch.")
    if plan.recipe.model.quantization != "none":
        dtype = f"{plan.recipe.model.quantization}, computing in {dtype}"
    if plan.has_backbone:
        dtype = f"LoftQ in {plan.recipe.lora.loftq_config.loftq_bits} bits, computing in {dtype}"
    revision = f", commit {commit[:12]}" if commit else ""
    return f"{plan.recipe.model.name} ({config.model_type}, {dtype} on {plan.device.type}{revision})"


def _parameters(plan: Plan) -> str:
    counted = plan.model.counted
    return f"{counted.trainable:,} trained of {counted.total:,} ({counted.percent:.4f} %)"


def _adapter(plan: Plan) -> str:
    targets, lora = plan.model.targets, plan.recipe.lora
    ranks = sorted({target.r for target in targets})
    scales = sorted({target.scaling for target in targets})
    formula = "lora_alpha / sqrt(r)" if lora.use_rslora else "lora_alpha / r"
    if lora.init_from is not None:
        formula = f"as in {lora.init_from}"
    kind = "DoRA, " if plan.model.uses_dora else ""
    begins = "" if lora.init_lora_weights is True else f"; begins as {lora.init_lora_weights}"
    rank = ", ".join(map(str, ranks))
    scale = ", ".join(map(number, scales))
    names = endings([target.name for target in targets])
    return f"{kind}r {rank} on {plural(len(targets), 'module')} ({names}); scale {scale} ({formula}){begins}"


def _rows(plan: Plan) -> str:
    data = plan.dataset
    return (
        f"{plural(len(data.train), 'row')} to train on, {len(data.eval):,} held out; "
        f"read as {data.format} from {', '.join(data.sources)}"
    )


def _tokens(plan: Plan) -> str:
    counts = plan.dataset.train_counts
    supervised = "" if plan.labels else f", {counts.targets:,} of them supervised"
    limit = plan.recipe.dataset.max_length
    return f"{counts.tokens:,}{supervised}; longest row {counts.longest:,} (max_length {limit:,})"


def _left_out(train: Counts, held_out: Counts) -> str:
    kinds = [
        (train.skipped + held_out.skipped, "as too long"),
        (train.unsupervised + held_out.unsupervised, "without a supervised token"),
        (len(train.bad) + len(held_out.bad), "as bad"),
    ]
    text = "; ".join(f"{plural(count, 'row')} {what}" for count, what in kinds if count)
    bad = [*train.bad, *held_out.bad]
    shown = "".join(f"\n{row}" for row in bad[:SHOWN_BAD_ROWS])
    return text + shown + (f"\n... and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else "")


def _step(plan: Plan) -> str:
    training, steps = plan.recipe.training, plan.steps
    processes = f" x {steps.num_processes} processes" if steps.num_processes > 1 else ""
    if is_auto(plan):
        return f"{steps.rows_per_step} rows (micro-batch auto: as many of them as fit into memory{processes})"
    micro = steps.micro_batch_size
    if training.global_batch_size is not None:
        return f"{steps.rows_per_step} rows (global_batch_size; {micro} at most in a micro-batch{processes})"
    return f"{steps.rows_per_step} rows ({micro} in a micro-batch x {training.gradient_accumulation_steps}{processes})"


def _run(plan: Plan) -> str:
    training = plan.recipe.training
    epochs = plan.steps.epoch_of(plan.total_steps)
    return (
        f"{plural(plan.total_steps, 'step')} ({number(epochs)} epochs of {plan.steps.steps_per_epoch}); learning rate "
        f"{training.learning_rate:g}, {training.lr_scheduler_type}, {plural(plan.warmup_steps, 'step')} of warm-up"
    )


def show_check(console: Console, check: Check) -> None:
    """The start block, tokens and disk, the adapted modules, and the first row as the model sees it."""
    plan = check.plan
    facts(console, plan_facts(plan, "checked, nothing written"))
    spread = check.tokens
    rows = [("tokens a row", f"{spread.minimum:,} least, {spread.median:,} median, {spread.maximum:,} most")]
    if not plan.labels:
        spread = check.targets
        rows.append(("supervised", f"{spread.minimum:,} least, {spread.median:,} median, {spread.maximum:,} most"))
    else:
        counts = zip(plan.labels, label_counts(plan.dataset.train, len(plan.labels)), strict=True)
        rows.append(("rows a label", ", ".join(f"{label}: {count:,}" for label, count in counts)))
    rows.append(("disk", f"{size(plan.disk_bytes)} needed at most, {size(check.free_bytes)} free"))
    facts(console, rows)
    console.print()
    _show_memory(console, check)
    if plan.model.targets:
        console.print()
        _show_targets(console, plan)
    console.print()
    if plan.labels:
        example = plan.dataset.train[0]
        console.print(f"first row ({example.where}), labelled {plan.labels[example.label or 0]}:", style="bold")
        console.print("".join(piece for piece, _ in check.excerpt.pieces)[:EXCERPT_CHARACTERS], soft_wrap=True)
    else:
        _show_excerpt(console, check)


def _show_memory(console: Console, check: Check) -> None:
    """What the peak is made of, and whether it fits."""
    memory, plan = check.memory, check.plan
    trained = "adapters" if plan.recipe.method == "lora" else "trained weights"
    kept = f"kept for the backward pass: {plural(memory.rows, 'row')}, {memory.tokens:,} tokens"
    if plan.recipe.training.gradient_checkpointing:
        kept += ", recomputed by layers"
    parts = [
        ("process", memory.process, "interpreter, libraries, rows"),
        ("weights", memory.weights, "frozen; of each layer a part" if plan.is_sharded else "frozen"),
        (trained, memory.adapters, "float32"),
        ("gradients", memory.gradients, "float32"),
        ("optimizer", memory.optimizer, "two moments"),
        ("activations", memory.activations, kept),
        ("logits", memory.logits, "alive at one time"),
        ("temporaries", memory.temporaries, "what else is alive when most is"),
        ("gathered", memory.gathered, "layers that are whole while they run"),
        ("cached", memory.cached, "what frozen layers gave, of every row"),
        ("heap", memory.heap, "held by the libraries between tensors"),
    ]
    processes = plan.steps.num_processes
    whose = f"memory of each of {processes} processes" if processes > 1 else "memory"
    made = table(whose, "estimated", "", right=(1,))
    for name, count, what in parts:
        if count:
            made.add_row(name, size(count), what)
    there = "" if memory.limit is None else f"of {size(memory.limit)}; "
    made.add_row("peak", size(memory.total), f"{there}{_other_phases(check)}")
    console.print(made)
    console.print(f"estimated: {memory.estimated}", style="dim", soft_wrap=True)
    if check.memory_note:
        console.print(f"note: {check.memory_note}", style="bold", soft_wrap=True)


def _other_phases(check: Check) -> str:
    memory = check.memory
    phases = {"training": memory.training, "loading": memory.loading, "saving": memory.saving}
    if check.plan.dataset.eval:
        phases["evaluating"] = memory.evaluation
    return ", ".join(f"{name} {size(count)}" for name, count in phases.items())


def _show_targets(console: Console, plan: Plan) -> None:
    made = table("adapted module", "count", "A", "B", "scale", "parameters", right=(1, 5))
    for group in group_targets(plan.model.targets):
        target = group.target
        made.add_row(
            group.name,
            str(group.count),
            f"{target.r} x {target.in_features}",
            f"{target.out_features} x {target.r}",
            number(target.scaling),
            f"{group.count * target.numel:,}",
        )
    console.print(made)


def _show_excerpt(console: Console, check: Check) -> None:
    """The first row; what is supervised stands out by colour, or in [[ ]] where there is none."""
    text, room = Text(), EXCERPT_CHARACTERS
    for piece, supervised in check.excerpt.pieces:
        shown = piece[:room]
        room -= len(shown)
        marked = f"[[{shown}]]" if supervised and not console.is_terminal else shown
        text.append(marked, style="bold green" if supervised else "dim")
    what = "green" if console.is_terminal else "in [[ ]]"
    console.print(f"first row ({check.excerpt.where}); supervised text is {what}:", style="bold")
    console.print(text, soft_wrap=True)
    if room <= 0:
        console.print("...")
