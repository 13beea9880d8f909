"""The model card that goes with an adapter: what it is, how it was made, how well it did."""

from __future__ import annotations

from lora_cli.commands.plan import Plan
from lora_cli.commands.summary import Summary


def model_card(plan: Plan, summary: Summary, base: str | None = None) -> str:
    """Markdown with the header that the hub reads, the figures, and how to load the folder over its ``base``."""
    recipe = plan.recipe
    rows = "\n".join(
        f"| {name} | {summary.before.get(name, float('nan')):.4f} | {value:.4f} |"
        for name, value in summary.after.items()
    )
    table = f"\n| held-out rows | before | after |\n|---|---|---|\n{rows}\n" if summary.after else ""
    return _CARD.format(
        header=_header(plan),
        name=recipe.model.name,
        what=_WHAT[recipe.method],
        data=", ".join(plan.dataset.sources),
        train_rows=summary.rows["train"],
        eval_rows=summary.rows["eval"],
        steps=summary.steps,
        trainable=f"{int(summary.parameters['trainable']):,}",
        percent=f"{summary.parameters['percent']:.4f}",
        table=table,
        quantized=_quantized(plan, summary),
        load=_load(plan, base),
        versions=", ".join(f"{name} {version}" for name, version in summary.versions.items()),
    )


_WHAT = {"lora": "A LoRA adapter for", "full": "A full fine-tune of", "head": "A trained head on"}

_CARD = """{header}# {name}, fine-tuned

{what} `{name}`: {train_rows} rows of {data}, {steps} optimizer steps, {trainable} trained parameters ({percent} %);
{eval_rows} rows were held out.{quantized}
{table}
{load}
Made with {versions}.
"""


def _header(plan: Plan) -> str:
    if plan.recipe.method != "lora" or plan.recipe.model.path is None:
        return ""
    return f"---\nbase_model: {plan.recipe.model.path}\nlibrary_name: peft\ntags: [lora]\n---\n\n"


def _quantized(plan: Plan, summary: Summary) -> str:
    """What the base was while the adapter was trained, where that was not the base as its files hold it."""
    kind = plan.recipe.model.quantization
    if summary.loftq is not None:
        bits = summary.loftq["bits"]
        return f" It belongs to the base quantized to {bits} bits by LoftQ (`backbone`), and to no other."
    return f" The base was quantized to {kind} while it was trained." if kind != "none" else ""


def _load(plan: Plan, base: str | None) -> str:
    if plan.recipe.method != "lora":
        return "Load it with transformers, like any model folder.\n"
    auto = {"causal_lm": "AutoModelForCausalLM", "sequence_classification": "AutoModelForSequenceClassification"}
    auto_class = auto[plan.recipe.task]
    labels = f", num_labels={len(plan.labels)}" if plan.labels else ""
    base = base or plan.recipe.model.path or "base"
    more = plan.model.vocabulary
    resize = f"base.resize_token_embeddings({more})  # its new tokens\n" if more is not None else ""
    return (
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n"
        f'base = {auto_class}.from_pretrained("{base}"{labels})\n{resize}'
        'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")\n'
        "```\n"
    )
