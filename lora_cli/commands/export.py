"""`lora export`: an adapter in the form that a server reads as it was trained, read back by that server's rules."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from lora_cli.adapters.adapter import Adapter, LowRank
from lora_cli.adapters.configuration import rewritten
from lora_cli.adapters.exporting import export_updates
from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.servers import SERVERS, max_lora_rank, strict_errors, verdict
from lora_cli.adapters.spectrum import MOST_LOST, relative_distance, rounding_loss
from lora_cli.commands.adapter_folder import check_new, files_of, read_low_rank, write_adapter
from lora_cli.commands.agreement import Agreement
from lora_cli.commands.comparison import Comparison, compare_exported
from lora_cli.commands.fitted import FittedAdapter, check_fingerprint, check_not_quantized, find_base, fit_adapter
from lora_cli.commands.merge import tokenizer_folder_of, tokenizer_of
from lora_cli.errors import StorageError, UsageError
from lora_cli.hub import weight_files
from lora_cli.storage import new_folder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportReport:
    """What `lora export` wrote, and how far it is from what was trained."""

    adapter: str
    output: str
    server: str
    rank: int
    dtype: str
    modules: int
    distance: float  # of all updates: norm of the difference over the norm, 0 without rounding
    not_compared: str | None  # why the logits were not compared, if so
    rows: str | None
    agreement: Agreement | None  # of base + export with base + adapter, in float32
    adapter_mean_kl: float | None
    limit_mean_kl: float | None
    commands: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    folder: Path,
    output: Path,
    *,
    server: str,
    dtype: str = "bfloat16",
    base: str | None = None,
    rows: str | None = None,
    verify: bool = True,
    remote_code: bool = False,
) -> ExportReport:
    """Write an adapter with scale 1, one rank and one type, re-read it by the server's rules, and compare logits.

    Raises ``UsageError`` for what no server can be given, ``StorageError`` where the result is not what was trained;
    then no folder is left.
    """
    # 1. what can be wrong before anything is written
    _check_wish(server, dtype)
    check_new(output)
    adapter = _exportable(folder, server)
    _check_rounding(adapter, dtype)
    proof = _Proof(folder, adapter, base, verify, remote_code)
    # 2. write, read back, compare, publish
    made = export_updates(adapter.updates, DTYPES[dtype])
    with new_folder(output) as temporary:
        write_adapter(temporary, made, {}, _config(adapter, made), folder)
        written = _reread(temporary, server)
        found = proof.compare(temporary, DTYPES[dtype], rows)
    return _report(folder, output, server, dtype, adapter, written, proof, found)


def _check_rounding(adapter: Adapter, dtype: str) -> None:
    lost = rounding_loss(adapter.updates, DTYPES[dtype])
    if lost > MOST_LOST:
        raise UsageError(
            f"{dtype} would change the updates by {lost:.0%} of their norm: small differences of large products",
            "export with --dtype float32",
        )


def _check_wish(server: str, dtype: str) -> None:
    if server not in SERVERS:
        raise UsageError(f"--for {server} is not known", f"use one of {', '.join(SERVERS)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", f"use {', '.join(DTYPES)}")


def _exportable(folder: Path, server: str) -> Adapter:
    """Raises ``UsageError``, with merging as the way out, for what is more than low-rank updates."""
    instead = f"merge instead: lora merge {shlex.quote(os.fspath(folder))}"
    adapter = read_low_rank(folder, "not every server reads its magnitudes", instead)
    if adapter.saved:
        names = sorted({name.rpartition(".")[0] for name in adapter.saved})
        raise UsageError(
            f"{folder} holds modules trained in full ({', '.join(names)}), which servers refuse to load", instead
        )
    highest = max(len(update.lora_A) for update in adapter.updates.values())
    if SERVERS[server].has_max_rank and max_lora_rank(highest) is None:
        raise UsageError(f"{folder} has rank {highest}, and {server} takes at most 512", "use lora shrink --rank 512")
    if reasons := verdict(server, files_of(folder, adapter)).refuses:
        raise UsageError(f"{server} does not read {folder}: {'; '.join(reasons)}", instead)
    return adapter


def _config(adapter: Adapter, made: dict[str, LowRank]) -> dict[str, Any]:
    ranks = {name: len(update.lora_A) for name, update in made.items()}
    return rewritten(adapter.config, ranks, dict.fromkeys(made, 1.0))


def _reread(folder: Path, server: str) -> Adapter:
    """What was written, as the server would read it. Raises ``StorageError`` where it would not, or not rightly."""
    written = read_adapter(folder)
    errors = strict_errors(server, files_of(folder, written))
    if errors:
        raise StorageError(f"{server} would not read what was written ({'; '.join(errors)}); this is a bug to report")
    return written


class _Proof:
    """The base for comparing logits where it is at hand, or the reason why they are not compared."""

    def __init__(self, folder: Path, adapter: Adapter, base: str | None, verify: bool, remote_code: bool) -> None:
        self.fitted: FittedAdapter | None = None
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.remote_code = remote_code
        self.reason = "--no-verify" if not verify else self._find(folder, adapter, base)

    def _find(self, folder: Path, adapter: Adapter, base: str | None) -> str | None:
        try:
            found = find_base(folder, adapter, base, remote_code=self.remote_code, download=base is not None)
            weight_files(found)
        except UsageError as error:
            if base is not None:  # it was asked for
                raise
            named = f"the base {adapter.base} is not on this machine" if adapter.base else error.message
            return f"{named}; name its folder with --base"
        self.fitted = fit_adapter(folder, os.fspath(found), remote_code=self.remote_code)
        check_fingerprint(self.fitted)
        try:
            check_not_quantized(self.fitted)
            self.tokenizer = tokenizer_of(self.fitted, tokenizer_folder_of(self.fitted), self.remote_code)
        except UsageError as error:
            return error.message
        return None

    def compare(self, exported: Path, dtype: torch.dtype, rows: str | None) -> Comparison | None:
        """Raises ``StorageError`` past the limit that `lora merge` has for this type."""
        if self.fitted is None or self.tokenizer is None:
            return None
        served = fit_adapter(exported, os.fspath(self.fitted.base), remote_code=self.remote_code)
        found = compare_exported(self.fitted, served, self.tokenizer, dtype, rows, remote_code=self.remote_code)
        if not found.within_limit:
            raise StorageError(
                f"the exported adapter is not the trained one: mean KL {found.agreement.mean_kl:.2e} nats, limit "
                f"{found.limit_mean_kl:.1e} (the adapter itself changes {found.adapter_mean_kl:.2e}); "
                "nothing was written",
                "export with --dtype float32; where it differs there too, this is a bug to report",
            )
        return found


def _report(
    folder: Path,
    output: Path,
    server: str,
    dtype: str,
    adapter: Adapter,
    written: Adapter,
    proof: _Proof,
    found: Comparison | None,
) -> ExportReport:
    rank = max(len(update.lora_A) for update in written.updates.values())
    return ExportReport(
        adapter=os.fspath(folder),
        output=os.fspath(output),
        server=server,
        rank=rank,
        dtype=dtype,
        modules=len(written.updates),
        distance=relative_distance(adapter.updates, written.updates),
        not_compared=proof.reason,
        rows=found.rows if found else None,
        agreement=found.agreement if found else None,
        adapter_mean_kl=found.adapter_mean_kl if found else None,
        limit_mean_kl=found.limit_mean_kl if found else None,
        commands=serve_commands(server, adapter.base or "BASE", output, rank),
    )


def serve_commands(server: str, base: str, folder: Path, rank: int) -> list[str]:
    """What to type to serve the folder."""
    name, path, model = shlex.quote(folder.name), shlex.quote(os.fspath(folder)), shlex.quote(base)
    config = f"--base {model} " if os.path.isdir(base) else ""
    gguf = shlex.quote(os.fspath(folder / f"{folder.name}.gguf"))
    return {
        "peft": [f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {os.fspath(folder)!r})"],
        "vllm": [
            f"vllm serve {model} --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules {name}={path}"
        ],
        "sglang": [f"python -m sglang.launch_server --model-path {model} --enable-lora --lora-paths {name}={path}"],
        "llama.cpp": [
            f"python convert_lora_to_gguf.py {config}--outfile {gguf} {path}",
            f"llama-server -m BASE.gguf --lora {gguf}",
        ],
    }[server]
