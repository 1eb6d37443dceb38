// Few rows: every weight is read once, where it lies, at the speed of memory.

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
            __builtin_prefetch(reinterpret_cast<const char*>(w + k + n * VL) + AHEAD, 0, 2);
            const Vector v = load_vector(w + k + n * VL);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[n % U][r] += v * load_vector(y + r * y_row + k + n * VL);
        }
    for (; k < K; k += VL) {
        const int count = int(smaller(VL, K - k));
        const Vector v = gather_vector(w + k, 1, count);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[0][r] += v * gather_vector(y + r * y_row + k, 1, count);
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
template <int R, int V, class W>
static inline void columns_of(const W* w, int64_t w_column, int count, const float* y, int64_t y_row, float* to, int64_t to_row) {
    Vector sums[R][V] = {};
    for (int64_t k = 0; k < K; ++k) {
        const W* at = w + k * w_column;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            __builtin_prefetch(at + 16 * w_column + v * VL, 0, 2);
            const Vector row = gather_vector(at + v * VL, 1, V > 1 ? VL : count);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[r][v] += row * y[r * y_row + k];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store_vector(to + r * to_row + v * VL, sums[r][v]);
}
template <int R, class W>
static __attribute__((noinline)) void transposed_dots_of(const W* w, int64_t w_column, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    constexpr int V = VL == 16 ? 16 / R : 8 / R, HALF = V > 1 ? V / 2 : 1;  // the more of a row at a time, the better: 14.7 against 10.8 GB/s for 16, 8
    int64_t c = 0;
    for (; c + V * VL <= columns; c += V * VL) columns_of<R, V>(w + c, w_column, VL, y, y_row, to + c, to_row);
    for (; c + HALF * VL <= columns; c += HALF * VL) columns_of<R, HALF>(w + c, w_column, VL, y, y_row, to + c, to_row);
    for (; c < columns; c += VL) columns_of<R, 1>(w + c, w_column, int(smaller(VL, columns - c)), y, y_row, to + c, to_row);
}

template <class W>
INLINE void dot_columns(const W* w, int64_t w_row, int64_t w_column, int64_t columns, const float* y, int64_t y_row, int64_t rows, float* to, int64_t to_row) {
    for (int64_t r = 0, step; r < rows; r += step) {  // later rows of y find the rows of the weight in the L2 cache
        const float* from = y + r * y_row;
        float* at = to + r * to_row;
        step = smaller(4, rows - r);
        switch (step) {
            case 1: w_column == 1 ? dots_of<1>(w, w_row, columns, from, y_row, at, to_row) : transposed_dots_of<1>(w, w_column, columns, from, y_row, at, to_row); break;
            case 2: w_column == 1 ? dots_of<2>(w, w_row, columns, from, y_row, at, to_row) : transposed_dots_of<2>(w, w_column, columns, from, y_row, at, to_row); break;
            case 3: w_column == 1 ? dots_of<3>(w, w_row, columns, from, y_row, at, to_row) : transposed_dots_of<3>(w, w_column, columns, from, y_row, at, to_row); break;
            default: w_column == 1 ? dots_of<4>(w, w_row, columns, from, y_row, at, to_row) : transposed_dots_of<4>(w, w_column, columns, from, y_row, at, to_row);
        }
    }
}

// Do pairs lie further apart than a chunk? Then epilogues run when all sums are there, behind a barrier; else chunk by chunk.
constexpr bool is_paired() {
    bool paired = false;
    for (const Group& group : GROUPS) paired |= group.chunk() % group.block != 0;
    return paired;
}
constexpr bool PAIRED = is_paired();

// Where weights read in place are the faster way: up to two rows always; up to eight, four at a time, where those stay in an L1 cache of 32 KiB
// beside the weight (at K = 4096 packing was faster from 4 rows on, at K = 1024 from 12).
INLINE bool are_few(int64_t rows) { return rows <= 2 || (rows <= FEW && smaller(rows, 4) * K <= 6144); }

static void few_rows(const Call& call) {
    const int threads = TOTAL * K >= PARALLEL_FROM ? omp_get_max_threads() : 1;
    const bool ready = is_ready(call, call.rows == 1);
    const int64_t rows = call.rows, y_size = ready ? 0 : rows * Y_ROW, scratch_size = (MOST_SLOTS + 1) * round_up(16 * 48 + LONGEST_BLOCK + VL, GRAIN);
    Workspace workspace(rows * TOTAL + threads * (y_size + scratch_size) + 64);
    float *sums = workspace.take(rows * TOTAL), *scratch = workspace.data;
    int64_t chunks = 0, pieces = 0, times = 1;
    for (int n = 0; n < ORDERED; ++n)
        if (call.weight[ORDER[n]].column != 1) times = TOTAL >= 512 * threads ? 16 : 8;  // of a transposed weight, wider chunks: 1 KiB of each k
    for (const Group& group : GROUPS) {
        chunks += group.parts(times * group.chunk());
        pieces += group.parts(group.piece());
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* own = scratch + omp_get_thread_num() * (y_size + scratch_size);
        const float* y = ready ? reinterpret_cast<const float*>(call.x) : own;
        const int64_t y_row = ready ? call.x_row : Y_ROW;
        if (!ready)  // by every thread for itself: a few rows are made faster than a barrier is passed
            for (int64_t i = 0; i < rows; ++i) make_row(call, i, own + i * Y_ROW);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            int64_t at = chunk;
            int g = 0;
            for (; at >= GROUPS[g].parts(times * GROUPS[g].chunk()); ++g) at -= GROUPS[g].parts(times * GROUPS[g].chunk());
            const Group& group = GROUPS[g];
            const int64_t first = at * times * group.chunk(), columns = smaller(times * group.chunk(), group.width - first);
            for (int n = group.first; n < group.first + group.slots; ++n) {
                const Weight& weight = call.weight[ORDER[n]];
                with_elements(call, ORDER[n], [&](auto* w) { dot_columns(w + first * weight.row, weight.row, weight.column, columns, y, y_row, rows, sums + OFFSET[n] + first, TOTAL); });
            }
            if (!PAIRED)
                for (int64_t i = 0; i < rows; ++i) finish(call, g, sums + i * TOTAL + OFFSET[group.first] + first, round_up(group.width, GRAIN), i, first, columns, own + y_size);
        }
        if (PAIRED) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < pieces * rows; ++n) {
                int64_t at = n / rows;
                int g = 0;
                for (; at >= GROUPS[g].parts(GROUPS[g].piece()); ++g) at -= GROUPS[g].parts(GROUPS[g].piece());
                const Group& group = GROUPS[g];
                const int64_t first = at * group.piece(), width = smaller(group.piece(), group.width - first);
                finish(call, g, sums + n % rows * TOTAL + OFFSET[group.first] + first, round_up(group.width, GRAIN), n % rows, first, width, own + y_size);
            }
        }
    }
}
