"""The modules that `quantize_` puts in the place of linear layers and of embeddings: int8 rows, float32 scales, as buffers."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler.errors import ConversionError
from ..compiler.ir import int8_linear as _int8_linear_op  # noqa: F401 (registers the ops)
from .read_only import ReadOnly

ops = torch.ops.tileweld


class _Rows(nn.Module):
    """q int8 [N, K] and scale float32 [N, K / group]. The scales stay float32 whatever dtype the model is converted to."""

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype  # that the weight had
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def __setattr__(self, name, value):
        if name == "weight":
            raise ConversionError("the weight of an int8 layer cannot be set", cure="set weights first, then quantize_; or put a float layer in its place")
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # model.half() makes halves here too
        return self

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 for the row."""
        return self.q.shape[1] // self.scale.shape[1] if self.scale.shape[1] > 1 else 0


class Int8Linear(_Rows):
    """y = x w^T + bias with w = q scale, computed as `tileweld::int8_linear` with this activation says; x [..., K] of a float dtype.

    activation: "float", "int8" or "mixed"; threshold: of "mixed"; columns: bool [K], its outliers where they are known from calibration; error: |w - q scale| / |w|, where it is known.
    In eager mode it runs on the definition, which is right and slow. Under ``torch.compile(backend="tileweld")`` it is one of the fused
    int8 kernels, with norm, activation, residual in it as for a float layer; under other backends activations stay floats.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "float", threshold: float = math.inf, columns: Tensor | None = None, dtype: torch.dtype = torch.float32,
                 error: float | None = None):
        super().__init__(q, scale, dtype)
        self.register_buffer("bias", bias)
        self.register_buffer("columns", columns)
        self.activation, self.threshold, self.error = activation, threshold, error
        self.out_features, self.in_features = q.shape

    @property
    def weight(self) -> Tensor:
        """q scale [N, K] in the dtype that the weight had, made anew at each reading, for code that looks at it; what writes to it is refused (read_only.py)."""
        return _read_only(self._dequantized(self.dtype))

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        mixed = self.activation == "mixed"  # others read neither: each attribute read is a guard of Dynamo's, which stays
        return ops.dequantize_rows(self.q, self.scale, dtype, self.activation, self.threshold if mixed else math.inf, self.columns if mixed else None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the int8 pass makes int8_linear of it, after all that fuses linears
            return F.linear(x, self._dequantized(x.dtype), self.bias)
        x = _as_autocast(x)
        if not (x.is_floating_point() and x.dim() > 0 and x.shape[-1] == self.in_features):  # rows of another length could still be reshaped
            raise RuntimeError(f"an int8 layer of {self.in_features} inputs is given {x.dtype} {[*x.shape]}, expected floats [..., {self.in_features}]")
        captures, text = ([], "a0") if self.bias is None else ([self.bias], "a0 + c0[j]")
        (y,) = ops.int8_linear(x.reshape(math.prod(x.shape[:-1]), self.in_features), [self.q], [self.scale], captures, [], "", 0.0, "x", [text], [0, 0], self.activation, self.threshold, self.columns)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        words = {"float": "weight only", "int8": "dynamic", "mixed": f"llm_int8, {'calibrated columns' if self.columns is not None else f'threshold {self.threshold:g}'}"}[self.activation]
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {words}" + (f", groups of {self.group}" if self.group else "")


def _read_only(weight: Tensor) -> Tensor:
    return weight.as_subclass(ReadOnly) if type(weight) is Tensor and not torch.compiler.is_compiling() else weight


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that a float layer would compute in."""
    is_cast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_cast else x


class Int8Embedding(_Rows):
    """Rows of q scale [N, K] by their numbers, in `dtype`; q and scale are those of the projection that the table is tied to, if it is. error: |w - q scale| / |w|, where it is known."""

    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False  # nn.Embedding's, which adapters pass on

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype, padding_idx: int | None = None, error: float | None = None):
        super().__init__(q, scale, dtype)
        self.padding_idx, self.error = padding_idx, error
        self.num_embeddings, self.embedding_dim = q.shape

    @property
    def weight(self) -> Tensor:
        """The whole table in `dtype`, made anew at each reading; what writes to it is refused."""
        return _read_only(ops.dequantize_rows(self.q, self.scale, self.dtype, "float", math.inf, None))

    def forward(self, ids: Tensor) -> Tensor:
        rows, scale = F.embedding(ids, self.q).float(), F.embedding(ids, self.scale)  # which refuses numbers below 0, as the float table did; q[ids] would count from the end
        if scale.shape[-1] == 1:
            return (rows * scale).to(self.dtype)
        return (rows.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"
