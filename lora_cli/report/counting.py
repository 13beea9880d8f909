"""Parameter counts on the screen."""

from __future__ import annotations

from rich.console import Console

from lora_cli.commands.count_params import ParameterCount, TensorCount
from lora_cli.report.console import table
from lora_cli.report.grouping import grouped


def show_counts(console: Console, result: ParameterCount, *, every_tensor: bool) -> None:
    if every_tensor:
        for tensor in result.tensors:
            console.print(f"{tensor.name} {int(tensor.learnable)} {tensor.numel}", soft_wrap=True)
    else:
        _show_modules(console, result)
    console.print(str(result), style="bold")


def _show_modules(console: Console, result: ParameterCount) -> None:
    """One row a kind of module; a star marks what is trained."""
    made = table("module", "count", "shapes", "parameters", "trained", right=(1, 3, 4))
    modules: dict[str, list[TensorCount]] = {}
    for tensor in result.tensors:
        modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    kinds = grouped(modules.items(), lambda item: item[0], lambda item: tuple(map(_kind, item[1])))
    for name, members in kinds:
        tensors = members[0][1]
        total = len(members) * sum(tensor.numel for tensor in tensors)
        trained = len(members) * sum(tensor.numel for tensor in tensors if tensor.learnable)
        made.add_row(
            name or "(model)", f"{len(members)} x", _shapes(tensors), f"{total:,}", f"{trained:,}" if trained else ""
        )
    console.print(made)
    console.print("* trained", style="dim")


def _kind(tensor: TensorCount) -> tuple[str, tuple[int, ...], bool]:
    return tensor.name.rpartition(".")[2], tensor.shape, tensor.learnable


def _shapes(tensors: list[TensorCount]) -> str:
    labels = {"lora_A": "A", "lora_B": "B"}
    parts = []
    for tensor in tensors:
        name = tensor.name.rpartition(".")[2]
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        parts.append(f"{labels.get(name, name)} {shape}{'*' if tensor.learnable else ''}")
    return ", ".join(parts)
