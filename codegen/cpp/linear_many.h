// Many rows: a strip of the weights' columns is packed into the L2 cache and meets all rows; its sums go through the epilogue
// while they are in the L1 cache. No weight is copied as a whole.
//
// The products run over lanes of 32 bits, EACH elements along K in one. What a lane holds, how rows and weights get into lanes and what has to be done to
// sums before they are accumulators, the includer has said: LANES, `add_product`, `make_lanes`, `with_source`, `begin_call`, `begin_strip`, `settle`,
// and who makes the products: `rows_of_block`, `is_multiplied`, `note_packed`, `end_products`.

constexpr int64_t PACKED = int64_t(1) << 17;  // floats of a packed strip: 512 KiB, half of an L2 cache
constexpr int64_t strip_of(const Group& group) { return group.strip(PANEL, smaller(STRIP, PACKED / larger_size(LANES * group.slots, 1))); }

// Are there strips whose last panel has one vector of columns? They take half the products.
constexpr bool has_narrow_panels() {
    bool narrow = false;
    for (const Group& group : GROUPS)
        for (int64_t width : {strip_of(group), group.width % strip_of(group)}) narrow |= width % (2 * VL) != 0 && width % (2 * VL) <= VL;
    return narrow;
}
constexpr bool NARROW = has_narrow_panels();

constexpr int64_t Y_FLOATS = int64_t(1) << 22;  // 16 MiB of y at a time; at least 512 rows, for which a strip is packed once

// Any number of rows, by whole micro-kernels
template <int V>
INLINE void multiply_block(int rows, const float* y, int64_t y_row, const float* panel, int64_t depth, float* to, int64_t to_row, bool first) {
    constexpr int THIRD = BLOCK_ROWS / 3;
    int r = 0;
    for (; rows - r >= BLOCK_ROWS; r += BLOCK_ROWS) multiply<BLOCK_ROWS, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first);
    for (; rows - r >= THIRD; r += THIRD) multiply<THIRD, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first);
    for (; r < rows; ++r) multiply<1, V>(y + r * y_row, y_row, panel, depth, to + r * to_row, to_row, first);
}

struct Strip {
    int64_t step, slot, depth;  // columns of each weight; the same in whole panels; how much of K is packed at a time
    explicit Strip(const Group& group) : step(strip_of(group)), slot(round_up(step, PANEL)) {
        const int64_t fitting = PACKED / (slot * group.slots), parts = (LANES + fitting - 1) / fitting;
        depth = parts <= 1 ? LANES : round_up((LANES + parts - 1) / parts, VL);  // equal parts
    }
    int64_t row(const Group& group) const { return slot * group.slots; }
};

// One strip of a group, from column `first`, for the rows [begin, end); y is that of row `begin`.
// packed, sums, floats, outer, scratch are the thread's.
static void multiply_strip(const Call& call, int g, int64_t first, int64_t begin, int64_t end, const float* y, int64_t y_row, const float* shared, float* packed, float* sums, float* floats, float* outer, float* scratch) {
    const Group& group = GROUPS[g];
    const Strip strip(group);
    const int64_t width = smaller(strip.step, group.width - first), panels = strip.slot / PANEL, row = strip.row(group), block = rows_of_block(call);
    for (int64_t k = 0; k == 0 || k < LANES; k += strip.depth > 0 ? strip.depth : 1) {
        const int64_t depth = smaller(strip.depth, LANES - k);
        const bool last = k + depth >= LANES;
        for (int s = 0; s < group.slots; ++s) {
            with_source(call, ORDER[group.first + s], first, [&](auto source) {
                for (int64_t p = 0; p * PANEL < width; ++p) {
                    float* panel = packed + (s * panels + p) * PANEL * depth;
                    pack(source, p * PANEL, width - p * PANEL, EACH * k, K, depth, panel);
                    note_packed(outer + s * strip.slot + p * PANEL, row, panel, depth, k == 0);
                }
            });
        }
        if (last) begin_strip(call, g, first, width, strip.slot, shared, outer);
        for (int64_t i = begin; i < end; i += block) {
            const int rows = int(smaller(block, end - i));
            float* tile = strip.depth >= LANES ? sums : sums + (i - begin) * row;
            for (int s = 0; s < group.slots; ++s)
                for (int64_t p = 0; p * PANEL < width; ++p) {
                    if (last && s == 0)  // the lines are there when the sums are: int8 of 1024 x 768 -> 4096 took 21.5 ms, of which 6 waited for them
                        for (int r = 0; r < rows; ++r) expect(call, g, i + r, first + p * PANEL, smaller(PANEL, width - p * PANEL));
                    const float* panel = packed + (s * panels + p) * PANEL * depth;
                    float* to = tile + s * strip.slot + p * PANEL;
                    const float* from = y + (i - begin) * y_row + k;
                    if (is_multiplied(call, from, y_row, panel, depth, to, row, k == 0)) continue;
                    if (!NARROW || width - p * PANEL > VL) multiply_block<2>(rows, from, y_row, panel, depth, to, row, k == 0);
                    else if constexpr (NARROW) multiply_block<1>(rows, from, y_row, panel, depth, to, row, k == 0);
                }
            if (last)
                for (int r = 0; r < rows; ++r) {
                    settle(call, g, y + (i + r - begin) * y_row, tile + r * row, strip.slot, i + r, first, width, shared, outer, floats);
                    finish(call, g, tile + r * row, strip.slot, i + r, first, width, scratch);
                }
            if (last)  // of all rows of the block at once: a result that has just been written is slow to read
                for (int r = 0; r < rows; ++r) raise_maxima(call, g, i + r, first, width);
        }
    }
}

