// Many query rows: keys and values are packed once per KV head, in fp32, and every row tile of every head in the group reads them.

constexpr int TILE_ROWS = D + DV <= 512 ? 16 * MR : 8 * MR;  // queries and sums of a tile stay in the L2 cache beside a block of keys and values

// dims [start, start + width) of the keys [Tk, D], a part of their own in memory, to panels [panel][D][PANEL], zeros past the last key
template <int start, int width>
INLINE void pack_part(const KeyElement* from, const int64_t* stride, int64_t Tk, int64_t panel, float* __restrict to) {
    for (int key = 0; key < PANEL; key += VL)
        for (int d0 = 0; d0 < width; d0 += VL) {
            Vector rows[VL];
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n) {
                const int64_t j = panel * PANEL + key + n;
                rows[n] = j < Tk ? gather_vector(from + j * stride[2] + d0 * stride[3], stride[3], width - d0) : Vector{};
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n)
                if (d0 + n < width) store_vector(to + (start + d0 + n) * PANEL + key, rows[n]);
        }
}
// the same of keys that are a text of what is stored
static void pack_taken(const Call& call, const KeyElement* from, int64_t b, int64_t h, int64_t panel, float* __restrict to) {
    constexpr int padded = int(round_up(D, VL));
    float taken[VL * padded];
    for (int key = 0; key < PANEL; key += VL) {
        const int64_t first = panel * PANEL + key;
        const int count = int(first < call.Tk ? smaller(VL, call.Tk - first) : 0), stored = int(first < call.stored_keys ? smaller(count, call.stored_keys - first) : 0);
        std::memset(taken + count * padded, 0, sizeof(float) * size_t(VL - count) * padded);
        take_keys(call, from + first * call.k_stride[0][2], stored, taken, padded, b, h, first, count);
        for (int d0 = 0; d0 < padded; d0 += VL) {
            Vector rows[VL];
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n) rows[n] = load_vector(taken + n * padded + d0);
            transpose(rows);
#pragma GCC unroll 16
            for (int n = 0; n < VL; ++n)
                if (d0 + n < D) store_vector(to + (d0 + n) * PANEL + key, rows[n]);
        }
    }
}
constexpr int part_start(int part) { return part == 0 ? 0 : part_start(part - 1) + PART_SIZE[part - 1]; }
template <size_t... part>
INLINE void pack_keys(const Call& call, int64_t b, int64_t h, int64_t panel, float* __restrict to, std::index_sequence<part...>) {
    if constexpr (KEY_TEXT) pack_taken(call, call.k[0] + b * call.k_stride[0][0] + h / (call.H / call.Hk[0]) * call.k_stride[0][1], b, h / (call.H / call.Hk[0]), panel, to);
    else (pack_part<part_start(part), PART_SIZE[part]>(call.k[part] + b * call.k_stride[part][0] + h / (call.H / call.Hk[part]) * call.k_stride[part][1], call.k_stride[part], call.Tk, panel, to), ...);
}

// values [Tk, DV] to stripes [stripe][Tk][STRIPE * VL], zeros in the padding columns; one panel's worth of keys
static void pack_values(const Call& call, int64_t b, int64_t head, int64_t panel, float* __restrict to) {
    const int64_t* stride = call.v_stride;
    const int64_t first = panel * PANEL, last = first + PANEL < call.Tk ? first + PANEL : call.Tk;
    for (int64_t key = first; key < last; ++key) {
        const ValueElement* from = call.v + b * stride[0] + head * stride[1] + key * stride[2];
        for (int d0 = 0; d0 < DVP; d0 += STRIPE * VL) {
            const int columns = DVP - d0 < STRIPE * VL ? DVP - d0 : STRIPE * VL;
            float* row = to + d0 * call.Tk + key * columns;
            for (int d = 0; d < columns; d += VL) store_vector(row + d, gather_vector(from + (d0 + d) * stride[3], stride[3], DV - d0 - d));
        }
    }
}

struct Tile {
    float *q, *sums, *scores;  // [TILE_ROWS, D], [TILE_ROWS, DVP], [MR, BLOCK]
    RowState state[TILE_ROWS];
};

INLINE void load_queries(const Call& call, int64_t b, int64_t h, int64_t first, int rows, float* __restrict q) {
    const int64_t* stride = call.q_stride;
    for (int r = 0; r < rows; ++r) {
        const Element* from = call.q + b * stride[0] + h * stride[1] + (first + r) * stride[2];
        for (int d = 0; d < D; ++d) q[r * D + d] = element(from[d * stride[3]]) * SCALE;
    }
    std::memset(q + rows * D, 0, sizeof(float) * size_t(round_up(rows, MR) - rows) * D);
}

