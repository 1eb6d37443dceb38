// Gradients of q, k and v. A tile of query rows against the keys that it may see: scores S and dP = dO V^T stay in the L2 cache, in blocks of keys, so that a row's
// softmax and sum(P dP) are exact without anything kept by the forward pass. Then dS = P (dP - sum(P dP)), dQ += dS K, dV += P^T dO, dK += dS^T Q: 5 products. By blocks of keys
// and of queries in turn, as on a GPU, there would be 7, and a log-sum-exp to read that is worthless in rows whose scores are all -3.4e38.
//
// dK and dV are sums over tiles, kept by whoever goes over the tiles: one thread for all query heads of a KV head; where there are too few of them for the threads, tiles are dealt out
// to `splits`, each with sums of its own, which are added in order. Memory is O(T), results are the same in every run with as many threads.

constexpr int KEY_BLOCK = 192;      // keys: whole panels and whole tiles of MR
constexpr int ROW = KEY_BLOCK + 16; // floats of a row in a block: rows do not meet in one set of the L1 cache when a block is read across
constexpr int DKP = int(round_up(D, VL));
constexpr int MOST_ROWS = 16 * MR;
constexpr int64_t TILE_SCORES = 12 * 4096;  // of a tile: with dP 384 KiB
constexpr int64_t MOST_SPLIT_FLOATS = int64_t(64) << 20;
static_assert(KEY_BLOCK % PANEL == 0 && KEY_BLOCK % MR == 0, "");

// c[MR][ldc] += a b[depth][ldb], N vectors of columns; a is [MR][lda], read across [depth][lda]
template <int N, bool across>
INLINE void add_tile(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb, int64_t depth, float* __restrict c, int64_t ldc) {
    Vector sums[MR][N];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] = load_vector(c + r * ldc + n * VL);
#pragma GCC unroll 2
    for (int64_t d = 0; d < depth; ++d) {
        Vector columns[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) columns[n] = load_vector(b + d * ldb + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[r][n] += (across ? a[d * lda + r] : a[r * lda + d]) * columns[n];
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_vector(c + r * ldc + n * VL, sums[r][n]);
}
// all COLUMNS vectors of b and c, rows of as many
template <int COLUMNS, bool across>
static __attribute__((noinline)) void add_rows(const float* a, int64_t lda, const float* b, int64_t depth, float* c) {
    constexpr int STRIPES = (COLUMNS + NV - 1) / NV, WIDTH = (COLUMNS + STRIPES - 1) / STRIPES, REST = COLUMNS % WIDTH, LD = COLUMNS * VL;
    int d = 0;
    for (; d + WIDTH <= COLUMNS; d += WIDTH) add_tile<WIDTH, across>(a, lda, b + d * VL, LD, depth, c + d * VL, LD);
    if constexpr (REST > 0) add_tile<REST, across>(a, lda, b + d * VL, LD, depth, c + d * VL, LD);
}

// `count` rows of `width` to rows of `padded` in fp32, times factor, zeros behind
template <int width, int padded, class Stored>
INLINE void copy_rows(const Stored* from, const int64_t* stride, int64_t count, float* __restrict to, float factor) {
    for (int64_t n = 0; n < count; ++n)
        for (int d = 0; d < padded; d += VL) store_vector(to + n * padded + d, gather_vector(from + n * stride[2] + d * stride[3], stride[3], width - d) * factor);
}
// `count` rows of `width` at most PANEL of them, to a panel [width][PANEL], zeros past the last
template <int width, class Stored>
INLINE void copy_panel(const Stored* from, const int64_t* stride, int64_t count, float* __restrict to) {
    for (int key = 0; key < PANEL; key += VL)
        for (int d0 = 0; d0 < width; d0 += VL) {
            Vector rows[VL];
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n) rows[n] = key + n < count ? gather_vector(from + (key + n) * stride[2] + d0 * stride[3], stride[3], width - d0) : Vector{};
            transpose(rows);
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n)
                if (d0 + n < width) store_vector(to + (d0 + n) * PANEL + key, rows[n]);
        }
}

