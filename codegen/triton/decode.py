"""The kernels for few query rows (decoding): heads of a group packed into one tile, keys split over programs.

All query heads of a KV head read the same keys, so a tile holds BLOCK_M = Tq * group rows (padded to 16) and reads K and V
once. One (batch, KV head) pair is too little work for a GPU: its visible keys are split over programs, each writes
(acc, m, l) in fp32, and `combine_kernel` joins them: M = max m, out = sum 2^(m - M) acc / sum 2^(m - M) l (Flash-Decoding).

With a finite fill, rows that only the joined maximum shows to be near it are computed again by `decode_kernel` with REDO.
"""
from __future__ import annotations

from .kernel import AttentionText, widened_strides
from .source import fill

DECODE = '''
@triton.jit(do_not_specialize=[$unspecialized])
def decode_kernel($arguments):
    """Grid (batch * KV head * row block, split). SPLIT: write (acc, m, l) of a share of the keys; else the output.
    REDO: all keys, for the rows that combine_kernel marked."""
    $wide
    blocks = tl.cdiv(Tq * GROUP_K, BLOCK_M)
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    split = tl.program_id(1)
    KV_HEADS = H // GROUP_K
    b = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = packed // GROUP_K  # query position of each row
    heads = kv_head * GROUP_K + packed % GROUP_K
    i = rows[:, None]
    h = heads[:, None]
    i_lo = block * BLOCK_M // GROUP_K
    i_hi = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP_K, Tq - 1)
    q_rows = q_ptr + tl.cast(b, tl.int64) * stride_qb + tl.cast(h, tl.int64) * stride_qh + tl.cast(i, tl.int64) * stride_qi
    $keys
    v_ptr += tl.cast(b, tl.int64) * stride_vb + tl.cast(kv_head, tl.int64) * stride_vh
    out_rows = out_ptr + tl.cast(b, tl.int64) * stride_ob + tl.cast(h, tl.int64) * stride_oh + tl.cast(i, tl.int64) * stride_oi
    record = (tl.cast(b, tl.int64) * H + heads) * Tq + rows  # the row of (acc, m, l)
    $queries
    $hoisted
    $start
    $bounds
    $redo
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), splits), BLOCK_N) * BLOCK_N
        first += split * share
        last = tl.minimum(last, first + share)
        $sinkless
    $loop
    if SPLIT:
        tl.store(m_ptr + record * splits + split, m, mask=rows < Tq)
        tl.store(l_ptr + record * splits + split, l, mask=rows < Tq)
        if first < last:  # combine_kernel reads no acc of an empty share
            acc_rows = acc_ptr + (record * splits + split)[:, None] * $value_dim
            $partial
    else:
        $exact
        $keep
        $finish
'''

REDO = '''
if REDO:
    marked = tl.load(near_ptr + record, mask=rows < Tq, other=0)
    first = tl.zeros_like(first)
    last = tl.where(tl.max(marked, 0) == 1, Tk, 0)
'''

COMBINE = '''
@triton.jit(do_not_specialize=["H", "Tq", "splits"])
def combine_kernel($arguments, SPLITS: tl.constexpr):
    """Joins the shares of one row; the grid is batch * head * query position."""
    row = tl.cast(tl.program_id(0), tl.int64)
    i = row % Tq
    h = row // Tq % H
    b = row // Tq // H
    part = tl.arange(0, SPLITS)
    m = tl.load(m_ptr + row * splits + part, mask=part < splits, other=float("-inf"))
    l = tl.load(l_ptr + row * splits + part, mask=part < splits, other=0.0)
    top = tl.max(m, 0)
    weight = tl.exp2((m - tl.where(top == float("-inf"), 0.0, top))$unit)
    total = tl.sum(weight * l, 0)
    $store_lse
    $total
    $mark
    out_row = out_ptr + b * stride_ob + h * stride_oh + i * stride_oi
    filled = ((m != float("-inf")) | (l != 0.0))[:, None] & (part < splits)[:, None]
    $outputs
'''



