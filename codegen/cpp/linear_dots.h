// The products of few rows with weights of floats, where they lie; linear_few.h asks for them.

constexpr int64_t AHEAD = 8192;  // bytes, into the L2 cache: 22.8 against 14.4 GB/s at K = 576, where the hardware's own prefetcher is late; elsewhere no loss

// Vectors of K between two branches: the most that divide K, else 8.
template <int R>
constexpr int unrolled() {
    for (int n = 24 / R; n > 8; --n)
        if (K % (n * VL) == 0) return n;
    return K >= 8 * VL ? 8 : 1;
}

// totals[r] = y[r] . w, as one vector whose lanes are still to be added, for R rows of y. A weight is read as one stream: several of its rows at
// a time, which would load y less often, were slower (four: 13.3, eight: 15.6, one: 19.6 GB/s at K = 576).
template <int R, class W>
static inline void dots(const W* w, const float* y, int64_t y_row, Vector (*totals)[VL]) {
    constexpr int U = R <= 2 ? 4 : 2, STEP = unrolled<R>();  // four to eight sums at a time hide the latency of an FMA
    Vector sums[U][R] = {};
    int64_t k = 0;
    for (; k + STEP * VL <= K; k += STEP * VL)
#pragma GCC unroll 64
        for (int n = 0; n < STEP; ++n) {
            if (n * VL * sizeof(W) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(w + k + n * VL) + AHEAD, 0, 2);
            const Vector v = load_vector(w + k + n * VL);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[n % U][r] += v * load_vector(y + r * y_row + k + n * VL);
        }
    for (; k + VL <= K; k += VL) {
        const Vector v = load_vector(w + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[0][r] += v * load_vector(y + r * y_row + k);
    }
    if constexpr (K % VL != 0) {
        const Vector v = gather_part(w + k, 1, int(K - k));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[0][r] += v * gather_part(y + r * y_row + k, 1, int(K - k));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        Vector total = sums[0][r];
#pragma GCC unroll 4
        for (int n = 1; n < U; ++n) total += sums[n][r];
        totals[r][0] = total;
    }
}

// to[r][c] = y[r] . w[c]; `to` is written in whole vectors of columns
template <int R, class W>
static __attribute__((noinline)) void dots_of(const W* w, int64_t w_row, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    for (int64_t c = 0; c < columns; c += VL) {
        Vector totals[R][VL] = {};
        for (int n = 0; n < VL && c + n < columns; ++n) dots<R>(w + (c + n) * w_row, y, y_row, reinterpret_cast<Vector (*)[VL]>(&totals[0][n]));
        for (int r = 0; r < R; ++r) {
            transpose(totals[r]);
            Vector total = totals[r][0];
#pragma GCC unroll 16
            for (int lane = 1; lane < VL; ++lane) total += totals[r][lane];
            store_vector(to + r * to_row + c, total);
        }
    }
}

// The same where the columns of w lie together, `w_column` from one k to the next: a transposed weight, [K, N] in memory.
// U of its rows at a time go through all columns and are added to the sums, which stay in the L1 cache: U streams, as the hardware's prefetcher likes them.
template <int R, int U, class W, class Load>
INLINE void add_column(const W* w, int64_t w_column, const float* y, int64_t y_row, float* to, int64_t to_row, Load load) {
    Vector sums[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = load_vector(to + r * to_row);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
        __builtin_prefetch(w + (u + U) * w_column, 0, 2);
        const Vector row = load(w + u * w_column);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] += row * y[r * y_row + u];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_vector(to + r * to_row, sums[r]);
}
template <int R, int U, class W>
INLINE void add_rows(const W* w, int64_t w_column, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) add_column<R, U>(w + c, w_column, y, y_row, to + c, to_row, [](const W* from) { return load_vector(from); });
    if (c < columns) add_column<R, U>(w + c, w_column, y, y_row, to + c, to_row, [&](const W* from) { return gather_part(from, 1, int(columns - c)); });
}
template <int R, class W>
static __attribute__((noinline)) void transposed_dots_of(const W* w, int64_t w_column, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    constexpr int U = 8 / R;
    for (int r = 0; r < R; ++r) std::memset(to + r * to_row, 0, sizeof(float) * round_up(columns, VL));
    int64_t k = 0;
    for (; k + U <= K; k += U) add_rows<R, U>(w + k * w_column, w_column, columns, y + k, y_row, to, to_row);
    for (; k < K; ++k) add_rows<R, 1>(w + k * w_column, w_column, columns, y + k, y_row, to, to_row);
}

template <int R, class W>
INLINE bool dot_rows(const W* w, int64_t w_row, int64_t w_column, int64_t columns, const float* y, int64_t y_row, int64_t rows, float* to, int64_t to_row) {
    if constexpr (STEPS >> R & 1)
        if (rows >= R) {
            if (BY_ROWS && (!BY_COLUMNS || w_column == 1)) dots_of<R>(w, w_row, columns, y, y_row, to, to_row);
            else if (BY_COLUMNS) transposed_dots_of<R>(w, w_column, columns, y, y_row, to, to_row);
            return true;
        }
    return false;
}
template <class W>
INLINE void dot_columns(const W* w, int64_t w_row, int64_t w_column, int64_t columns, const float* y, int64_t y_row, int64_t rows, float* to, int64_t to_row) {
    for (int64_t r = 0; r < rows;) {  // later rows of y find the rows of the weight in the L2 cache
        const float* from = y + r * y_row;
        float* at = to + r * to_row;
        if (dot_rows<4>(w, w_row, w_column, columns, from, y_row, rows - r, at, to_row)) r += 4;
        else if (dot_rows<3>(w, w_row, w_column, columns, from, y_row, rows - r, at, to_row)) r += 3;
        else if (dot_rows<2>(w, w_row, w_column, columns, from, y_row, rows - r, at, to_row)) r += 2;
        else if (dot_rows<1>(w, w_row, w_column, columns, from, y_row, rows - r, at, to_row)) r += 1;
    }
}
