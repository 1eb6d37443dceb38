// The products of a few rows of floats with weights of int8 where they lie.

// totals[r] = y[r] . (q scale), as one vector whose lanes are still to be added; a scale for each `group` of K.
template <int R>
static inline void scaled_dots(const int8_t* q, const float* scale, int64_t scale_column, int64_t group, const float* y, int64_t y_row, Vector (*totals)[VL]) {
    Vector sums[R] = {};
    for (int64_t k = 0; k < K; k += group, scale += scale_column) {
        Vector parts[4][R] = {};
        int64_t g = k;
        for (; g + 4 * VL <= k + group; g += 4 * VL) {
            __builtin_prefetch(q + g + AHEAD, 0, 2);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                const Vector v = load_vector(q + g + n * VL);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) parts[n][r] += v * load_vector(y + r * y_row + g + n * VL);
            }
        }
        for (; g < k + group; g += VL) {  // groups that are no multiple of four vectors
            const int count = int(smaller(VL, k + group - g));
            const Vector v = gather_vector(q + g, 1, count);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) parts[0][r] += v * gather_vector(y + r * y_row + g, 1, count);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] += ((parts[0][r] + parts[1][r]) + (parts[2][r] + parts[3][r])) * *scale;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) totals[r][0] = sums[r];
}

// to[r][c] = y[r] . w[first + c], dequantised; `to` is written in whole vectors of columns
template <int R>
static __attribute__((noinline)) void float_dots_of(const int8_t* q, int64_t q_row, const Scales& scales, int64_t group, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    for (int64_t c = 0; c < columns; c += VL) {
        Vector totals[R][VL] = {};
        for (int n = 0; n < VL && c + n < columns; ++n) {
            if (group == K) dots<R>(q + (c + n) * q_row, y, y_row, reinterpret_cast<Vector (*)[VL]>(&totals[0][n]));
            else scaled_dots<R>(q + (c + n) * q_row, scales.data + (c + n) * scales.row, scales.column, group, y, y_row, reinterpret_cast<Vector (*)[VL]>(&totals[0][n]));
        }
        const Vector steps = group == K ? scales_of(scales, c, columns - c) : broadcast(1.0f);
        for (int r = 0; r < R; ++r) {
            transpose(totals[r]);
            Vector total = totals[r][0];
#pragma GCC unroll 16
            for (int lane = 1; lane < VL; ++lane) total += totals[r][lane];
            store_vector(to + r * to_row + c, total * steps);
        }
    }
}

template <int R>
INLINE bool float_rows(const int8_t* q, int64_t q_row, const Scales& scales, int64_t group, int64_t columns, const float* y, int64_t y_row, int64_t rows, float* to, int64_t to_row) {
    if constexpr (STEPS >> R & 1)
        if (rows >= R) {
            float_dots_of<R>(q, q_row, scales, group, columns, y, y_row, to, to_row);
            return true;
        }
    return false;
}
// The same for any number of rows of y, and the columns [first, first + columns) of a weight
static void float_columns(const Weight& weight, const Scales& scales, int64_t group, int64_t first, int64_t columns, const float* y, int64_t y_row, int64_t rows, float* to, int64_t to_row) {
    const int8_t* q = static_cast<const int8_t*>(weight.data) + first * weight.row;
    const Scales own = {scales.data + first * scales.row, scales.row, scales.column};
    for (int64_t r = 0; r < rows;) {
        const float* from = y + r * y_row;
        float* at = to + r * to_row;
        if (float_rows<4>(q, weight.row, own, group, columns, from, y_row, rows - r, at, to_row)) r += 4;
        else if (float_rows<3>(q, weight.row, own, group, columns, from, y_row, rows - r, at, to_row)) r += 3;
        else if (float_rows<2>(q, weight.row, own, group, columns, from, y_row, rows - r, at, to_row)) r += 2;
        else if (float_rows<1>(q, weight.row, own, group, columns, from, y_row, rows - r, at, to_row)) r += 1;
    }
}
