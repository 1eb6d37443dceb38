// The micro-kernels that linear_panels.h declares. The includer has said what a lane holds (EACH, `add_product`), how weights may lie (BY_ROWS,
// BY_COLUMNS, APART), and what a Source is.

// A lane in all lanes.
INLINE Vector spread(const float* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return bit_cast<Vector>(bits - BitVector{});
}
template <int R, int V>
LINKAGE ONE_FOR_ALL void multiply(const float* y, int64_t y_row, const float* panel, int64_t depth, float* to, int64_t to_row, bool first) {
    Vector sums[R][V] = {};
    if (!first)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums[r][v] = load_vector(to + r * to_row + v * VL);
    for (int64_t k = 0; k < depth; ++k, panel += PANEL) {
        Vector columns[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) __builtin_prefetch(panel + 8 * PANEL + v * VL);  // from the L2 cache: 2% faster
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) columns[v] = load_vector(panel + v * VL);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const Vector x = spread(y + r * y_row + k);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[r][v] = add_product(sums[r][v], x, columns[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store_vector(to + r * to_row + v * VL, sums[r][v]);
}

template <class Source>
LINKAGE __attribute__((noinline)) void pack(const Source source, int64_t n, int64_t columns, int64_t start, int64_t size, int64_t depth, float* __restrict to) {
    if constexpr (BY_COLUMNS)
        if (source.by_columns()) {
            for (int64_t k = start; k < start + EACH * depth; k += EACH, to += PANEL)
                for (int c = 0; c < PANEL; c += VL) store_vector(to + c, c < columns ? source.across(n + c, k, size - k, int(smaller(VL, columns - c))) : Vector{});
            return;
        }
    if constexpr (BY_ROWS || APART)
        for (int c = 0; c < PANEL && c < columns; c += VL)
            for (int64_t k = 0; k < depth; k += VL) {
                Vector rows[VL];
#pragma GCC unroll 16
                for (int r = 0; r < VL; ++r) {
                    rows[r] = c + r < columns ? source.along(n + c + r, start + EACH * k, size - start - EACH * k) : Vector{};
                    __builtin_prefetch(source.at(n + c + r + VL, start + EACH * k), 0, 2);
                }
                transpose(rows);
#pragma GCC unroll 16
                for (int r = 0; r < VL; ++r)
                    if (k + r < depth) store_vector(to + (k + r) * PANEL + c, rows[r]);
            }
}
