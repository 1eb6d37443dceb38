// The rows around the products: y = prologue(x) with its row's statistics before them; partners and rounding after them.
// The includer defines X, K, NORM (0 none, 1 rms, 2 layer), IDENTITY (y is x), the Call, and `prologue`, which is generated.

constexpr int64_t GRAIN = 16;  // floats of a cache line
// A stride of whole pages would put a dozen rows in one set of the L1 cache.
constexpr int64_t Y_ROW = round_up(K, GRAIN) + (round_up(K, GRAIN) % 256 == 0 ? GRAIN : 0);

INLINE float square_sum(const float* x, float shift) {
    Vector sums[4] = {};  // four, because an FMA takes four cycles
    int64_t k = 0;
    for (; k + 4 * VL <= K; k += 4 * VL)
        for (int n = 0; n < 4; ++n) {
            const Vector v = load_vector(x + k + n * VL) - shift;
            sums[n] += v * v;
        }
    float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if constexpr (K % (4 * VL) != 0)
        for (; k < K; ++k) total += (x[k] - shift) * (x[k] - shift);
    return total;
}
INLINE float plain_sum(const float* x) {
    Vector sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * VL <= K; k += 4 * VL)
        for (int n = 0; n < 4; ++n) sums[n] += load_vector(x + k + n * VL);
    float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if constexpr (K % (4 * VL) != 0)
        for (; k < K; ++k) total += x[k];
    return total;
}

INLINE bool has_unit(const Call& call) { return X_UNIT || call.x_column == 1; }

// Row i of x in float32, at `to` unless it lies ready.
INLINE const float* widened(const Call& call, int64_t i, float* to) {
    const X* from = call.x + i * call.x_row;
    if constexpr (std::is_same_v<X, float>)
        if (has_unit(call)) return reinterpret_cast<const float*>(from);
    if (has_unit(call)) {
        int64_t k = 0;
        for (; k + VL <= K; k += VL) store_vector(to + k, load_vector(from + k));
        if constexpr (K % VL != 0)
            for (; k < K; ++k) to[k] = element(from[k]);
    } else {
        for (int64_t k = 0; k < K; ++k) to[k] = element(from[k * call.x_column]);
    }
    return to;
}

// y of row i, at `to`.
static void make_row(const Call& call, int64_t i, float* to) {
    const float* x = widened(call, i, to);
    if constexpr (IDENTITY) {
        if (x != to) std::memcpy(to, x, sizeof(float) * K);
    } else {
        float u = 0.0f, r = 0.0f;
        if constexpr (NORM == 2) u = plain_sum(x) / float(K);
        if constexpr (NORM != 0) r = 1.0f / __builtin_sqrtf(square_sum(x, u) / float(K) + call.eps);
        prologue(call, i, x, u, r, to, 0, K);
    }
}

// y of row i, at `to` unless it lies ready.
INLINE const float* row_of(const Call& call, int64_t i, float* to) {
    if constexpr (IDENTITY) return widened(call, i, to);
    make_row(call, i, to);
    return to;
}

// May the products read x itself as y? A stride of whole pages is copied, see Y_ROW.
INLINE bool is_ready(const Call& call, bool one_row) {
    if constexpr (IDENTITY && std::is_same_v<X, float>) return has_unit(call) && (one_row || call.x_row % 256 != 0);
    return false;
}

// Columns [0, width) with every pair exchanged; they begin with a block.
template <int block, int half>
INLINE void exchange(float* __restrict to, const float* from, int64_t width) {
    if constexpr (half >= 8) {
        for (int64_t start = 0; start < width; start += block) {
            for (int t = 0; t < half; ++t) to[start + t] = from[start + half + t];
            for (int t = half; t < 2 * half; ++t) to[start + t] = from[start - half + t];
            for (int t = 2 * half; t < block; ++t) to[start + t] = from[start + t];
        }
    } else if constexpr (block == 2 * half && VL % block == 0) {  // interleaved; both buffers reach to a whole vector
        for (int64_t j = 0; j < width; j += VL) store_vector(to + j, mirror_lanes<half>(load_vector(from + j), std::make_index_sequence<VL>()));
    } else {
        for (int64_t j = 0; j < width; ++j) {
            const int t = int(j % block);
            to[j] = from[t < half ? j + half : t < 2 * half ? j - half : j];
        }
    }
}

// Where the results of row i go from column `first` on: the output itself, or a buffer that `deliver` rounds from.
INLINE float* results_at(const Out& out, int64_t i, int64_t first, float* buffer) {
    if constexpr (std::is_same_v<X, float>)
        if (OUT_UNIT || out.column == 1) return reinterpret_cast<float*>(out.data) + i * out.row + first;
    return buffer;
}
INLINE void deliver(const Out& out, int64_t i, int64_t first, int64_t width, const float* results) {
    if constexpr (OUT_UNIT && std::is_same_v<X, float>) return;
    X* to = out.data + i * out.row + first * out.column;
    if (static_cast<const void*>(to) == results) return;
    int64_t j = 0;
    if (OUT_UNIT || out.column == 1)
        for (; j + VL <= width; j += VL) write_vector(to + j, load_vector(results + j));
    for (; j < width; ++j) store_element(to + j * out.column, results[j]);
}
// Asks for the cache lines of `width` elements that will be written or read.
template <bool WRITTEN, class Element>
INLINE void expect_elements(const Element* from, int64_t column, int64_t width) {
    if (column == 1)
        for (int64_t j = 0; j < width; j += int64_t(64 / sizeof(Element))) __builtin_prefetch(from + j, WRITTEN, 2);
}
