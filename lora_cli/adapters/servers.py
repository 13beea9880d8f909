"""What each server makes of an adapter's files: what it refuses, and the scale that it would use.

Looked up in the sources of vLLM (``lora/peft_helper.py``, ``config/lora.py``; last in 0.33.0), SGLang
(``lora/lora.py``, ``lora/lora_config.py``, ``lora/lora_manager.py``; 0.5.23) and llama.cpp
(``convert_lora_to_gguf.py``, ``llama-adapter.h``). None of them raises for a key that it does not read, so a wrong
scale passes in silence; hence the scale is computed here as each computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.backbone import read_report
from lora_cli.adapters.files import scaling_in
from lora_cli.adapters.layer import FACTORS, MAGNITUDE
from lora_cli.adapters.naming import PREFIX, trained_name_of

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
VLLM_DEFAULT_RANK = 16
Shapes = dict[str, tuple[int, ...]]  # by the tensor's name in the file


@dataclass(frozen=True)
class Files:
    """An adapter's files without its numbers: the configuration, and the shape of every tensor."""

    config: dict[str, Any]
    shapes: Shapes

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> the rank of its A."""
        ending = ".lora_A"
        named = {trained_name_of(name): shape for name, shape in self.shapes.items()}
        return {name.removesuffix(ending): shape[0] for name, shape in named.items() if name.endswith(ending)}


@dataclass(frozen=True)
class Verdict:
    """What a server says of an adapter: reasons to refuse it, what it would get wrong, and flags that it needs."""

    server: str
    refuses: list[str]
    misreads: list[str]
    flags: list[str]

    @property
    def is_served(self) -> bool:
        return not self.refuses and not self.misreads

    def __str__(self) -> str:
        wrong = [*(f"refuses: {text}" for text in self.refuses), *(f"misreads: {text}" for text in self.misreads)]
        needs = [f"needs {flag}" for flag in self.flags]
        return "; ".join([*(wrong or ["serves it"]), *needs])


def max_lora_rank(rank: int) -> int | None:
    """The least value of vLLM's --max-lora-rank, at least its default, that admits this rank; None above 512."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= max(rank, VLLM_DEFAULT_RANK)), None)


# what is refused, by rule: a reason, or None


def _dora(files: Files) -> str | None:
    magnitudes = any(name.endswith(MAGNITUDE) for name in files.shapes)
    return "DoRA (use_dora)" if files.config.get("use_dora") or magnitudes else None


def _saved(files: Files) -> str | None:
    named = _saved_modules(files)
    return f"modules saved in full (modules_to_save: {', '.join(named)})" if named else None


def _saved_but_a_head(files: Files) -> str | None:
    return None if _is_classifier(files) else _saved(files)


def _saved_modules(files: Files) -> list[str]:
    """Modules in full, by the key or by their tensors."""
    return files.config.get("modules_to_save") or sorted(
        {trained_name_of(name).rpartition(".")[0] for name in files.shapes if not _is_low_rank(name)}
    )


def _is_classifier(files: Files) -> bool:
    """Whether a classifier's head is all that is saved in full: newer versions of vLLM read that."""
    return len(_saved_modules(files)) == 1 and _saved_modules(files)[0] in ("score", "classifier")


def _is_low_rank(name: str) -> bool:
    return trained_name_of(name).rpartition(".")[2].startswith("lora_")


def _bias(files: Files) -> str | None:
    bias = files.config.get("bias")
    trained = bias not in (None, "none") or files.config.get("lora_bias")
    return f"trained biases (bias: {bias})" if trained else None


def _embeddings(files: Files) -> str | None:
    found = any("lora_embedding" in name for name in files.shapes)
    return "adapted embeddings" if found else None


def _stacked(files: Files) -> str | None:
    named = files.config.get("target_parameters")
    return f"stacked experts (target_parameters: {', '.join(named)}), in a layout of PEFT's own" if named else None


def _backbone_but(*bits: int) -> Callable[[Files], str | None]:
    """A rule: of the bases that LoftQ quantized, which adapters for them are served over, only these are read."""

    def rule(files: Files) -> str | None:
        base = files.config.get("base_model_name_or_path")
        report = read_report(Path(base).expanduser()) if isinstance(base, str) else None
        return None if report is None or report.bits in bits else f"its base, quantized to {report.bits} bits ({base})"

    return rule


def _rank_above_all(files: Files) -> str | None:
    highest = max(files.ranks.values(), default=0)
    return f"rank {highest} (at most {VLLM_RANKS[-1]})" if max_lora_rank(highest) is None else None


def _shapes(files: Files) -> str | None:
    """A (R, I) and B (O, R) of each module, under PEFT's names."""
    for name, shape in files.shapes.items():
        if not name.startswith(PREFIX) or not trained_name_of(name).endswith(tuple(f".{part}" for part in FACTORS)):
            return f"a tensor named {name}"
        a, b = (files.shapes.get(_sibling(name, part)) for part in FACTORS)
        if a is None or b is None or len(shape) != 2 or a[0] != b[1]:
            return f"{name}: A and B do not fit together"
    return None


