"""Beginnings that are measured on training rows: EVA by activations, LoRA-GA by gradients.

While the model runs its own code on a few rows, one after the other, hooks see what enters and leaves each adapted
layer. The adapters still hold B = 0, so the model is the base.

Shape suffixes: N tokens of a row, I in_features, O out_features, R rank, K directions kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lora_cli.adapters.layer import LoRALinear
from lora_cli.errors import DataError
from lora_cli.recipe import LoraSection


class Rows(Protocol):
    """Training rows that the model can be run on, one at a time."""

    def run(self, count: int) -> Iterator[None]:
        """The forward pass of one row at each turn, without gradients, of ``count`` rows at most."""

    def run_back(self, count: int) -> Iterator[int]:
        """The same with the backward pass of the row's summed loss; each turn gives its number of targets."""


Factors = tuple[Tensor, Tensor]  # A (R, I), B (O, R)
Measured = Callable[[dict[str, LoRALinear], LoraSection, Rows], Iterator[tuple[str, Factors]]]
WEAKEST = 1e-3  # of the strongest direction: a Gram matrix squares it, and float32 has seven digits
HELD = 4  # directions held on the way, for each that is wanted
GRADIENT_BYTES = 2**30  # of weight gradients held at a time; more layers take more passes


@dataclass
class _Directions:
    """The K principal directions of all inputs so far: an incremental singular value decomposition.

    The row space of what came before is held as scaled directions, more than are wanted in the end, so that little is
    lost by leaving the rest out; new inputs are stacked below, and both are decomposed together (arXiv:2410.07170,
    section 3.1, after Ross et al. 2008). Not centred.
    """

    keep: int
    tau: float
    held: Tensor | None = None  # singular values times right singular vectors, falling
    total: float = 0.0  # sum of all squared inputs
    settled: bool = False

    def add(self, x_NI: Tensor) -> None:
        self.total += float(x_NI.square().sum())
        if self.settled:
            return
        stacked_MI = x_NI if self.held is None else torch.cat([self.held, x_NI])
        before = None if self.held is None else self.best
        self.held = _scaled_directions(stacked_MI)[: HELD * self.keep]
        if before is not None and len(before) == len(self.best):
            likeness_K = torch.cosine_similarity(before, self.best, dim=1).abs()
            self.settled = bool((likeness_K >= self.tau).all())

    @property
    def best(self) -> Tensor:
        """(K, I), the strongest first, as long as they are strong."""
        assert self.held is not None
        return self.held[: self.keep]

    @property
    def vectors(self) -> Tensor:
        """(K, I) of length one, the strongest first."""
        return torch.nn.functional.normalize(self.best, dim=1)

    @property
    def explained(self) -> list[float]:
        """The share of all variance along each direction, falling."""
        return (self.best.square().sum(1) / max(self.total, 1e-30)).tolist()


def _scaled_directions(x_MI: Tensor) -> Tensor:
    """(K, I) s_k v_k of x = U S V^T, falling, by the eigenvectors of the smaller Gram matrix.

    Without those that float32 cannot tell from nothing: what repeats has fewer directions than rows.
    """
    m, i = x_MI.shape
    vectors = torch.linalg.eigh(x_MI @ x_MI.T if m <= i else x_MI.T @ x_MI).eigenvectors.flip(1).T
    scaled_KI = vectors @ x_MI if m <= i else torch.linalg.vector_norm(x_MI @ vectors.T, dim=0)[:, None] * vectors
    lengths_K = torch.linalg.vector_norm(scaled_KI, dim=1)
    return scaled_KI[lengths_K > WEAKEST * lengths_K[0]]


@dataclass
class _Inputs:
    """The directions of each layer's input; layers that are given the same tensor share them."""

    keep: int
    tau: float
    of: dict[str, _Directions] = field(default_factory=dict)
    _by_tensor: dict[int, _Directions] = field(default_factory=dict)
    _seen: list[Tensor] = field(default_factory=list)  # keeps them alive, so that no two have one id

    def see(self, name: str, x: Tensor) -> None:
        shared = self._by_tensor.get(id(x))
        if shared is not None and self.of.get(name, shared) is shared:
            self.of[name] = shared
            return
        directions = self.of.setdefault(name, _Directions(self.keep, self.tau))
        self._by_tensor[id(x)] = directions
        self._seen.append(x)
        directions.add(x.detach().flatten(0, -2).float())

    def next_row(self) -> None:
        self._by_tensor.clear()
        self._seen.clear()


