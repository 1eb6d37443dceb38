// Few rows: every weight is read once, where it lies, at the speed of memory; the sums of all columns meet in one buffer.

constexpr int64_t CHUNK = 16;  // columns that a thread takes at a time: 16 rows of a weight, 48 KiB at K = 768
constexpr int64_t FINISHED = 256;  // columns that an epilogue runs over at a time

// to[r][c] = y[r] . w[c] for R rows of y and C of w
template <int C, int R, class W>
static inline void dots(const W* w, int64_t w_row, const float* y, int64_t y_row, float* to, int64_t to_row) {
    constexpr int U = C * R >= 8 ? 1 : C * R >= 4 ? 2 : 4;  // eight sums at a time hide the latency of an FMA
    Vector sums[U][C][R] = {};
    int64_t k = 0;
    for (; k + U * VL <= K; k += U * VL)
#pragma GCC unroll 4
        for (int n = 0; n < U; ++n) {
            Vector rows[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) rows[r] = load_vector(y + r * y_row + k + n * VL);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                const Vector v = load_vector(w + c * w_row + k + n * VL);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sums[n][c][r] += v * rows[r];
            }
        }
    for (; k < K; k += VL) {
        const int count = int(smaller(VL, K - k));
        for (int c = 0; c < C; ++c) {
            const Vector v = gather_vector(w + c * w_row + k, 1, count);
            for (int r = 0; r < R; ++r) sums[0][c][r] += v * gather_vector(y + r * y_row + k, 1, count);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            Vector total = sums[0][c][r];
            for (int n = 1; n < U; ++n) total += sums[n][c][r];
            to[r * to_row + c] = sum_of(total);
        }
}

// The sums fit in half of the registers: 16 of AVX-512's 32, 8 of 16.
template <int R>
constexpr int columns_at_once() { return VL == 16 ? (R <= 2 ? 8 : 4) : (R <= 2 ? 4 : 2); }

template <int R, class W>
static __attribute__((noinline)) void dots_of(const W* w, int64_t w_row, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    constexpr int C = columns_at_once<R>();
    int64_t c = 0;
    for (; c + C <= columns; c += C) dots<C, R>(w + c * w_row, w_row, y, y_row, to + c, to_row);
    for (; c < columns; ++c) dots<1, R>(w + c * w_row, w_row, y, y_row, to + c, to_row);
}

template <class W>
INLINE void dot_columns(const W* w, int64_t w_row, int64_t columns, const float* y, int64_t y_row, int64_t rows, float* to, int64_t to_row) {
    for (int64_t c = 0; c < columns; c += 4) {  // four rows of a weight stay in the L1 cache while all rows of y pass
        const int64_t here = rows <= 4 ? columns : smaller(4, columns - c);
        for (int64_t r = 0; r < rows; r += 4) {
            const float* from = y + r * y_row;
            float* at = to + r * to_row + c;
            switch (smaller(4, rows - r)) {
                case 1: dots_of<1>(w + c * w_row, w_row, here, from, y_row, at, to_row); break;
                case 2: dots_of<2>(w + c * w_row, w_row, here, from, y_row, at, to_row); break;
                case 3: dots_of<3>(w + c * w_row, w_row, here, from, y_row, at, to_row); break;
                default: dots_of<4>(w + c * w_row, w_row, here, from, y_row, at, to_row);
            }
        }
        if (rows <= 4) break;
    }
}

static void few_rows(const Call& call) {
    const int threads = TOTAL * K >= PARALLEL_FROM ? omp_get_max_threads() : 1;
    const bool ready = is_ready(call, call.rows == 1);
    const int64_t rows = call.rows, y_size = ready ? 0 : rows * Y_ROW, scratch_size = (MOST_SLOTS + 1) * round_up(FINISHED + LONGEST_BLOCK, GRAIN);
    Workspace workspace(rows * TOTAL + threads * (y_size + scratch_size) + 64);
    float *sums = workspace.take(rows * TOTAL), *scratch = workspace.data;
    int64_t chunks = 0, pieces = 0;
    for (int n = 0; n < ORDERED; ++n) chunks += (WIDTH[n] + CHUNK - 1) / CHUNK;
    for (const Group& group : GROUPS) pieces += (group.width + group.piece() - 1) / group.piece();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* own = scratch + omp_get_thread_num() * (y_size + scratch_size);
        const float* y = ready ? call.x : own;
        const int64_t y_row = ready ? call.x_row : Y_ROW;
        if (!ready)  // by every thread for itself: a few rows are made faster than a barrier is passed
            for (int64_t i = 0; i < rows; ++i) make_row(call, i, own + i * Y_ROW);
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            int n = 0;
            int64_t at = chunk;
            while (at >= (WIDTH[n] + CHUNK - 1) / CHUNK) at -= (WIDTH[n] + CHUNK - 1) / CHUNK, ++n;
            const int64_t first = at * CHUNK, columns = smaller(CHUNK, WIDTH[n] - first);
            const Weight& weight = call.weight[ORDER[n]];
            with_elements(call, ORDER[n], [&](auto* w) __attribute__((always_inline)) { dot_columns(w + first * weight.row, weight.row, columns, y, y_row, rows, sums + OFFSET[n] + first, TOTAL); });
        }
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < pieces * rows; ++n) {
            int g = 0;
            int64_t at = n / rows;
            while (at * GROUPS[g].piece() >= GROUPS[g].width) at -= (GROUPS[g].width + GROUPS[g].piece() - 1) / GROUPS[g].piece(), ++g;
            const int64_t i = n % rows, first = at * GROUPS[g].piece(), width = smaller(GROUPS[g].piece(), GROUPS[g].width - first);
            finish(call, g, sums + i * TOTAL + OFFSET[GROUPS[g].first] + first, round_up(GROUPS[g].width, GRAIN), i, first, width, own + y_size);
        }
    }
}
