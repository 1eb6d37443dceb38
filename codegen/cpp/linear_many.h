// Many rows: a strip of the weights' columns is packed into the L2 cache and meets all rows; its sums go through the epilogue
// while they are in the L1 cache. No weight is copied as a whole.

constexpr int PANEL = 2 * VL;                   // columns of a micro-kernel
constexpr int BLOCK_ROWS = VL == 16 ? 12 : 6;   // its rows: 24 sums of AVX-512's 32 registers, 12 of 16
constexpr int64_t PACKED = int64_t(1) << 17;    // floats of a packed strip: 512 KiB, half of an L2 cache
constexpr int64_t Y_FLOATS = int64_t(1) << 22;  // 16 MiB of y at a time; at least 512 rows, for which a strip is packed once

// to[r][j] (+)= sum over k of y[r][k] panel[k][j], for R rows and V vectors of columns
template <int R, int V>
static inline void multiply(const float* y, int64_t y_row, const float* panel, int64_t depth, float* to, int64_t to_row, bool first) {
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
            const Vector x = broadcast(y[r * y_row + k]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[r][v] += x * columns[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store_vector(to + r * to_row + v * VL, sums[r][v]);
}

// Up to BLOCK_ROWS rows, by whole micro-kernels
template <int V>
static __attribute__((noinline)) void multiply_block(int rows, const float* y, int64_t y_row, const float* panel, int64_t depth, float* to, int64_t to_row, bool first) {
    if (rows == BLOCK_ROWS) return multiply<BLOCK_ROWS, V>(y, y_row, panel, depth, to, to_row, first);
    int r = 0;
    if (rows - r >= 8) multiply<8, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first), r += 8;
    if (rows - r >= 4) multiply<4, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first), r += 4;
    if (rows - r >= 2) multiply<2, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first), r += 2;
    if (rows - r >= 1) multiply<1, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first);
}

// Rows of a weight to the columns of a panel [depth][PANEL], zeros past the last
template <class W>
static __attribute__((noinline)) void pack(const W* w, int64_t row, int64_t column, int64_t columns, int64_t depth, float* __restrict to) {
    if (row == 1 && column != 1) {  // a transposed weight
        for (int64_t k = 0; k < depth; ++k, to += PANEL)
            for (int c = 0; c < PANEL; c += VL) store_vector(to + c, c < columns ? gather_vector(w + k * column + c, 1, int(smaller(VL, columns - c))) : Vector{});
        return;
    }
    for (int c = 0; c < PANEL && c < columns; c += VL)
        for (int64_t k = 0; k < depth; k += VL) {
            const int here = int(smaller(VL, depth - k));
            Vector rows[VL];
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n) rows[n] = c + n < columns ? gather_vector(w + (c + n) * row + k * column, column, here) : Vector{};
            transpose(rows);
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n)
                if (n < here) store_vector(to + (k + n) * PANEL + c, rows[n]);
        }
}

struct Strip {
    int64_t step, slot, depth;  // columns of each weight; the same in whole panels; how much of K is packed at a time
    explicit Strip(const Group& group) : step(group.strip(PANEL)), slot(round_up(step, PANEL)) {
        const int64_t fitting = PACKED / (slot * group.slots), parts = (K + fitting - 1) / fitting;
        depth = parts <= 1 ? K : round_up((K + parts - 1) / parts, VL);  // equal parts
    }
    int64_t row(const Group& group) const { return slot * group.slots; }
};

// One strip of a group, from column `first`, for the rows [begin, end); y is that of row `begin`.
static void multiply_strip(const Call& call, int g, int64_t first, int64_t begin, int64_t end, const float* y, int64_t y_row, float* packed, float* sums, float* scratch) {
    const Group& group = GROUPS[g];
    const Strip strip(group);
    const int64_t width = smaller(strip.step, group.width - first), panels = strip.slot / PANEL, row = strip.row(group);
    for (int64_t k = 0; k == 0 || k < K; k += strip.depth > 0 ? strip.depth : 1) {
        const int64_t depth = smaller(strip.depth, K - k);
        const bool last = k + depth >= K;
        for (int s = 0; s < group.slots; ++s) {
            const int w = ORDER[group.first + s];
            const Weight& weight = call.weight[w];
            for (int64_t p = 0; p * PANEL < width; ++p)
                with_elements(call, w, [&](auto* from) { pack(from + (first + p * PANEL) * weight.row + k * weight.column, weight.row, weight.column, width - p * PANEL, depth, packed + (s * panels + p) * PANEL * depth); });
        }
        for (int64_t i = begin; i < end; i += BLOCK_ROWS) {
            const int rows = int(smaller(BLOCK_ROWS, end - i));
            float* tile = strip.depth >= K ? sums : sums + (i - begin) * row;
            for (int s = 0; s < group.slots; ++s)
                for (int64_t p = 0; p * PANEL < width; ++p) {
                    const float* panel = packed + (s * panels + p) * PANEL * depth;
                    float* to = tile + s * strip.slot + p * PANEL;
                    width - p * PANEL > VL ? multiply_block<2>(rows, y + (i - begin) * y_row + k, y_row, panel, depth, to, row, k == 0)
                                           : multiply_block<1>(rows, y + (i - begin) * y_row + k, y_row, panel, depth, to, row, k == 0);
                }
            if (last)
                for (int r = 0; r < rows; ++r) finish(call, g, tile + r * row, strip.slot, i + r, first, width, scratch);
        }
    }
}