// MR rows against the keys [j_lo, j_hi) of a block
static __attribute__((noinline)) void attend_block(const Call& call, Tile& tile, const float* keys, const float* values, int64_t b, int64_t h, int64_t first_row, int group,
                         int rows, int64_t j_lo, int64_t j_hi, bool full, float masked) {
    const int64_t width = j_hi - j_lo;
    float* scores = tile.scores;
    float* sums = tile.sums + group * DVP;
    for (int64_t j = j_lo; j < j_hi; j += PANEL)
        multiply_rows<NV, false>(tile.q + group * D, D, keys + j * D, D, scores + (j - j_lo), BLOCK);
    for (int r = 0; r < MR; ++r) {
        float* row = scores + r * BLOCK;
        if (r < rows) {
            score_row(call, row, b, h, first_row + group + r, j_lo, width, full, masked);
            const float shrink = update_row(tile.state[group + r], row, width);
            const float added = value_row(call, row, b, h, first_row + group + r, j_lo, width);
            if (shrink != 1.0f || added != 0.0f)
                for (int d = 0; d < DVP; d += VL) store_vector(sums + r * DVP + d, load_vector(sums + r * DVP + d) * shrink + added);
        } else {
            std::memset(row, 0, sizeof(float) * width);  // rows past the end of the tile
        }
    }
    constexpr int WHOLE = DVP / VL / STRIPE, REST = DVP / VL % STRIPE;
    for (int stripe = 0; stripe < WHOLE; ++stripe) {
        const int d = stripe * STRIPE * VL;
        multiply_rows<STRIPE, true>(scores, BLOCK, values + d * call.Tk + j_lo * STRIPE * VL, width, sums + d, DVP);
    }
    if constexpr (REST > 0) {
        constexpr int d = WHOLE * STRIPE * VL;
        multiply_rows<REST, true>(scores, BLOCK, values + d * call.Tk + j_lo * REST * VL, width, sums + d, DVP);
    }
}

// One pass over the keys that rows [first, first + rows) may see; `exact` visits all keys, masked ones with the score FILL.
static __attribute__((noinline)) void attend_rows(const Call& call, Tile& tile, const float* keys, const float* values, int64_t b, int64_t h, int64_t first, int rows, bool exact) {
    const float masked = exact ? FILL : -std::numeric_limits<float>::infinity();
    const int64_t i_hi = first + rows - 1, Tk = call.Tk;
    for (int r = 0; r < rows; ++r) tile.state[r] = start_row(sink_of(call, b, h, first + r));
    std::memset(tile.sums, 0, sizeof(float) * size_t(round_up(rows, MR)) * DVP);
    constexpr int64_t SPAN = 16 * BLOCK;  // far masks (a window over a long context) are skipped by spans, then by blocks, then by panels
    for (int64_t j_span = 0; j_span < Tk; j_span += SPAN) {
        const int64_t span_end = j_span + SPAN < Tk ? j_span + SPAN : Tk;
        if (!exact && !tile_may(call, b, h, first, i_hi, j_span, span_end - 1)) continue;
        for (int64_t j_block = j_span; j_block < span_end; j_block += BLOCK) {
            const int64_t block_end = j_block + BLOCK < Tk ? j_block + BLOCK : Tk;
            if (!exact && !(tile_may(call, b, h, first, i_hi, j_block, block_end - 1) && keys_may(call, b, h, j_block, block_end - 1))) continue;
            const bool block_full = tile_must(call, b, h, first, i_hi, j_block, block_end - 1);
            for (int group = 0; group < rows; group += MR) {
                const int group_rows = rows - group < MR ? rows - group : MR;
                const int64_t i_lo = first + group, i_last = i_lo + group_rows - 1;
                int64_t j_lo = j_block, j_hi = block_end;
                bool full = block_full;
                if (!full && !exact) {
                    while (j_lo < j_hi && !tile_may(call, b, h, i_lo, i_last, j_lo, (j_lo + PANEL < j_hi ? j_lo + PANEL : j_hi) - 1)) j_lo += PANEL;
                    while (j_lo < j_hi && !tile_may(call, b, h, i_lo, i_last, (j_hi - 1) / PANEL * PANEL, j_hi - 1)) j_hi = (j_hi - 1) / PANEL * PANEL;
                    if (j_lo >= j_hi) continue;
                    full = tile_must(call, b, h, i_lo, i_last, j_lo, j_hi - 1);
                }
                attend_block(call, tile, keys, values, b, h, first, group, group_rows, j_lo, j_hi, full, masked);
            }
        }
    }
}