def eva(layers: dict[str, LoRALinear], lora: LoraSection, rows: Rows) -> Iterator[tuple[str, Factors]]:
    """A from the inputs' principal directions, B = 0; ranks go where they explain most (arXiv:2410.07170).

    Of all layers' directions together those with the largest share of explained variance are taken, as many as the
    ranks of the recipe add up to, and at most rho times its own rank in a layer. Every layer keeps one at least. The
    scale of each update stays what the recipe makes it. Raises ``DataError`` where the rows hold too few tokens.
    """
    config = lora.eva_config
    inputs = _Inputs(max(math.ceil(layer.r * config.rho) for layer in layers.values()), config.tau)
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.see(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for _ in rows.run(config.rows):
            inputs.next_row()
            if all(directions.settled for directions in inputs.of.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
    ranks = redistribute(
        {name: _explained(inputs, name)[: _largest_rank(layer)] for name, layer in layers.items()},
        {name: layer.r for name, layer in layers.items()},
        config.rho,
    )
    for name, rank in ranks.items():
        a_RI = inputs.of[name].vectors[:rank]
        yield name, (a_RI, torch.zeros(layers[name].lora_B.shape[0], rank))


def _explained(inputs: _Inputs, name: str) -> list[float]:
    return inputs.of[name].explained if name in inputs.of else []


def _largest_rank(layer: LoRALinear) -> int:
    return min(layer.lora_A.shape[1], layer.lora_B.shape[0])


def redistribute(explained: dict[str, list[float]], ranks: dict[str, int], rho: float) -> dict[str, int]:
    """Each layer's new rank: the best directions of all, at least one and at most rho x its old rank of a layer."""
    found = {}
    for name, shares in explained.items():
        least = ranks[name] if rho == 1 else 1
        if len(shares) < least:
            raise DataError(
                f"lora.init_lora_weights: eva finds {len(shares)} directions in what enters {name}, and needs {least}",
                "use more or longer training rows, or a smaller lora.r",
            )
        found[name] = least
    spare = [
        (share, name)
        for name, shares in explained.items()
        for share in shares[found[name] : math.floor(ranks[name] * rho)]
    ]
    spare.sort(key=lambda entry: -entry[0])  # stable: among equals the model's order
    wanted = sum(ranks.values()) - sum(found.values())
    if len(spare) < wanted:
        raise DataError(
            f"lora.init_lora_weights: eva finds {len(spare) + sum(found.values())} directions in all inputs, and "
            f"the ranks add up to {sum(ranks.values())}",
            "use more or longer training rows, or a smaller lora.r",
        )
    for _, name in spare[:wanted]:
        found[name] += 1
    return found


def lora_ga(layers: dict[str, LoRALinear], lora: LoraSection, rows: Rows) -> Iterator[tuple[str, Factors]]:
    """From the singular vectors of W's gradient G = U S V^T on a few rows, so that the first step goes along it.

    A = V^T_[1..R] and B = U_[R+1..2R] S_[R+1..2R] O^(1/4) / sqrt(gamma) with gamma = 16 (arXiv:2407.05000, theorem 3.1,
    as PEFT's ``ArB2r`` and ``stable``). Directions that the gradient lacks, of few tokens or a small matrix, are zero.
    """
    for names in _in_parts(layers):
        gradients = _weight_gradients({name: layers[name] for name in names}, lora.lora_ga_config.rows, rows)
        for name in names:
            yield name, _along(gradients.pop(name), layers[name].r)


def _along(gradient_OI: Tensor, r: int) -> Factors:
    u_OK, s_K, vh_KI = torch.linalg.svd(gradient_OI, full_matrices=False)
    second = slice(r, 2 * r) if len(s_K) >= 2 * r else slice(len(s_K) - r, len(s_K))
    scale = gradient_OI.shape[0] ** 0.25 / math.sqrt(16)
    return vh_KI[:r], u_OK[:, second] * s_K[second] * scale


def _in_parts(layers: dict[str, LoRALinear]) -> Iterator[list[str]]:
    """Names of layers whose float32 gradients fit together into ``GRADIENT_BYTES``."""
    part: list[str] = []
    size = 0
    for name, layer in layers.items():
        own = 4 * layer.lora_A.shape[1] * layer.lora_B.shape[0]
        if part and size + own > GRADIENT_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += own
    yield part


def _weight_gradients(layers: dict[str, LoRALinear], count: int, rows: Rows) -> dict[str, Tensor]:
    """(O, I) float32 by name: what the frozen weights would get from the rows' mean loss."""
    gradients: dict[str, Tensor] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def note(module: LoRALinear, args: tuple[Tensor], output: Tensor) -> None:
            x_NI = args[0].detach().flatten(0, -2)

            def add(dy: Tensor) -> None:
                product_OI = dy.detach().flatten(0, -2).float().T @ x_NI.float()
                gradients[name] = gradients[name].add_(product_OI) if name in gradients else product_OI

            output.register_hook(add)

        return note

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        targets = sum(rows.run_back(count))
    finally:
        for handle in handles:
            handle.remove()
    nothing = {name: torch.zeros(layer.lora_B.shape[0], layer.lora_A.shape[1]) for name, layer in layers.items()}
    return nothing | {name: gradient.div_(targets) for name, gradient in gradients.items()}
