"""Ops that are their parts: each definition against torch in float64, torch's own opcheck, and what the table of expansions says."""
import pytest
import torch
import torch.nn.functional as F

from tileweld.compiler.ir.expansions import EXPANSIONS
from tileweld.compiler.ir.rotary import PAIRS

T = torch.ops.tileweld
F64 = torch.float64



def arguments(dtype=F64):
    """name -> arguments of a call, floats in dtype and requiring gradients"""
    def x(*shape):
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    tables, indices = [x(7, 6), x(5, 6), x(3, 6)], [torch.randint(0, 7, (2, 3)), torch.randint(0, 5, (3,)), None]
    calls = {
        "add_rms_norm": (x(2, 3, 6), x(2, 3, 6), x(6), 1e-5, 1.0, "after"),
        "add_layer_norm": (x(2, 3, 6), x(2, 3, 6), x(6), x(6), 1e-5),
        "embedding_norm": (tables, indices, [2, -1, -1], [2.0, 1.0, 1.0], [None, None, None], "layer", x(6), x(6), 1e-5, 0.0, "after"),
    }
    return calls | {f"rotary {pairs} {columns}": (x(2, 3, 6), x(3, columns), x(3, columns), 4, pairs) for pairs in PAIRS for columns in (2, 4)}


def op_of(name):
    return getattr(T, name.split()[0]).default


@pytest.mark.parametrize("name", arguments())
def test_opcheck_and_gradcheck(name):
    op, call = op_of(name), arguments()[name]
    torch.library.opcheck(op, call)
    leaves, spec = torch.utils._pytree.tree_flatten(call)
    places = [k for k, a in enumerate(leaves) if isinstance(a, torch.Tensor) and a.requires_grad]

    def run(*given):
        full = list(leaves)
        for k, a in zip(places, given):
            full[k] = a
        return op(*torch.utils._pytree.tree_unflatten(full, spec))

    assert torch.autograd.gradcheck(run, [leaves[k] for k in places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", arguments())
def test_whole_and_in_parts_are_one(name, dtype):
    call = torch.utils._pytree.tree_map(lambda a: a.detach() if isinstance(a, torch.Tensor) else a, arguments(dtype)[name])
    for whole, part in zip(*(r if isinstance(r, tuple) else (r,) for r in (op_of(name)(*call), EXPANSIONS[op_of(name)](*call)))):
        assert torch.equal(whole, part) and whole.dtype == part.dtype == dtype


def test_every_expansion_belongs_to_a_registered_op():
    assert all(isinstance(op, torch._ops.OpOverload) and op.namespace == "tileweld" for op in EXPANSIONS)


def test_residual_norms_are_torchs():
    (x, r), (w, b) = torch.randn(2, 4, 6, dtype=F64), torch.randn(2, 6, dtype=F64)
    s, y = T.add_layer_norm(x, r, w, b, 1e-5)
    torch.testing.assert_close((s, y), (x + r, F.layer_norm(x + r, (6,), w, b)))
    s, y = T.add_rms_norm(x, r, w, 1e-5, 0.0, "after")
    torch.testing.assert_close((s, y), (x + r, F.rms_norm(x + r, (6,), w, 1e-5)))


def test_the_sum_has_eagers_rounding():
    x, r = torch.randn(50, 64).bfloat16(), torch.randn(50, 64).bfloat16() * 40
    assert torch.equal(T.add_layer_norm(x, r, None, None, 1e-5)[0], x + r)


@pytest.mark.parametrize("pairs", PAIRS)
def test_rotary_turns_every_pair(pairs):
    x, angles = torch.randn(3, 8, dtype=F64), torch.randn(3, 3, dtype=F64)
    y = T.rotary(x, angles.cos(), angles.sin(), 6, pairs)
    together, apart = (lambda t: torch.complex(t[:, 0:6:2], t[:, 1:6:2])), (lambda t: torch.complex(t[:, :3], t[:, 3:6]))
    before, after = apart if pairs == "half-split" else together, together if pairs == "interleaved" else apart
    torch.testing.assert_close(after(y), before(x) * torch.polar(torch.ones_like(angles), angles))
    assert torch.equal(y[:, 6:], x[:, 6:])


def test_rotary_says_what_is_wrong():
    x, c = torch.randn(3, 8), torch.randn(3, 4)
    for wrong, text in (((x, c, c, 10, "half-split"), "width 10"), ((x, c, c, 6, "half-split"), "4 columns"), ((x, c, c, 8, "upside down"), "pairs")):
        with pytest.raises(RuntimeError, match=text):
            T.rotary(*wrong)


def test_padding_rows_have_no_gradient_and_an_index_out_of_range_raises():
    (tables, indices, *rest) = arguments()["embedding_norm"]
    indices[0] = torch.tensor([[2, 1, 2], [0, 2, 3]])
    T.embedding_norm(tables, indices, *rest)[0].square().sum().backward()
    assert not tables[0].grad[2].any() and tables[0].grad[1].any()
    for position in (7, -1):
        indices[0][0, 0] = position
        with pytest.raises(IndexError, match="index out of range"):
            T.embedding_norm([t.detach() for t in tables], indices, *rest)