// Keys and values are packed for as many heads at a time as fit in this: memory stays O(T), and what is packed stays near.
constexpr int64_t PACKED_FLOATS = int64_t(1) << 20;  // 4 MiB: one head of 8192 keys and values of 64

static void attend_packed(const Call& call) {
    const int64_t panels = (call.Tk + PANEL - 1) / PANEL, key_size = panels * PANEL * D, value_size = call.Tk * DVP;
    const int64_t key_group = shared_key_heads(call), value_group = call.H / call.Hv;
    int64_t step = key_group;  // query heads of a unit: whole groups of both
    while (step % value_group != 0) step += key_group;
    const int64_t unit_keys = step / key_group, unit_values = step / value_group, units_of_batch = call.H / step, units = call.B * units_of_batch;
    const int64_t fitting = PACKED_FLOATS / (unit_keys * key_size + unit_values * value_size);
    const int64_t chunk = smaller(units, fitting > 1 ? fitting : 1);
    const int threads = omp_get_max_threads();
    const int64_t keys_size = chunk * unit_keys * key_size, values_size = chunk * unit_values * value_size, scratch_size = TILE_ROWS * (D + DVP) + MR * BLOCK + 16;
    Workspace workspace(keys_size + values_size + threads * scratch_size + 32);
    float *keys = workspace.take(keys_size), *values = workspace.take(values_size), *scratch = workspace.data;
    // Smaller tiles where there would be fewer than four for each thread.
    int64_t tile_rows = TILE_ROWS;
    while (tile_rows > 4 * MR && chunk * step * ((call.Tq + tile_rows - 1) / tile_rows) < 4 * threads) tile_rows -= 4 * MR;
    const int64_t tiles = (call.Tq + tile_rows - 1) / tile_rows;
#pragma omp parallel num_threads(threads) if (is_worth_threads(call))
    {
        Tile tile;
        tile.scores = scratch + omp_get_thread_num() * scratch_size;
        tile.q = tile.scores + MR * BLOCK;
        tile.sums = tile.q + TILE_ROWS * D;
        for (int64_t first_unit = 0; first_unit < units; first_unit += chunk) {
            const int64_t here = smaller(chunk, units - first_unit);
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < here * unit_keys * panels; ++n) {
                const int64_t item = n / panels, unit = first_unit + item / unit_keys;
                pack_keys(call, unit / units_of_batch, (unit % units_of_batch * unit_keys + item % unit_keys) * key_group, n % panels, keys + item * key_size + n % panels * PANEL * D, std::make_index_sequence<PARTS>());
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < here * unit_values * panels; ++n) {
                const int64_t item = n / panels, unit = first_unit + item / unit_values;
                pack_values(call, unit / units_of_batch, unit % units_of_batch * unit_values + item % unit_values, n % panels, values + item * value_size);
            }
            // Last rows first: under a causal mask they see most keys, and the short ones fill the end. The barrier at the end
            // keeps the next heads from being packed over keys that are still read.
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < here * step * tiles; ++n) {
                const int64_t item = n / tiles, in_unit = item % step, unit = first_unit + item / step;
                const int64_t b = unit / units_of_batch, h = unit % units_of_batch * step + in_unit, first = (tiles - 1 - n % tiles) * tile_rows;
                const int rows = int(call.Tq - first < tile_rows ? call.Tq - first : tile_rows);
                const float* k = keys + (item / step * unit_keys + in_unit / key_group) * key_size;
                const float* v = values + (item / step * unit_values + in_unit / value_group) * value_size;
                load_queries(call, b, h, first, rows, tile.q);
                attend_rows(call, tile, k, v, b, h, first, rows, false);
                bool redo = false;
                for (int r = 0; r < rows; ++r) redo |= needs_fill(tile.state[r]);
                if (redo) attend_rows(call, tile, k, v, b, h, first, rows, true);
                for (int r = 0; r < rows; ++r) write_row(call, b, h, first + r, tile.sums + r * DVP, tile.state[r]);
            }
        }
    }
}