def _sibling(name: str, part: str) -> str:
    module = name.removesuffix(".weight").rpartition(".")[0]
    return f"{module}.{part}.weight"


# the scale of B A as each server computes it, from the configuration and the rank of the tensor


def _peft_scale(files: Files, module: str, rank: int) -> float:
    return scaling_in(files.config, module, rank)


def _vllm_scale(files: Files, module: str, rank: int) -> float:
    alpha, r = float(files.config.get("lora_alpha", 8)), int(files.config.get("r", 8))
    return alpha / math.sqrt(r) if files.config.get("use_rslora") else alpha / r


def _sglang_scale(files: Files, module: str, rank: int) -> float:
    return float(files.config.get("lora_alpha", 8)) / int(files.config.get("r", 8))


def _llama_cpp_scale(files: Files, module: str, rank: int) -> float:
    return float(files.config.get("lora_alpha", 8)) / rank


@dataclass(frozen=True)
class Server:
    """How a server reads: what it refuses, and its scale."""

    rules: tuple[Callable[[Files], str | None], ...]
    scale: Callable[[Files, str, int], float]
    ignored: tuple[str, ...] = ()  # keys that it does not read
    has_max_rank: bool = False
    reads_all: str | None = None  # the version that was seen to read those keys too


_LOW_RANK_ONLY = (_dora, _bias, _embeddings, _stacked)
_PATTERNS = ("alpha_pattern", "rank_pattern")
SERVERS = {
    "peft": Server((_backbone_but(4, 8),), _peft_scale),
    "vllm": Server(
        (*_LOW_RANK_ONLY, _saved_but_a_head, _rank_above_all, _backbone_but(4)),
        _vllm_scale,
        _PATTERNS,
        has_max_rank=True,
        reads_all="0.33",
    ),
    "sglang": Server((*_LOW_RANK_ONLY, _saved, _backbone_but(4)), _sglang_scale, (*_PATTERNS, "use_rslora")),
    "llama.cpp": Server(
        (_dora, _saved, _bias, _embeddings, _backbone_but()), _llama_cpp_scale, ("alpha_pattern", "use_rslora")
    ),
}


def verdict(server: str, files: Files) -> Verdict:
    """What a server makes of these files."""
    reader = SERVERS[server]
    refuses = [reason for rule in reader.rules if (reason := rule(files)) is not None]
    needed = max_lora_rank(max(files.ranks.values(), default=0)) or 0
    flags = (
        [f"--max-lora-rank {needed} ({VLLM_DEFAULT_RANK} unless set)"]
        if reader.has_max_rank and needed > VLLM_DEFAULT_RANK
        else []
    )
    if _is_classifier(files) and not refuses and reader.reads_all:
        flags.append(f"version {reader.reads_all}, which reads modules_to_save: {_saved_modules(files)[0]}")
    return Verdict(server, refuses, _wrong_scales(reader, files), flags)


def verdicts(files: Files) -> list[Verdict]:
    return [verdict(server, files) for server in SERVERS]


def _wrong_scales(reader: Server, files: Files) -> list[str]:
    """Modules that would get another scale than PEFT gives them, with the keys that the server does not read."""
    wrong = {
        module: (reader.scale(files, module, rank), right)
        for module, rank in files.ranks.items()
        if not math.isclose(reader.scale(files, module, rank), right := _peft_scale(files, module, rank), rel_tol=1e-6)
    }
    if not wrong:
        return []
    module, (read, right) = next(iter(wrong.items()))
    keys = ", ".join(key for key in reader.ignored if files.config.get(key)) or "the ranks of the tensors"
    keys += f" in older versions ({reader.reads_all} reads them)" if reader.reads_all else ""
    return [f"ignores {keys}: wrong scale on {len(wrong)} modules ({module}: {read:.4g} instead of {right:.4g})"]


def strict_errors(server: str, files: Files) -> list[str]:
    """Why a file that should be safe for a server is not, if so: no refusal, no misreading, nothing but factors,
    alpha equal to the rank everywhere, and one rank."""
    found = verdict(server, files)
    plain = [key for key in (*_PATTERNS, "use_rslora", "use_dora", "modules_to_save") if files.config.get(key)]
    ranks = set(files.ranks.values())
    errors = [*found.refuses, *found.misreads, *(f"the key {key}" for key in plain)]
    if (reason := _shapes(files)) is not None:
        errors.append(reason)
    if ranks != {files.config.get("r")} or files.config.get("lora_alpha") != files.config.get("r"):
        errors.append(f"ranks {sorted(ranks)} with r {files.config.get('r')}, alpha {files.config.get('lora_alpha')}")
    return errors
