"""A model with two large products, for tests of what the clock decides: a norm with gate and up, down with the residual."""
import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, width=512):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.RMSNorm(width, eps=1e-6), *(nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
