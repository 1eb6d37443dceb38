"""The templates that linear_text.py fills: bodies of the jit functions of ``tileweld::linear``."""

KERNEL = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """$what"""
    $body
'''

FUNCTION = '''
@triton.jit
def $name($arguments):
    $body
'''

#: a program's rows and columns; INDEX is tl.int64 where an offset may exceed 2^31
HEAD = '''
$select
WIDTH: tl.constexpr = $spread
blocks_m = tl.cdiv(M, BLOCK_M)
blocks_n = tl.cdiv($slots, WIDTH)
# eight blocks of rows in turn: their columns of the weights stay in the L2 cache
band = tile // (8 * blocks_n)
inner = tile % (8 * blocks_n)
height = tl.minimum(blocks_m - band * 8, 8)
block_m = band * 8 + inner % height
block_n = inner // height
rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX)
i = rows[:, None]
$columns
'''

#: the columns of K that are a program's, all of them or one share
K_SHARE = '''\
k_first = 0
k_last = K
if SPLIT:
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    k_first = split * share
    k_last = tl.minimum(k_first + share, K)
ks = tl.arange(0, BLOCK_K)
'''

WALK = '\n' + K_SHARE + '''\
x_tile = x_ptr + i * stride_xm + (k_first + ks).to(INDEX)[None, :] * stride_xk
$tiles
$squares
$zeros
for k0 in tl.range(k_first, k_last, BLOCK_K):
    if EVEN_K:
        x = tl.load(x_tile, mask=i < M, other=0.0)
    else:
        x = tl.load(x_tile, mask=(i < M) & (k0 + ks < K)[None, :], other=0.0)
    $transform
    $products
    x_tile += BLOCK_K * tl.cast(stride_xk, INDEX)
'''

TILED = '''
$head
$walk
$scaled
if SPLIT:
    $store
else:
    $finish
'''

COMBINE = '''
$head
$zeros
for share in tl.range(0, splits):
    $add
$finish
'''

GEMV = '''
$select
WIDTH: tl.constexpr = $spread
block_n = tile
rows = tl.arange(0, ROWS).to(INDEX)
i = rows[:, None]
$columns
ks = tl.arange(0, BLOCK_K)
$statistics
$zeros
for k0 in tl.range(0, K, BLOCK_K):
    k = (k0 + ks).to(INDEX)[None, :]
    $loads
    if EVEN_K:
        xf = tl.load($x, mask=i < M, other=0.0).to(tl.float32)
    else:
        xf = tl.load($x, mask=(i < M) & (k < K), other=0.0).to(tl.float32)
    $squares
    y = $transform
    $keep
    y = y[:, None, :]
    $products
$sums
$finish
'''

#: K = 0 has the norm of no elements; its products are 0 and stay it
RECIPROCAL = "r = tl.where(K > 0, 1.0 / tl.sqrt_rn(sq / tl.maximum(K, 1) + eps), 0.0)"

STATISTICS = '''
$mean
sq = $zeros
for k0 in tl.range(0, K, $block):
    k = $k
    xf = tl.load($x, mask=$mask, other=0.0).to(tl.float32)
    centred = $centred
    sq += tl.sum(centred * centred, $axis)
$reciprocal
'''

PREPARE = '''
i = tl.cast(tl.program_id(0), tl.int64)
x_row = x_ptr + i * stride_xm
y_row = y_ptr + i * K
ks = tl.arange(0, BLOCK)
$statistics
for k0 in tl.range(0, K, BLOCK):
    k = k0 + ks
    xf = tl.load($x, mask=k < K, other=0.0).to(tl.float32)
    y = $transform
    tl.store(y_row + k, y.to(y_ptr.dtype.element_ty), mask=k < K)
'''