static void many_rows(const Call& call) {
    const int threads = call.rows * TOTAL * K >= 8 * PARALLEL_FROM ? omp_get_max_threads() : 1;
    const bool ready = is_ready(call, false);
    const int64_t most = round_up(Y_FLOATS / Y_ROW > 512 ? Y_FLOATS / Y_ROW : 512, BLOCK_ROWS), span = smaller(call.rows, most);
    int64_t strips = 0, packed_size = 0, sums_size = 0, scratch_size = 0;
    for (const Group& group : GROUPS) {
        const Strip strip(group);
        strips += group.parts(strip.step);
        packed_size = larger_size(packed_size, strip.row(group) * strip.depth);
        sums_size = larger_size(sums_size, strip.row(group) * (strip.depth >= K ? BLOCK_ROWS : span));
        scratch_size = larger_size(scratch_size, (group.slots + 1) * round_up(strip.step, PANEL));
    }
    // Rows are cut into parts where whole strips would leave threads without work; each part packs its strip again, in the time of 24 rows.
    int64_t parts = 1;
    double least = 0;
    for (int64_t p = 1; p <= 4 * threads && (p == 1 || span / p >= 4 * BLOCK_ROWS); ++p) {
        const double cost = double((strips * p + threads - 1) / threads) * double(round_up((span + p - 1) / p, BLOCK_ROWS) + 24);
        if (p == 1 || cost < 0.98 * least) parts = p, least = cost;
    }
    const int64_t part = round_up((span + parts - 1) / parts, BLOCK_ROWS), own_size = packed_size + sums_size + scratch_size + 3 * GRAIN;
    Workspace workspace((ready ? 0 : span * Y_ROW) + threads * own_size + 64);
    float *made = workspace.take(ready ? 0 : span * Y_ROW), *scratch = workspace.data;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* packed = scratch + omp_get_thread_num() * round_up(own_size, GRAIN);
        float *sums = packed + round_up(packed_size, GRAIN), *rest = sums + round_up(sums_size, GRAIN);
        for (int64_t start = 0; start < call.rows; start += span) {
            const int64_t rows = smaller(span, call.rows - start);
            if (!ready) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < rows; ++i) make_row(call, start + i, made + i * Y_ROW);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < strips * parts; ++n) {
                int g = 0;
                int64_t at = n % strips;
                for (; at >= GROUPS[g].parts(GROUPS[g].strip(PANEL)); ++g) at -= GROUPS[g].parts(GROUPS[g].strip(PANEL));
                const int64_t begin = start + n / strips * part, end = smaller(begin + part, start + rows);
                if (begin >= end) continue;
                const float* y = ready ? reinterpret_cast<const float*>(call.x) + begin * call.x_row : made + (begin - start) * Y_ROW;
                multiply_strip(call, g, at * GROUPS[g].strip(PANEL), begin, end, y, ready ? call.x_row : Y_ROW, packed, sums, rest);
            }
        }
    }
}

extern "C" void linear(void* const* data, const int64_t* ints, const double* floats) {
    const Call call = read_call(data, ints, floats);
    if (call.rows == 0 || TOTAL == 0) return;
    bool dense = true;  // the weights lie in rows of K or in columns of N
    for (int n = 0; n < ORDERED; ++n) dense &= call.weight[ORDER[n]].column == 1 || call.weight[ORDER[n]].row == 1;
    are_few(call.rows) && dense ? few_rows(call) : many_rows(call);
}
