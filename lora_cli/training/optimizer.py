"""AdamW over the trained parameters, which lie in one vector, as their gradients do in another.

One tensor to clip, to sum over processes and to update, instead of hundreds of small ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_cli.adapters.injection import trained_parameters
from lora_cli.distributed import World
from lora_cli.recipe import TrainingSection

ALIGNMENT = 16  # float32 values: every parameter begins on a cache line of its own
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """Where one parameter lies in the vector."""

    start: int
    shape: torch.Size

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.start + math.prod(self.shape)].view(self.shape)


class FlatAdamW:
    """Moves a model's trained parameters into one vector, and updates them there.

    Matrices come first: decoupled weight decay (arXiv:1711.05101) is theirs alone; biases and norms are not
    pulled to zero. With LoRA+ (arXiv:2402.12354) the B's among them have a learning rate of their own.
    """

    def __init__(self, model: nn.Module, training: TrainingSection) -> None:
        parameters = trained_parameters(model)
        groups = _groups(parameters, training)
        ordered = {name: parameters[name] for group in groups for name in group.names}
        self.places, ends = _places(groups, parameters)
        end = ends[-1]
        some = next(iter(ordered.values()))
        self.values = torch.zeros(end, dtype=torch.float32, device=some.device)
        self.exchanged = torch.zeros(end + ALIGNMENT, dtype=torch.float32, device=some.device)
        self.gradients, self.aside = self.exchanged[:end], self.exchanged[end:]
        self.never_reached = set(ordered)
        self._hooks = [p.register_post_accumulate_grad_hook(self._reached(name)) for name, p in ordered.items()]
        with torch.no_grad():
            for name, parameter in ordered.items():
                self.places[name].of(self.values).copy_(parameter)
                parameter.data = self.places[name].of(self.values)
                parameter.grad = self.places[name].of(self.gradients)
        self._adamw = _adamw(self.values, self.gradients, groups, ends, training)

    def _reached(self, name: str):  # type: ignore[no-untyped-def]
        return lambda parameter: self.never_reached.discard(name)

    def stop_watching(self) -> None:
        """After the first step it is known whom gradients reach."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def set_learning_rate(self, value: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = value * group["lr_ratio"]

    def zero_gradients(self) -> None:
        """And what lies aside of them: a few numbers that travel to the other processes in the same sum."""
        self.exchanged.zero_()

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients together, on the device."""
        return torch.linalg.vector_norm(self.gradients)

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale gradients down to ``max_norm`` where they are longer, as torch's clip_grads_with_norm_ does."""
        self.gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    def update(self, finite: Tensor) -> None:
        """One AdamW step; none where ``finite`` (a bool on the device) is false, without asking the device."""
        if self._adamw.defaults["fused"]:
            self._adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._adamw.step()
        elif bool(finite):
            self._adamw.step()

    @property
    def bytes_to_come(self) -> int:
        """Of the moments, which the first update makes."""
        made = all(self._adamw.state[part] for part in self._parts())
        return 0 if made else len(MOMENTS) * self.values.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Its state by parameter name, ready for safetensors: ``exp_avg/<parameter>`` and so on."""
        state = [self._adamw.state[part] for part in self._parts()]
        if not all(state):
            return {}
        found = {"step": state[0]["step"].detach().cpu().reshape(1).clone()}
        for key in MOMENTS:
            moments = torch.cat([part[key] for part in state]).cpu()
            found |= {f"{key}/{name}": place.of(moments).clone() for name, place in self.places.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put ``tensors`` back."""
        if not tensors:
            return
        vectors = {key: torch.zeros_like(self.values) for key in MOMENTS}
        for key, vector in vectors.items():
            for name, place in self.places.items():
                place.of(vector).copy_(tensors[f"{key}/{name}"])
        self._set_state(tensors["step"], vectors)

    def spread(self, world: World) -> None:
        """All processes go on from the main one's values and moments."""
        world.spread(self.values)
        state = [self._adamw.state[part] for part in self._parts()]
        step = world.spread(state[0]["step"].detach().cpu().reshape(1) if all(state) else torch.zeros(1))
        if step.item() > 0:
            moments = {
                key: torch.cat([part[key] for part in state]) if all(state) else torch.zeros_like(self.values)
                for key in MOMENTS
            }
            self._set_state(step, {key: world.spread(vector) for key, vector in moments.items()})

    def _set_state(self, steps: Tensor, vectors: dict[str, Tensor]) -> None:
        start = 0
        for part in self._parts():
            state = {key: vector[start : start + part.numel()].clone() for key, vector in vectors.items()}
            on_device = self._adamw.defaults["fused"] and part.device.type != "cpu"
            step = steps.reshape(()).clone()
            self._adamw.state[part] = {"step": step.to(part.device) if on_device else step, **state}
            start += part.numel()

    def _parts(self) -> list[nn.Parameter]:
        return [p for group in self._adamw.param_groups for p in group["params"]]


@dataclass(frozen=True)
class _Group:
    """Parameters that are updated alike; they lie together."""

    names: list[str]
    weight_decay: float
    lr_ratio: float = 1.0  # to the run's learning rate


def _groups(parameters: dict[str, nn.Parameter], training: TrainingSection) -> list[_Group]:
    """Matrices, B's that learn faster, and what does not decay; each in the model's order, and only if it is there."""
    matrices = [name for name, p in parameters.items() if p.ndim >= 2]
    ratio = training.loraplus_lr_ratio
    faster = [name for name in matrices if ratio is not None and name.endswith(".lora_B")]
    others = [name for name in matrices if name not in set(faster)]
    vectors = [name for name, p in parameters.items() if p.ndim < 2]
    decay = training.weight_decay
    groups = [_Group(others, decay), _Group(faster, decay, ratio or 1.0), _Group(vectors, 0.0)]
    return [group for group in groups if group.names]


def _places(groups: list[_Group], parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Place], list[int]]:
    """Every parameter's place, and where each group ends."""
    places, ends, end = {}, [], 0
    for group in groups:
        for name in group.names:
            places[name] = Place(end, parameters[name].shape)
            end += -(-parameters[name].numel() // ALIGNMENT) * ALIGNMENT
        ends.append(end)
    return places, ends


def _adamw(
    values: Tensor, gradients: Tensor, groups: list[_Group], ends: list[int], training: TrainingSection
) -> torch.optim.AdamW:
    parts = []
    for group, start, end in zip(groups, [0, *ends], ends, strict=False):
        part = nn.Parameter(values[start:end])
        part.grad = gradients[start:end]
        parts.append({"params": [part], "weight_decay": group.weight_decay, "lr_ratio": group.lr_ratio})
    return torch.optim.AdamW(
        parts,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=values.device.type in ("cpu", "cuda"),
    )