def combine_parameters(lse: bool) -> list[str]:
    """The parameters of combine_kernel."""
    return ["out_ptr", "acc_ptr", "m_ptr", "l_ptr", "near_ptr", *(["lse_ptr"] if lse else []), "stride_ob", "stride_oh", "stride_oi", "stride_od", "H", "Tq", "splits"]


def decode_kernels(text: AttentionText, parameters: list[str], captures: list[str], sizes: list[str]) -> str:
    """The two jit functions, after text.kernel(); sets text.decode, the parameters of decode_kernel."""
    sink = text.variant.sink_expr is not None
    finite = text.finite_fill
    loop = text.call(text.arguments, "first", "last", True, test=not text.test_reads_head)  # a test that reads h would be one per row here
    exact, keep = text.exact(text.arguments, packed=True), "keep = i < Tq"
    if finite:
        loop = f"if REDO:\n    {text.call(text.arguments, 'first', 'last', True, exact=True)}\nelse:\n    {loop}"
        exact = ["if not REDO:", *("    " + line for line in exact)]
        keep = "if REDO:\n    keep = (marked == 1)[:, None]\nelse:\n    keep = i < Tq"
    body = dict(keys=[f"{x}_ptr += tl.cast(b, tl.int64) * stride_{x}b + tl.cast({_key_head(x)}, tl.int64) * stride_{x}h" for x in text.keys] + text.key_head("kv_head"), queries=text.queries(), hoisted=text.hoists(), start=text.start(packed=True), redo=REDO.strip() if finite else [], bounds=text.bounds(packed=True),
                sinkless=['m = tl.where(split == 0, m, float("-inf"))  # the sink counts once', "l = tl.where(split == 0, l, 0.0)"] if sink else [],
                loop=loop, exact=exact, keep=keep, finish=text.finish("keep", "record"),
                partial=[f"tl.store(acc_rows + vdims{n}[None, :], acc{n}, mask=(i < Tq){_inside(c, f'vdims{n}[None, :]')})" for n, c in enumerate(text.v_chunks)])
    names, unspecialized = text.parameters(body, captures, sizes)
    text.decode = ["out_ptr", "acc_ptr", "m_ptr", "l_ptr", "near_ptr", *parameters[1:], *names, "splits"]
    constants = [f"{name}: tl.constexpr" for name in ("BLOCK_M", "BLOCK_N", "SPLIT", "REDO", "INDEX")]
    kernel = fill(DECODE, arguments=", ".join([*text.decode, *constants]), unspecialized=unspecialized + ', "splits"', value_dim=text.value_dim, wide=widened_strides(parameters), **body)
    outputs = []
    for n, c in enumerate(text.v_chunks):
        outputs += [f"vdims{n} = {c.start} + tl.arange(0, {c.width})",
                    f"acc{n} = tl.load(acc_ptr + (row * splits + part)[:, None] * {text.value_dim} + vdims{n}[None, :], mask=filled{_inside(c, f'vdims{n}[None, :]')}, other=0.0)",
                    f"tl.store(out_row + vdims{n} * stride_od, (tl.sum(acc{n} * weight[:, None], 0) / total).to(out_ptr.dtype.element_ty), mask=(vdims{n} < {c.start + c.used}))"]
    combine = fill(COMBINE, unit=text.times_unit, arguments=", ".join(combine_parameters(text.lse)), store_lse=[f"tl.store(lse_ptr + row, {text.natural('top', 'total')})"] if text.lse else [], outputs=outputs, mark=[f"tl.store(near_ptr + row, tl.where(top <= {text.limit}, 1, 0))"] if text.finite_fill else [],
                   total=["total = tl.where(total == 0.0, 1.0, total)  # a row without a key gives 0, not 0/0"] if text.variant.empty == "zero" else [])
    return f"{kernel}\n\n{combine}"


def _key_head(letter: str) -> str:
    """The head of a part of the keys: a second part has as many heads as the first or fewer, its heads for whole groups of them."""
    return "kv_head" if letter == "k" else f"kv_head * GROUP_K // GROUP_{letter.upper()}"


def _inside(chunk, dims: str) -> str:
    return f" & ({dims} < {chunk.start + chunk.used})" if chunk.padded else ""
