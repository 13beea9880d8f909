"""The folder of a run's base: the one that the recipe names, or one that the run makes and keeps.

A random base is made when a run begins, and so is the backbone of a LoftQ run: both belong to the adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from lora_cli.adapters.backbone import SETTINGS, START, BackboneWriter, settings_for_transformers
from lora_cli.adapters.configuration import peft_config
from lora_cli.adapters.files import save_adapter
from lora_cli.adapters.injection import adapters_of
from lora_cli.adapters.layer import is_transposed
from lora_cli.adapters.targets import linear_modules
from lora_cli.commands.adapter_folder import copy_files
from lora_cli.commands.output import OutputFolder, save_tokenizer
from lora_cli.commands.plan import Plan
from lora_cli.errors import StorageError, UsageError
from lora_cli.hub import model_folder
from lora_cli.models import load_tokenizer, quiet, random_model
from lora_cli.storage import is_intact, new_folder, write_json

Tell = Callable[[int, int], None]  # how many of a backbone's layers are done, of how many


def base_folder(
    plan: Plan,
    output: OutputFolder,
    *,
    made_before: bool,
    tell: Tell = lambda done, total: None,
    remote_code: bool = False,
) -> Path:
    """The folder of the base's weights, which the main process makes where there is none.

    ``made_before``: a run goes on, and what it made when it began is still to be there.
    """
    source = _source(plan, output, made_before=made_before)
    if not plan.has_backbone:
        return source
    if is_intact(output.backbone) and made_before:
        return output.backbone
    if made_before:
        raise StorageError(
            f"{output.backbone} is damaged or gone, and this run's adapter belongs to it",
            "put it back, or start over with --fresh",
        )
    _make_backbone(plan, source, output.backbone, tell, remote_code)
    return output.backbone


def known_base(plan: Plan, output: OutputFolder) -> Path:
    """The same folder for the processes that do not make it."""
    made = [output.base] if plan.model.folder is None else []
    made += [output.backbone] if plan.has_backbone else []
    for folder in made:
        if not is_intact(folder):
            raise UsageError(
                f"the base that the main process wrote to {folder} is not to be seen here",
                "set output_dir to a folder that all machines share",
            )
    return base_folder(plan, output, made_before=True)


def _source(plan: Plan, output: OutputFolder, *, made_before: bool) -> Path:
    """The base that the recipe means, with its weights."""
    recipe = plan.recipe
    if plan.model.folder is not None:
        assert recipe.model.path is not None
        return model_folder(recipe.model.path, recipe.model.revision).path
    if not (made_before and is_intact(output.base)):  # without a checkpoint, it may be another recipe's
        # float32 as drawn: what is rounded is the run's choice, not the file's
        model = random_model(plan.model.config, recipe.task, torch.float32, recipe.training.seed)
        with new_folder(output.base, replace=True) as folder, quiet():
            model.save_pretrained(folder)
    return output.base


def _make_backbone(plan: Plan, source: Path, path: Path, tell: Tell, remote_code: bool) -> None:
    """A model's folder with the adapted layers quantized, and the adapter that makes up for it."""
    skeleton, lora = plan.model.skeleton, plan.recipe.lora
    tokenizer = load_tokenizer(plan.recipe.model, remote_code=remote_code)  # without the run's new tokens
    writer = BackboneWriter(
        plan.model.targets,
        {name for name, layer in adapters_of(skeleton).items() if is_transposed(getattr(layer, "base", None))},
        skeleton.base_model_prefix,
        lora.loftq_config,
        plan.device,
        tell,
    )
    with new_folder(path, replace=True) as folder:
        writer.write(source, folder)
        _write_config(plan, source, folder, writer.kind)
        copy_files(("generation_config.json", *(path.name for path in source.glob("*.py"))), source, folder)
        save_tokenizer(folder, tokenizer, None)
        start = peft_config(skeleton, lora, plan.recipe.task, [], base=os.fspath(path), revision=None)
        for key in ("trainable_token_indices", "use_dora"):  # these begin as they are in the base
            start.pop(key, None)
        start["target_modules"] = sorted(writer.errors)
        (folder / START).mkdir()
        save_adapter(folder / START, writer.factors, start)


def _write_config(plan: Plan, source: Path, folder: Path, kind: str) -> None:
    """The base's own configuration, with what lets transformers read the packed layers."""
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    targets = {target.name for target in plan.model.targets}
    skeleton = plan.model.skeleton
    layers = {name.removesuffix(".base") for name in linear_modules(skeleton)}
    head = {name for name, module in skeleton.named_modules() if module is skeleton.get_output_embeddings()}
    values[SETTINGS] = settings_for_transformers(kind, plan.dtype, sorted((layers | head) - targets))
    write_json(folder / "config.json", values)