// Query heads that are worked on together: whole groups of key heads and of value heads.
struct Unit {
    int64_t heads, key_group, value_group, keys, values;  // query heads, those of a key head and of a value head, key heads, value heads
    int64_t panels, key_size, row_size, value_size;       // floats of a head: panels of keys, rows of keys, panels of values
    int64_t dk_size, dv_size;
    int64_t packed() const { return keys * (key_size + row_size) + values * value_size; }
    int64_t sums() const { return keys * dk_size + values * dv_size; }
};
static Unit unit_of(const Call& call) {
    Unit unit;
    unit.key_group = call.H / call.Hk[0], unit.value_group = call.H / call.Hv, unit.heads = unit.key_group;
    while (unit.heads % unit.value_group != 0) unit.heads += unit.key_group;
    unit.keys = unit.heads / unit.key_group, unit.values = unit.heads / unit.value_group;
    unit.panels = (call.Tk + PANEL - 1) / PANEL;
    unit.key_size = unit.panels * PANEL * D, unit.row_size = unit.panels * PANEL * DKP, unit.value_size = unit.panels * PANEL * DV;
    unit.dk_size = round_up(call.Tk, MR) * DKP, unit.dv_size = round_up(call.Tk, MR) * DVP;
    return unit;
}

// panel n of the heads of a unit: [key heads][panels] of keys and their rows, [value heads][panels] of values
static __attribute__((noinline)) void pack_panel(const Call& call, const Unit& unit, int64_t b, int64_t first_head, int64_t panel, float* packed) {
    const int64_t j = panel * PANEL, count = smaller(PANEL, call.Tk - j);
    for (int64_t n = 0; n < unit.keys; ++n) {
        const KeyElement* from = call.k[0] + b * call.k_stride[0][0] + (first_head / unit.key_group + n) * call.k_stride[0][1] + j * call.k_stride[0][2];
        float* to = packed + n * (unit.key_size + unit.row_size);
        copy_panel<D>(from, call.k_stride[0], count, to + j * D);
        copy_rows<D, DKP>(from, call.k_stride[0], count, to + unit.key_size + j * DKP, 1.0f);
    }
    for (int64_t n = 0; n < unit.values; ++n)
        copy_panel<DV>(call.v + b * call.v_stride[0] + (first_head / unit.value_group + n) * call.v_stride[1] + j * call.v_stride[2], call.v_stride, count,
                       packed + unit.keys * (unit.key_size + unit.row_size) + n * unit.value_size + j * DV);
}

// What a thread needs for a tile of `rows` queries.
struct Tile {
    float *q, *dout, *dq;          // [rows, DKP], [rows, DVP], [rows, DKP]
    float *scores, *dp, *slopes;   // [blocks][rows][ROW] each; slopes where the score's derivative is no constant
    float top[MOST_ROWS], sink[MOST_ROWS], total[MOST_ROWS];  // of a row: largest score, the sink's, the sum of dO
    int64_t* starts;               // [blocks]: first keys of the blocks visited, and which of them are full
    int32_t* ranges;               // [blocks][rows / MR][2]: the keys of a block that MR rows may see
    int rows;
    static int64_t size(int64_t rows, int64_t blocks) { return rows * (2 * DKP + DVP) + (SLOPES ? 3 : 2) * blocks * rows * ROW + 2 * blocks + 2 * blocks * (rows / MR) + 96; }
    Tile(float* at, int64_t tile_rows, int64_t blocks) : rows(int(tile_rows)) {
        const auto take = [&](int64_t count) { float* taken = at; at += round_up(count, 16); return taken; };
        scores = take(blocks * rows * ROW), dp = take(blocks * rows * ROW), slopes = SLOPES ? take(blocks * rows * ROW) : nullptr;
        q = take(rows * DKP), dout = take(rows * DVP), dq = take(rows * DKP);
        starts = reinterpret_cast<int64_t*>(take(2 * blocks)), ranges = reinterpret_cast<int32_t*>(take(2 * blocks * (rows / MR)));
    }
};

