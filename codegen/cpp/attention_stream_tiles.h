// Products of a few query rows with a chunk of keys and values that lie as rows in memory, not packed.

constexpr int CHUNK = 64;        // keys
constexpr int STREAM_ROWS = 32;  // query rows that share one reading, at most
constexpr int WIDE_ROWS = 128;   // floats; wider rows are fetched as they are used, not a chunk ahead alone
constexpr int WIDENED_ROWS = 4;  // up to so many rows, int8 and half types are widened where they are used: rows of fp32 that were written first take longer (3 query heads, 1024 keys of 64 bytes: 35 instead of 53 us)

// Queries and staged keys lie with every part of the head dim padded to whole vectors.
constexpr int padded_start(int part) {
    int at = 0;
    for (int n = 0; n < part; ++n) at += int(round_up(PART_SIZE[n], VL));
    return at;
}
constexpr int DP = padded_start(PARTS);

// Rows of keys: every part of a row somewhere, with a distance of its own to the next row.
template <class Stored>
struct RowsOf {
    const Stored* at[PARTS];
    int64_t stride[PARTS];
};
using KeyRows = RowsOf<float>;

// Rows of memory that will be read soon, into the L2 cache while there is something to compute: values while keys are multiplied, and the keys behind
// them while values are. 700 keys of 4 KV heads for 16 query heads, out of memory, six layers: 0.41 instead of 0.59 ms; into the L1 cache 0.49.
struct Ahead {
    const char* at;  // null: nothing comes
    int64_t stride, bytes;
    void fetch(int row) const {
        if (at == nullptr) return;
        for (int64_t n = 0; n < bytes; n += 64) __builtin_prefetch(at + row * stride + n, 0, 2);
    }
};
template <class Stored>
INLINE Ahead rows_ahead(const Stored* from, const int64_t* stride, int width, bool comes) {
    return {comes && stride[3] == 1 ? reinterpret_cast<const char*>(from) : nullptr, stride[2] * int64_t(sizeof(Stored)), width * int64_t(sizeof(Stored))};
}

// lane n of the result is the sum of x[n]'s lanes: a tree of log2(VL) levels instead of VL sums of their own
template <int step, size_t... lane>
INLINE Vector add_pair(Vector x, Vector y, std::index_sequence<lane...>) {
    return __builtin_shufflevector(x, y, (lane & step ? int(lane) + VL : int(lane))...) +
           __builtin_shufflevector(x, y, (lane & step ? int(lane ^ step) + VL : int(lane ^ step))...);
}
template <int step>
INLINE Vector sums_of(const Vector* x) {
    if constexpr (step == 0) return x[0];
    else return add_pair<step>(sums_of<step / 2>(x), sums_of<step / 2>(x + step), std::make_index_sequence<VL>());
}

// scores[n] = q . keys[n] for n < count, rounded up to VL; the rows behind the last one repeat it
template <class Stored>
INLINE void dot_row(const float* q, const RowsOf<Stored>& keys, int count, float* scores, const Ahead& next) {
    for (int first = 0; first < count; first += VL) {
        for (int n = first; n < first + VL && n < count; ++n) next.fetch(n);
        Vector sums[VL] = {};
#pragma GCC unroll 16
        for (int lane = 0; lane < VL; ++lane)
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; ++part) {
                const Stored* key = keys.at[part] + (first + lane < count ? first + lane : count - 1) * keys.stride[part];
#pragma GCC unroll 16
                for (int d = 0; d < round_up(PART_SIZE[part], VL); d += VL) sums[lane] += load_vector(q + padded_start(part) + d) * load_vector(key + d);
            }
        store_vector(scores + first, sums_of<VL / 2>(sums));
    }
}

// Keys that a tile of R rows takes: a power of two of them, whose products are a vector at most (5 for 3 rows, 15 products, are no faster than 4).
constexpr int tile_keys(int R) {
    int keys = 1;
    while (2 * keys * R <= VL) keys *= 2;
    return keys;
}

// scores[r][n] = q[r] . keys[n] for R rows and n < count, rounded up to tile_keys(R); the keys behind the last one repeat it.
// VL products at a time: their sums are one tree, and a vector of a key is loaded once for R rows.
// ahead: the keys of the next tile are fetched on the way, where rows are wide (a latent of 2048 bytes, read once as key and value: 9%).
template <int R, class Stored>
INLINE void dot_tile(const float* q, const RowsOf<Stored>& keys, int first, int count, float* scores, bool ahead) {
    constexpr int C = tile_keys(R);
    Vector sums[VL] = {};
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; ++part) {
        const Stored* key[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) key[c] = keys.at[part] + (first + c < count ? first + c : count - 1) * keys.stride[part];
        const int start = padded_start(part), width = int(round_up(PART_SIZE[part], VL));
#pragma GCC unroll 1
        for (int d = 0; d < width; d += VL) {
            Vector columns[C];
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) columns[c] = load_vector(key[c] + d);
            if (D > WIDE_ROWS && ahead)
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) __builtin_prefetch(key[c] + C * keys.stride[part] + d);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Vector x = load_vector(q + r * DP + start + d);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c) sums[r * C + c] += x * columns[c];
            }
        }
    }
    float found[VL];
    store_vector(found, sums_of<VL / 2>(sums));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * CHUNK + first, found + r * C, sizeof(float) * C);
}