static void many_rows(const Call& call) {
    const int threads = call.rows * TOTAL * K >= 8 * PARALLEL_FROM ? omp_get_max_threads() : 1;
    const bool ready = is_x_ready(call);
    const int64_t block = rows_of_block(call);
    const int64_t most = round_up(larger_size(Y_FLOATS / LANES_ROW, 512), block), span = smaller(call.rows, most), whole = round_up(span, block);
    int64_t strips = 0, packed_size = 0, sums_size = 0, outer_size = 0, scratch_size = 0;
    for (const Group& group : GROUPS) {
        const Strip strip(group);
        strips += group.parts(strip.step);
        packed_size = larger_size(packed_size, strip.row(group) * strip.depth);
        sums_size = larger_size(sums_size, strip.row(group) * (strip.depth >= LANES ? block : whole));
        outer_size = larger_size(outer_size, OUTER * strip.row(group));
        scratch_size = larger_size(scratch_size, (group.slots + 1) * round_up(strip.step, PANEL));
    }
    // Rows are cut into parts where whole strips would leave threads without work; each part packs its strip again, in the time of 24 rows.
    int64_t parts = 1;
    double least = 0;
    for (int64_t p = 1; p <= 4 * threads && (p == 1 || span / p >= 4 * BLOCK_ROWS); ++p) {
        const double cost = double((strips * p + threads - 1) / threads) * double(round_up((span + p - 1) / p, block) + 24);
        if (p == 1 || cost < 0.98 * least) parts = p, least = cost;
    }
    const int64_t part = round_up((span + parts - 1) / parts, block), floats_size = ready ? 0 : LANES_BUFFER;
    const int64_t own_size = round_up(packed_size + sums_size + scratch_size + floats_size + outer_size + 3 * GRAIN, GRAIN);
    Workspace workspace((ready ? 0 : whole * LANES_ROW) + SHARED + threads * own_size + 64);
    float *made = workspace.take(ready ? 0 : whole * LANES_ROW), *shared = workspace.take(SHARED), *scratch = workspace.data;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* packed = scratch + omp_get_thread_num() * own_size;
        float *sums = packed + round_up(packed_size, GRAIN), *floats = sums + round_up(sums_size, GRAIN), *outer = floats + floats_size, *rest = outer + round_up(outer_size, GRAIN);
        begin_call(call, shared, floats);
        for (int64_t start = 0; start < call.rows; start += span) {
            const int64_t rows = smaller(span, call.rows - start);
            if (!ready) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < rows; ++i) make_lanes(call, start + i, made + i * LANES_ROW, shared, floats);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < strips * parts; ++n) {
                int g = 0;
                int64_t at = n % strips;
                for (; at >= GROUPS[g].parts(strip_of(GROUPS[g])); ++g) at -= GROUPS[g].parts(strip_of(GROUPS[g]));
                const int64_t begin = start + n / strips * part, end = smaller(begin + part, start + rows);
                if (begin >= end) continue;
                const float* y = ready ? ready_lanes(call, begin) : made + (begin - start) * LANES_ROW;
                multiply_strip(call, g, at * strip_of(GROUPS[g]), begin, end, y, ready ? call.x_row / EACH : LANES_ROW, shared, packed, sums, floats, outer, rest);
            }
        }
        end_products(call);
    }
}
