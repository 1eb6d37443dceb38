// What linear_few.h asks for where y becomes bytes: t and its step, and y itself for what is not bytes: outlier columns ("mixed"), and rows with inf or NaN.
// A weight's row of int8 is read from memory once; outliers find it in the L1 cache.

constexpr int FEW_TIMES = 4;  // chunks that a thread takes at a time: as many bytes as of floats
// A row: Step, t, y. Before all rows, in "mixed", the outliers: a count and the columns, then a mark for every column.
constexpr int64_t FEW_Y = round_up(STEP_SIZE, GRAIN) + BYTE_ROW, FEW_ROW = FEW_Y + Y_ROW, FEW_HEAD = MIXED ? round_up(1 + K, GRAIN) + round_up(K / 4 + VL, GRAIN) : 0;
constexpr int64_t few_size(int64_t rows) { return FEW_HEAD + rows * FEW_ROW; }
INLINE bool few_ready(const Call&) { return false; }

INLINE void make_few(const Call& call, float* to) {
    float* row = to + FEW_HEAD;
    for (int64_t i = 0; i < call.rows; ++i) make_row(call, i, row + i * FEW_ROW + FEW_Y);
    uint8_t* marks = nullptr;
    if constexpr (MIXED) {
        marks = reinterpret_cast<uint8_t*>(to + round_up(1 + K, GRAIN));
        mark_static(call, marks);
        if (call.columns == nullptr)
            for (int64_t i = 0; i < call.rows; ++i) mark_row(call, row + i * FEW_ROW + FEW_Y, marks);
        list_marked(marks, reinterpret_cast<int32_t*>(to));
    }
    for (int64_t i = 0; i < call.rows; ++i, row += FEW_ROW) {
        const Step step = quantise(row + FEW_Y, marks, reinterpret_cast<int8_t*>(row + GRAIN), BYTES, known_magnitude(call, i));
        std::memcpy(row, &step, sizeof(step));
        if (MIXED && step.finite)
            for (int64_t k = 0; k < K; ++k) row[FEW_Y + k] = marks[k] ? row[FEW_Y + k] : 0.0f;
    }
}

// sums[r] = t[r] . q and its excess, as one vector whose lanes are still to be added
template <int R>
static inline void byte_dots(const int8_t* q, const float* row, IntVector (*totals)[VL]) {
    constexpr int U = R <= 2 ? 4 : 2, STRETCH = 4 * VL, UNROLL = K >= 8 * STRETCH ? 8 : K >= 4 * STRETCH ? 4 : 1;
    IntVector sums[U][R] = {};
    const auto add = [&](int u, int64_t k, IntVector w) __attribute__((always_inline)) {
        const IntVector factors = as_factors(w);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[u][r] = dot4(sums[u][r], factors, load_bytes(reinterpret_cast<const int8_t*>(row + r * FEW_ROW + GRAIN) + k));
    };
    int64_t k = 0;
    for (; k + UNROLL * STRETCH <= K; k += UNROLL * STRETCH)
#pragma GCC unroll 8
        for (int n = 0; n < UNROLL; ++n) {
            __builtin_prefetch(q + k + n * STRETCH + AHEAD, 0, 2);
            add(n % U, k + n * STRETCH, load_bytes(q + k + n * STRETCH));
        }
    for (; k + STRETCH <= K; k += STRETCH) add(0, k, load_bytes(q + k));
    if constexpr (K % STRETCH != 0) add(0, k, load_bytes(q + k, K - k));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        IntVector total = sums[0][r];
#pragma GCC unroll 4
        for (int n = 1; n < U; ++n) total += sums[n][r];
        totals[r][0] = total;
    }
}

// to[r][c] = step scale (t[r] . q[c]) (+ scale (outliers of y[r] . q[c])) for rows that are finite; whole vectors of columns
template <int R>
static __attribute__((noinline)) void byte_dots_of(const int8_t* q, int64_t q_row, const Scales& scales, int64_t columns, const int32_t* outliers, const float* row, float* to, int64_t to_row) {
    for (int64_t c = 0; c < columns; c += VL) {
        IntVector totals[R][VL] = {};
        Vector others[R] = {};
        for (int n = 0; n < VL && c + n < columns; ++n) {
            const int8_t* from = q + (c + n) * q_row;
            byte_dots<R>(from, row, reinterpret_cast<IntVector (*)[VL]>(&totals[0][n]));
            if constexpr (MIXED)
                for (int r = 0; r < R; ++r) others[r][n] = outlier_dot(from, outliers, row + r * FEW_ROW + FEW_Y);
        }
        const Vector steps = scales_of(scales, c, columns - c);
        for (int r = 0; r < R; ++r) {
            Step step;
            std::memcpy(&step, row + r * FEW_ROW, sizeof(step));
            Vector lanes[VL];
            std::memcpy(lanes, totals[r], sizeof(lanes));
            transpose(lanes);
            BitVector total = bit_cast<BitVector>(lanes[0]) - uint32_t(step.excess);
#pragma GCC unroll 16
            for (int lane = 1; lane < VL; ++lane) total += bit_cast<BitVector>(lanes[lane]);
            store_vector(to + r * to_row + c, (__builtin_convertvector(bit_cast<IntVector>(total), Vector) * step.step + others[r]) * steps);
        }
    }
}

template <int R>
INLINE bool byte_rows(const int8_t* q, int64_t q_row, const Scales& scales, int64_t columns, const int32_t* outliers, const float* row, int64_t rows, float* to, int64_t to_row) {
    if constexpr (STEPS >> R & 1)
        if (rows >= R) {
            byte_dots_of<R>(q, q_row, scales, columns, outliers, row, to, to_row);
            return true;
        }
    return false;
}
// to[i][c] = sums of the columns [first, first + columns) of the n-th weight in order, for all rows
static void few_columns(const Call& call, int n, int64_t first, int64_t columns, const float* made, int64_t, float* to, int64_t to_row) {
    const int w = ORDER[n];
    const Weight& weight = call.weight[w];
    const int8_t* q = static_cast<const int8_t*>(weight.data) + first * weight.row;
    const Scales scales = {call.scale[w].data + first * call.scale[w].row, call.scale[w].row, call.scale[w].column};
    const int32_t* outliers = reinterpret_cast<const int32_t*>(made);
    const float* rows = made + FEW_HEAD;
    for (int64_t r = 0; r < call.rows;) {  // later rows find the rows of the weight in the L2 cache
        const float* row = rows + r * FEW_ROW;
        float* at = to + r * to_row;
        if (byte_rows<4>(q, weight.row, scales, columns, outliers, row, call.rows - r, at, to_row)) r += 4;
        else if (byte_rows<3>(q, weight.row, scales, columns, outliers, row, call.rows - r, at, to_row)) r += 3;
        else if (byte_rows<2>(q, weight.row, scales, columns, outliers, row, call.rows - r, at, to_row)) r += 2;
        else if (byte_rows<1>(q, weight.row, scales, columns, outliers, row, call.rows - r, at, to_row)) r += 1;
    }
    for (int64_t r = 0; r < call.rows; ++r) {
        Step step;
        std::memcpy(&step, rows + r * FEW_ROW, sizeof(step));
        if (!step.finite) float_columns(weight, call.scale[w], K, first, columns, rows + r * FEW_ROW + FEW_Y, FEW_ROW, 1, to + r * to_row, to_row);
    }
}
