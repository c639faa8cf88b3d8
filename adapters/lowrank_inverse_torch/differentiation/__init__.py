"""Derivatives of solutions and of operators' products, for torch's autograd."""

from lowrank_inverse.operators.differentiation import register as _register
from lowrank_inverse_torch.differentiation.solution import Rules as _Rules

_register("torch", _Rules())