// Scores and dP of the rows [first, first + rows) in every block that they may see; how many blocks those are. `exact` visits all keys, masked ones with the score FILL.
static __attribute__((noinline)) int score_tile(const Call& call, Tile& tile, const float* keys, const float* values, int64_t b, int64_t h, int64_t first, int rows, bool exact) {
    const float masked = exact ? FILL : -std::numeric_limits<float>::infinity();
    const int64_t i_hi = first + rows - 1, Tk = call.Tk;
    int visited = 0;
    for (int r = 0; r < rows; ++r) tile.top[r] = tile.sink[r];
    constexpr int64_t SPAN = 16 * KEY_BLOCK;
    for (int64_t span = 0; span < Tk; span += SPAN) {
        const int64_t span_end = smaller(span + SPAN, Tk);
        if (!exact && !tile_may(call, b, h, first, i_hi, span, span_end - 1)) continue;
        for (int64_t start = span; start < span_end; start += KEY_BLOCK) {
            const int64_t end = smaller(start + KEY_BLOCK, Tk);
            if (!exact && !(tile_may(call, b, h, first, i_hi, start, end - 1) && keys_may(call, b, h, start, end - 1))) continue;
            const bool block_full = tile_must(call, b, h, first, i_hi, start, end - 1);
            tile.starts[visited] = start;
            for (int group = 0; group < rows; group += MR) {
                const int64_t i_lo = first + group, i_last = smaller(i_lo + MR - 1, i_hi);
                int64_t lo = start, hi = end;
                bool full = block_full;
                if (!full && !exact) {
                    while (lo < hi && !tile_may(call, b, h, i_lo, i_last, lo, smaller(lo + PANEL, hi) - 1)) lo += PANEL;
                    while (lo < hi && !tile_may(call, b, h, i_lo, i_last, (hi - 1) / PANEL * PANEL, hi - 1)) hi = (hi - 1) / PANEL * PANEL;
                    if (lo >= hi) lo = hi = start;
                    else full = tile_must(call, b, h, i_lo, i_last, lo, hi - 1);
                }
                int32_t* range = tile.ranges + (visited * (tile.rows / MR) + group / MR) * 2;
                range[0] = int32_t(lo - start), range[1] = int32_t(hi - start);
                if (lo == hi) continue;
                float *scores = tile.scores + (int64_t(visited) * tile.rows + group) * ROW, *dp = tile.dp + (int64_t(visited) * tile.rows + group) * ROW;
                for (int64_t j = lo; j < hi; j += PANEL) multiply_rows<NV, false>(tile.q + group * DKP, DKP, keys + j * D, D, scores + (j - start), ROW);
                for (int64_t j = lo; j < hi; j += PANEL) multiply_rows<NV, false>(tile.dout + group * DVP, DVP, values + j * DV, DV, dp + (j - start), ROW);
                const int64_t width = hi - lo, padded = round_up(width, VL);
                for (int r = 0; r < MR && group + r < rows; ++r) {
                    float* row = scores + r * ROW + range[0];
                    if constexpr (SLOPES) slope_row(call, row, b, h, i_lo + r, lo, width, tile.slopes + (int64_t(visited) * tile.rows + group + r) * ROW + range[0]);
                    score_row(call, row, b, h, i_lo + r, lo, width, full, masked);
                    dvalue_row(call, dp + r * ROW + range[0], b, h, i_lo + r, lo, width, tile.total[group + r]);
                    for (int64_t n = width; n < padded; ++n) row[n] = -std::numeric_limits<float>::infinity(), dp[r * ROW + range[0] + n] = 0.0f;
                    Vector top = broadcast(tile.top[group + r]);
                    for (int64_t n = 0; n < padded; n += VL) top = larger(load_vector(row + n), top);
                    tile.top[group + r] = max_of(top);
                }
            }
            ++visited;
        }
    }
    return visited;
}