constexpr int TILE_ROWS_OF_KEYS = VL == 4 ? 2 : 4;

// scores [rows, CHUNK] of the keys [0, count); q and scores have whole tiles of rows
template <int R, class Stored>
INLINE void dot_tiles(const float* q, const RowsOf<Stored>& keys, int rows, int count, float* scores, const Ahead& next) {
    constexpr int C = tile_keys(R);
    for (int first = 0; first < count; first += C) {
        for (int n = first; n < first + C && n < count; ++n) next.fetch(n);
        for (int r = 0; r < rows; r += R) dot_tile<R>(q + r * DP, keys, first, count, scores + r * CHUNK, r == 0);
    }
}
template <class Stored>
static __attribute__((noinline)) void dot_keys(const float* q, const RowsOf<Stored>& keys, int rows, int count, float* scores, Ahead next) {
    if (rows == 1 || (rows < 4 && std::is_same_v<Stored, float>)) {
        for (int r = 0; r < rows; ++r, next.at = nullptr) dot_row(q + r * DP, keys, count, scores + r * CHUNK, next);
    } else if (rows == 2) dot_tiles<2>(q, keys, rows, count, scores, next);
    else if (VL > 4 && rows == 3) dot_tiles<3>(q, keys, rows, count, scores, next);
    else dot_tiles<TILE_ROWS_OF_KEYS>(q, keys, rows, count, scores, next);
}

// sums[r] (+)= sum over keys of p[r][key] values[key], R rows by N vectors of columns; values as they are stored, widened once for R rows
template <int R, int N, class Stored>
INLINE void value_tile(const float* p, const Stored* values, int64_t stride, int count, float* sums, const Ahead& next) {
    Vector total[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[r][n] = load_vector(sums + r * DVP + n * VL);
    for (int key = 0; key < count; ++key) {
        Vector columns[N];
        next.fetch(key);
        if constexpr (R > 1 && DVP > WIDE_ROWS && std::is_same_v<Stored, float>)  // from the L2 cache: of a wide row a stripe is read here, and the processor does not see where the next one is
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) __builtin_prefetch(values + (key + 6) * stride + n * VL);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) columns[n] = load_vector(values + key * stride + n * VL);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[r][n] += p[r * CHUNK + key] * columns[n];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_vector(sums + r * DVP + n * VL, total[r][n]);
}
template <int R, int N, class Stored>
INLINE void value_rows(const float* p, const Stored* values, int64_t stride, int count, float* sums, Ahead next) {
    int d = 0;
#pragma GCC unroll 1
    for (; d + N * VL <= DVP; d += N * VL) {
        value_tile<R, N>(p, values + d, stride, count, sums + d, next);
        next.at = nullptr;
    }
    if constexpr (DVP / VL % N > 0) value_tile<R, DVP / VL % N>(p, values + d, stride, count, sums + d, next);
}

// sums [rows, DVP] += p [rows, CHUNK] values [count]; p and sums have whole tiles of rows
template <class Stored>
static __attribute__((noinline)) void add_values(const float* p, const Stored* values, int64_t stride, int rows, int count, float* sums, Ahead next) {
    constexpr int R = TILE_ROWS_OF_KEYS, N = VL == 16 ? 4 : 2;
    if (rows == 1) return value_rows<1, 8>(p, values, stride, count, sums, next);
    if (rows == 2) return value_rows<2, N>(p, values, stride, count, sums, next);
    if (VL > 4 && rows == 3) return value_rows<3, N>(p, values, stride, count, sums, next);
    int r = 0;
    if constexpr (VL == 16)
        for (; rows - r > R; r += 2 * R, next.at = nullptr) value_rows<2 * R, 3>(p + r * CHUNK, values, stride, count, sums + r * DVP, next);  // a value that is not in the L1 cache is read half as often
    for (; r < rows; r += R, next.at = nullptr) value_rows<R, N>(p + r * CHUNK, values, stride, count, sums + r * DVP, next);
}

// `count` rows of `width` in fp32, in place where they already are: returns where they lie, and their stride; else copied to rows of `row`
template <int width, class Stored>
INLINE const float* stage_rows(const Stored* from, const int64_t* stride, int count, float* to, int64_t row, int64_t* row_stride) {
    constexpr int padded = int(round_up(width, VL));
    if constexpr (std::is_same_v<Stored, float> && width == padded)
        if (stride[3] == 1) {
            *row_stride = stride[2];
            return reinterpret_cast<const float*>(from);
        }
    *row_stride = row;
    if (width == padded && stride[3] == 1) {
        const int64_t step = stride[2];
        for (int n = 0; n < count; ++n)
#pragma GCC unroll 8
            for (int d = 0; d < padded; d += VL) store_vector(to + n * row + d, load_vector(from + n * step + d));
        return to;
    }
    for (int n = 0; n < count; ++n)
        for (int d = 0; d < padded; d += VL) store_vector(to + n * row + d, gather_vector(from + n * stride[2] + d * stride[3], stride[3], width - d));
    return to;
}
