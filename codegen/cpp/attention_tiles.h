// The pieces of a row tile: matrix products of packed panels, and the running softmax of one row.
//
// Rows are taken MR at a time. For a block of keys the scores [MR, block] are made from panels of transposed keys
// [D][PANEL], changed in place to probabilities, and multiplied with the values, so that they never leave the L1 cache.

constexpr int PANEL = NV * VL;                              // keys in a packed panel
constexpr int BLOCK = D <= 128 && DV <= 128 ? 256 : D <= 256 && DV <= 256 ? 128 : PANEL;  // keys between two updates of the running maximum: K and V blocks stay in L2
constexpr int DVP = int(round_up(DV, VL));                  // value columns, padded
constexpr int VALUE_STRIPES = (DVP / VL + NV - 1) / NV;     // values are packed in stripes of at most NV vectors
constexpr int STRIPE = (DVP / VL + VALUE_STRIPES - 1) / VALUE_STRIPES;  // vectors in a stripe; the last may have fewer
constexpr float LOG2E = 1.44269504088896341f;

// c[MR][ldc] (+)= a[MR][lda] b[depth][N * VL]
template <int N, bool accumulate>
INLINE void multiply_rows(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t depth, float* __restrict c, int64_t ldc) {
    Vector sums[MR][N];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] = accumulate ? load_vector(c + r * ldc + n * VL) : Vector{};
#pragma GCC unroll 2
    for (int64_t d = 0; d < depth; ++d) {
        Vector columns[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) columns[n] = load_vector(b + d * N * VL + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[r][n] += a[r * lda + d] * columns[n];
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_vector(c + r * ldc + n * VL, sums[r][n]);
}

// A row's softmax so far: probabilities are exp(x - top), top the largest score; total is their sum.
struct RowState {
    float top, total;
};

// exp(x - y) for x <= y
INLINE float ratio(float x, float y) { return __builtin_exp2f((x - y) * LOG2E); }

// Nothing seen but the sink, one logit of the denominator (-inf for none).
INLINE RowState start_row(float sink) {
    const float infinity = std::numeric_limits<float>::infinity();
    return {sink, sink == -infinity ? 0.0f : (sink < infinity ? 1.0f : std::numeric_limits<float>::quiet_NaN())};
}

// scores[0, width) become probabilities; returns the factor by which the row's earlier sums shrink. Up to the next
// multiple of VL the row is written with zeros.
INLINE float update_row(RowState& state, float* __restrict scores, int64_t width) {
    const float infinity = std::numeric_limits<float>::infinity();
    const int64_t padded = round_up(width, VL);
    for (int64_t j = width; j < padded; ++j) scores[j] = -infinity;
    Vector tops[2] = {broadcast(-infinity), broadcast(-infinity)};
    int64_t j = 0;
    for (; j + 2 * VL <= padded; j += 2 * VL) {
        tops[0] = larger(load_vector(scores + j), tops[0]);
        tops[1] = larger(load_vector(scores + j + VL), tops[1]);
    }
    if (j < padded) tops[0] = larger(load_vector(scores + j), tops[0]);
    const float largest = max_of(larger(tops[0], tops[1]));
    const float top = largest > state.top ? largest : state.top;  // a NaN score is no maximum: it reaches the row by its probability
    const float shift = top == -infinity ? 0.0f : top;            // no key so far: -inf - -inf would be NaN
    const float shrink = state.top == top ? 1.0f : ratio(state.top, shift);
    Vector sums[2] = {Vector{}, Vector{}};
    for (j = 0; j + 2 * VL <= padded; j += 2 * VL) {
        // The difference first: a score of finfo.min times LOG2E would be -inf.
        const Vector p0 = exp2_of((load_vector(scores + j) - shift) * LOG2E), p1 = exp2_of((load_vector(scores + j + VL) - shift) * LOG2E);
        store_vector(scores + j, p0);
        store_vector(scores + j + VL, p1);
        sums[0] += p0;
        sums[1] += p1;
    }
    if (j < padded) {
        const Vector p = exp2_of((load_vector(scores + j) - shift) * LOG2E);
        store_vector(scores + j, p);
        sums[0] += p;
    }
    state = {top, state.total * shrink + sum_of(sums[0] + sums[1])};
    return shrink;
}

// Could masked keys, whose score is the finite FILL, add to this row? exp(FILL - maximum) is 0 in float32 below -104.
INLINE bool needs_fill(const RowState& state) {
    return FINITE_FILL && double(state.top) <= double(FILL) + 104.0;
}

template <class Arguments>  // of a forward pass
INLINE void write_row(const Arguments& call, int64_t b, int64_t h, int64_t i, const float* sums, const RowState& state) {
    const bool empty = EMPTY_IS_ZERO && state.total == 0.0f;
    const float factor = empty ? 0.0f : 1.0f / state.total;  // a row that saw nothing is 0 * inf = NaN
    if constexpr (LSE) call.lse[b * call.lse_stride[0] + h * call.lse_stride[1] + i * call.lse_stride[2]] = state.total == 0.0f ? -std::numeric_limits<float>::infinity() : state.top + __builtin_logf(state.total);
    const int64_t* stride = call.out_stride;
    Element* out = call.out + b * stride[0] + h * stride[1] + i * stride[2];
    if (stride[3] == 1)
        for (int d = 0; d < DV; ++d) store_element(out + d, sums[d] * factor);
    else
        for (int d = 0; d < DV; ++d) store_element(out + d * stride[3], sums[d] * factor);
}

// Starting threads costs as much as half a million multiplications, about 10 us.
INLINE bool is_worth_threads(const Call& call) { return double(call.B * call.H * call.Tq) * double(call.Tk) * (D + DV) > 5e5; }

constexpr int64_t common_divisor(int64_t x, int64_t y) { return y == 0 ? x : common_divisor(y, x % y); }
// Query heads, neighbours, that have the same key in every part.
INLINE int64_t shared_key_heads(const Call& call) {
    int64_t shared = call.H / call.Hk[0];
    for (int part = 1; part < PARTS; ++part) shared = common_divisor(shared, call.H / call.Hk[part]);
    return shared;
}