// P in place of the scores and dS in place of dP, zeros where a row may not see a key of a block.
static __attribute__((noinline)) void soften_rows(const Call& call, Tile& tile, const Totals& totals, int visited, int64_t b, int64_t h, int64_t first, int rows, bool exact) {
    const float infinity = std::numeric_limits<float>::infinity();
    const int padded_rows = int(round_up(rows, MR));
    for (int r = 0; r < padded_rows; ++r) {
        const float top = tile.top[r < rows ? r : 0], shift = top == -infinity ? 0.0f : top;
        Vector sums = {}, dots = {};
        const auto each_block = [&](auto&& work) {
            for (int n = 0; n < visited; ++n) {
                const int32_t* range = tile.ranges + (n * (tile.rows / MR) + r / MR) * 2;
                const int64_t at = (int64_t(n) * tile.rows + r) * ROW;
                work(n, range[0], range[1], tile.scores + at, tile.dp + at, at);
            }
        };
        if (r < rows)
            each_block([&](int, int lo, int hi, float* scores, const float* dp, int64_t) {
                for (int j = lo; j < hi; j += VL) {
                    const Vector e = exp2_of((load_vector(scores + j) - shift) * LOG2E);
                    store_vector(scores + j, e);
                    sums += e;
                    dots += e * load_vector(dp + j);
                }
            });
        const float sink = r < rows && tile.sink[r] != -infinity ? ratio(tile.sink[r], shift) : 0.0f, sum = sum_of(sums) + sink;
        const float inverse = EMPTY_IS_ZERO && sum == 0.0f ? 0.0f : 1.0f / sum;  // a row that sees nothing is 0 * inf = NaN
        const float delta = sum_of(dots) * inverse;
        each_block([&](int n, int lo, int hi, float* scores, float* dp, int64_t at) {
            const int width = int(smaller(KEY_BLOCK, round_up(call.Tk - tile.starts[n], VL) + VL));
            if (r >= rows) lo = hi = 0;
            const int end = lo + int(round_up(hi - lo, VL));
            for (int j = 0; j < lo; j += VL) store_vector(scores + j, Vector{}), store_vector(dp + j, Vector{});
            for (int j = end; j < width; j += VL) store_vector(scores + j, Vector{}), store_vector(dp + j, Vector{});
            for (int j = lo; j < end; j += VL) {
                const Vector p = load_vector(scores + j) * inverse;
                Vector ds = p * (load_vector(dp + j) - delta);
                if constexpr (SLOPES && !TOTALS) ds *= load_vector(tile.slopes + at + j);
                store_vector(scores + j, p);
                store_vector(dp + j, ds);
            }
            for (int j = hi; j < end; ++j) scores[j] = dp[j] = 0.0f;
            if (lo == hi) return;
            if (exact) hide_row(call, dp + lo, b, h, first + r, tile.starts[n] + lo, hi - lo);
            if constexpr (TOTALS) capture_row(call, dp + lo, b, h, first + r, tile.starts[n] + lo, hi - lo, totals);
            if constexpr (SLOPES && TOTALS)
                for (int j = lo; j < hi; ++j) dp[j] *= tile.slopes[at + j];
            value_row(call, scores + lo, b, h, first + r, tile.starts[n] + lo, hi - lo);
        });
        if constexpr (TOTALS)
            if (r < rows) capture_sink(call, b, h, first + r, -sink * inverse * delta, totals);
    }
}

// Sums of the products of the blocks: dQ of the tile, dK and dV of the keys.
static __attribute__((noinline)) void multiply_blocks(const Call& call, Tile& tile, int visited, const float* key_rows, float* dk, float* dv, int64_t b, int64_t h, int64_t first, int rows, bool exact) {
    const int padded_rows = int(round_up(rows, MR));
    std::memset(tile.dq, 0, sizeof(float) * size_t(padded_rows) * DKP);
    for (int n = 0; n < visited; ++n) {
        const int64_t start = tile.starts[n];
        const int width = int(smaller(KEY_BLOCK, call.Tk - start));
        const float *p = tile.scores + int64_t(n) * tile.rows * ROW, *ds = tile.dp + int64_t(n) * tile.rows * ROW;
        for (int group = 0; group < padded_rows; group += MR) {
            const int32_t* range = tile.ranges + (n * (tile.rows / MR) + group / MR) * 2;
            if (range[0] < range[1]) add_rows<DKP / VL, false>(ds + group * ROW + range[0], ROW, key_rows + (start + range[0]) * DKP, range[1] - range[0], tile.dq + group * DKP);
        }
        const bool full = exact || tile_must(call, b, h, first, first + rows - 1, start, start + width - 1);
        for (int key = 0; key < width; key += MR) {
            int lo = 0, hi = padded_rows;
            if (!full) {
                const int64_t j = start + key, last = start + smaller(key + MR, width) - 1;
                while (lo < hi && !tile_may(call, b, h, first + lo, first + smaller(lo + MR, rows) - 1, j, last)) lo += MR;
                while (lo < hi && !tile_may(call, b, h, first + hi - MR, first + smaller(hi, rows) - 1, j, last)) hi -= MR;
                if (lo >= hi) continue;
            }
            add_rows<DVP / VL, true>(p + lo * ROW + key, ROW, tile.dout + lo * DVP, hi - lo, dv + (start + key) * DVP);
            add_rows<DKP / VL, true>(ds + lo * ROW + key, ROW, tile.q + lo * DKP, hi - lo, dk + (start + key) * DKP);
        }
    }
}

INLINE void write_gradient(Element* to, int64_t stride, const float* from, int width, float factor) {
    if (stride == 1)
        for (int d = 0; d < width; ++d) store_element(to + d, from[d] * factor);
    else
        for (int d = 0; d < width; ++d) store_element(to + d * stride, from[d] * factor);
}

