"""Muon for the matrices, Adam for the embedding and the norms; float32 masters of bfloat16 weights."""

from collections import defaultdict

import torch
from tools.train_model.model import Weights
from torch import Tensor

# Muon (K. Jordan, 2024): momentum, then the nearest orthogonal matrix by a quintic Newton-Schulz iteration.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MOMENTUM, _BETAS, _EPS = 0.95, (0.9, 0.95), 1e-8


class Optimizer:
    """Owns the float32 masters; `weights` are the bfloat16 leaves that the forward pass reads."""

    def __init__(self, initial: Weights, *, matrix_lr: float, other_lr: float, decay: float) -> None:
        self.masters = {name: w.clone() for name, w in initial.items()}
        self.weights = {name: w.bfloat16().requires_grad_() for name, w in initial.items()}
        self._gradients = {name: torch.zeros_like(w) for name, w in initial.items()}
        self._first = {name: torch.zeros_like(w) for name, w in initial.items()}
        self._second = {name: torch.zeros_like(w) for name, w in initial.items() if not _is_matrix(name, w)}
        self._lr, self._decay, self._step = (matrix_lr, other_lr), decay, 0

    def collect(self) -> None:
        """Adds the leaves' gradients, of one part of the batch, to the sum in float32."""
        for name, leaf in self.weights.items():
            if leaf.grad is not None:
                self._gradients[name] += leaf.grad
                leaf.grad = None

    @torch.no_grad()
    def step(self, *, scale: float, rate: float, clip: float) -> float:
        """One update with the collected gradients times `scale`; returns their norm. `rate` is the schedule's."""
        self._step += 1
        norm = scale * float(torch.stack([g.norm() for g in self._gradients.values()]).norm())
        factor = scale * min(1.0, clip / (norm + 1e-6))
        shapes: dict[torch.Size, list[str]] = defaultdict(list)
        for name, gradient in self._gradients.items():
            gradient *= factor
            if name in self._second:
                self._adam(name, gradient, rate * self._lr[1])
            else:
                shapes[gradient.shape].append(name)
        for names in shapes.values():
            self._muon(names, rate * self._lr[0])
        for name, leaf in self.weights.items():
            leaf.copy_(self.masters[name])
            self._gradients[name].zero_()
        return norm

    def _adam(self, name: str, gradient: Tensor, lr: float) -> None:
        first, second = self._first[name], self._second[name]
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        corrected = first / (1 - _BETAS[0] ** self._step)
        self.masters[name] -= lr * corrected / ((second / (1 - _BETAS[1] ** self._step)).sqrt() + _EPS)

    def _muon(self, names: list[str], lr: float) -> None:
        for name in names:
            self._first[name].lerp_(self._gradients[name], 1 - _MOMENTUM)
        looking_ahead = torch.stack([self._gradients[n].lerp(self._first[n], _MOMENTUM) for n in names])
        updates = _orthogonal(looking_ahead)
        rows, columns = updates.shape[1:]
        for name, update in zip(names, updates, strict=True):
            self.masters[name] *= 1 - lr * self._decay
            self.masters[name] -= lr * max(1.0, rows / columns) ** 0.5 * update


def _is_matrix(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and "embed" not in name


def _orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each of `(n, rows, columns)`, about, in float32."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    nearest: Tensor = x.mT if tall else x
    return nearest.float()