// The rows [first, first + rows) of a query head: dQ is written, dK and dV are added to.
static void gradient_tile(const Call& call, Tile& tile, const Totals& totals, const float* keys, const float* key_rows, const float* values, float* dk, float* dv, int64_t b, int64_t h, int64_t first, int rows) {
    const int padded_rows = int(round_up(rows, MR));
    copy_rows<D, DKP>(call.q + b * call.q_stride[0] + h * call.q_stride[1] + first * call.q_stride[2], call.q_stride, rows, tile.q, SCALE);
    copy_rows<DV, DVP>(call.grad + b * call.grad_stride[0] + h * call.grad_stride[1] + first * call.grad_stride[2], call.grad_stride, rows, tile.dout, 1.0f);
    std::memset(tile.q + rows * DKP, 0, sizeof(float) * size_t(padded_rows - rows) * DKP);
    std::memset(tile.dout + rows * DVP, 0, sizeof(float) * size_t(padded_rows - rows) * DVP);
    for (int r = 0; r < rows; ++r) {
        tile.sink[r] = sink_of(call, b, h, first + r), tile.total[r] = 0.0f;
        if constexpr (HAS_OFFSET)
            for (int d = 0; d < DV; ++d) tile.total[r] += tile.dout[r * DVP + d];
    }
    bool exact = false;
    int visited = score_tile(call, tile, keys, values, b, h, first, rows, false);
    for (int r = 0; r < rows; ++r)  // masked keys count, or there is nothing but NaN, which reaches every key
        exact |= (FINITE_FILL && double(tile.top[r]) <= double(FILL) + 104.0) || (!EMPTY_IS_ZERO && tile.top[r] == -std::numeric_limits<float>::infinity());
    if (exact) visited = score_tile(call, tile, keys, values, b, h, first, rows, true);
    soften_rows(call, tile, totals, visited, b, h, first, rows, exact);
    multiply_blocks(call, tile, visited, key_rows, dk, dv, b, h, first, rows, exact);
    for (int r = 0; r < rows; ++r)
        write_gradient(call.dq + b * call.dq_stride[0] + h * call.dq_stride[1] + (first + r) * call.dq_stride[2], call.dq_stride[3], tile.dq + r * DKP, D, DQ_FACTOR);
}

// dK and dV of the key j of a unit, from the sums of its splits, in order
static void write_key(const Call& call, const Unit& unit, int64_t b, int64_t first_head, int64_t j, const float* sums, int splits) {
    const auto write = [&](Element* to, int64_t stride, const float* from, int width, int padded, float factor) {
        float total[D > DV ? DKP : DVP];
        for (int d = 0; d < padded; d += VL) {
            Vector sum = load_vector(from + d);
            for (int n = 1; n < splits; ++n) sum += load_vector(from + n * unit.sums() + d);
            store_vector(total + d, sum);
        }
        write_gradient(to, stride, total, width, factor);
    };
    for (int64_t n = 0; n < unit.keys; ++n)
        write(call.dk + b * call.dk_stride[0] + (first_head / unit.key_group + n) * call.dk_stride[1] + j * call.dk_stride[2], call.dk_stride[3], sums + n * unit.dk_size + j * DKP, D, DKP, DK_FACTOR);
    for (int64_t n = 0; n < unit.values; ++n)
        write(call.dv + b * call.dv_stride[0] + (first_head / unit.value_group + n) * call.dv_stride[1] + j * call.dv_stride[2], call.dv_stride[3], sums + unit.keys * unit.dk_size + n * unit.dv_size + j * DVP, DV, DVP, 1.0f);
}

static void gradients(const Call& call) {
    const Unit unit = unit_of(call);
    const int threads = is_worth_threads(call) ? omp_get_max_threads() : 1;
    const int64_t per_batch = call.H / unit.heads, units = call.B * per_batch, blocks = (call.Tk + KEY_BLOCK - 1) / KEY_BLOCK;
    int64_t tile_rows = TILE_SCORES / (blocks * KEY_BLOCK) / MR * MR;
    tile_rows = smaller(tile_rows > 2 * MR ? tile_rows : 2 * MR, smaller(MOST_ROWS, round_up(call.Tq, MR)));
    const int64_t tiles = (call.Tq + tile_rows - 1) / tile_rows, items = unit.heads * tiles, tile_size = round_up(Tile::size(tile_rows, blocks), 16);
    // Whole units where threads have enough of them; else parts of units, about four a thread, as far as their sums stay within bounds.
    int64_t splits = threads == 1 || units >= 4 * threads || units % threads == 0 ? 1 : smaller(items, (4 * threads + units - 1) / units);
    while (splits > 1 && units * splits * unit.sums() > MOST_SPLIT_FLOATS) --splits;
    const int64_t at_once = splits == 1 ? threads : units, unit_size = round_up(unit.packed(), 16);
    // Sums of captures' gradients for each part of the work, whichever thread does it: neighbouring units, about four parts a thread, or a split.
    const int64_t parts = splits > 1 ? units * splits : TOTALS ? smaller(units, 4 * threads) : units, totals_size = round_up(totals_of(call), 16);
    Workspace workspace(threads * tile_size + at_once * (unit_size + splits * unit.sums()) + parts * totals_size + 64);
    float *scratch = workspace.take(threads * tile_size), *packed = workspace.take(at_once * unit_size), *totals = workspace.take(parts * totals_size), *sums = workspace.data;
    std::memset(totals, 0, sizeof(float) * size_t(parts * totals_size));
    const auto part = [&](Tile& tile, int64_t n, const float* from, float* to, int64_t split, int64_t own_totals) {
        const Totals own(call, totals + own_totals * totals_size);
        const int64_t b = n / per_batch, first_head = n % per_batch * unit.heads;
        std::memset(to, 0, sizeof(float) * size_t(unit.sums()));
        for (int64_t item = split; item < items; item += splits) {
            const int64_t in_unit = item / tiles, first = item % tiles * tile_rows;
            const float* keys = from + in_unit / unit.key_group * (unit.key_size + unit.row_size);
            gradient_tile(call, tile, own, keys, keys + unit.key_size, from + unit.keys * (unit.key_size + unit.row_size) + in_unit / unit.value_group * unit.value_size,
                          to + in_unit / unit.key_group * unit.dk_size, to + unit.keys * unit.dk_size + in_unit / unit.value_group * unit.dv_size, b, first_head + in_unit, first, int(smaller(tile_rows, call.Tq - first)));
        }
    };
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num();
        Tile tile(scratch + thread * tile_size, tile_rows, blocks);
        if (splits == 1) {
            float *own = packed + thread * unit_size, *own_sums = sums + thread * unit.sums();
#pragma omp for schedule(dynamic, 1)
            for (int64_t own_totals = 0; own_totals < parts; ++own_totals)
                for (int64_t n = own_totals * units / parts; n < (own_totals + 1) * units / parts; ++n) {
                    for (int64_t panel = 0; panel < unit.panels; ++panel) pack_panel(call, unit, n / per_batch, n % per_batch * unit.heads, panel, own);
                    part(tile, n, own, own_sums, 0, own_totals);
                    for (int64_t j = 0; j < call.Tk; ++j) write_key(call, unit, n / per_batch, n % per_batch * unit.heads, j, own_sums, 1);
                }
        } else {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < units * unit.panels; ++n)
                pack_panel(call, unit, n / unit.panels / per_batch, n / unit.panels % per_batch * unit.heads, n % unit.panels, packed + n / unit.panels * unit_size);
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < units * splits; ++n) part(tile, n / splits, packed + n / splits * unit_size, sums + n * unit.sums(), n % splits, n);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < units * call.Tk; ++n)
                write_key(call, unit, n / call.Tk / per_batch, n / call.Tk % per_batch * unit.heads, n % call.Tk, sums + n / call.Tk * splits * unit.sums(), int(splits));
        }
    }
    write_totals(call, totals, totals_size, parts);
}

INLINE void write_zeros(Element* to, const int64_t* stride, int64_t heads, int64_t rows, int width, int64_t batch) {
    for (int64_t n = 0; n < batch * heads * rows; ++n)
        for (int d = 0; d < width; ++d) store_element(to + n / rows / heads * stride[0] + n / rows % heads * stride[1] + n % rows * stride[2] + d * stride[3], 0.0f);
}

extern "C" void attention_backward(void* const* data, const int64_t* ints, const double*) {
    const Call call = read_call(data, ints);
    if (call.B == 0 || call.H == 0 || call.Tq == 0 || call.Tk == 0) {
        write_zeros(call.dq, call.dq_stride, call.H, call.Tq, D, call.B);
        write_zeros(call.dk, call.dk_stride, call.Hk[0], call.Tk, D, call.B);
        write_zeros(call.dv, call.dv_stride, call.Hv, call.Tk, DV, call.B);
        write_totals(call, nullptr, 0, 0);
    } else {
        gradients(call);
    }
}
