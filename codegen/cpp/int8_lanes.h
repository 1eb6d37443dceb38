// Lanes of many rows that hold four bytes each, and what linear_many.h asks for beside them: y becomes bytes with a step a row, sums of int32 become
// accumulators a row of a strip at a time. "mixed": the strip's outlier columns are packed as floats and added there.

constexpr int64_t EACH = 4;  // elements of K in a lane
constexpr int64_t LANES = (K + 3) / 4;
// A row: t, Step, and in "mixed" the outliers of y.
constexpr int64_t STEP_AT = round_up(LANES, 4), OUTLIERS_AT = STEP_AT + STEP_SIZE, LANES_USED = round_up(OUTLIERS_AT + (MIXED ? K : 0), GRAIN);
constexpr int64_t LANES_ROW = LANES_USED + (LANES_USED % 256 == 0 ? GRAIN : 0);  // see Y_ROW
constexpr int64_t MARKS = MIXED ? round_up(K / 4 + VL, GRAIN) : 0;  // floats that hold a byte for every column
constexpr int64_t LANES_BUFFER = Y_ROW + MARKS;
constexpr int64_t SHARED = MIXED ? round_up(1 + K, GRAIN) + MARKS : 0;  // the list of outliers, their marks
constexpr int64_t EXCESS_AT = MIXED ? K : 0, OUTER = EXCESS_AT + BRGEMM;  // the outliers of a strip's weights, and what its columns' sums have too much
// Columns of a strip, at most: wide enough for results and captures to come in runs, since a page is entered for each of its rows. With strips of 32, a
// projection of 1024 x 768 -> 768 with a residual took 5.1 ms, of which 2.0 waited for the residual; with 64, 128 and 256 3.9, 3.8 and 3.9.
constexpr int64_t STRIP = 128;

INLINE Vector add_product(Vector sum, Vector t, Vector w) {
    const IntVector total = bit_cast<IntVector>(sum), x = bit_cast<IntVector>(t), y = bit_cast<IntVector>(w);
    return bit_cast<Vector>(BRGEMM ? dot4_raised(total, x, y) : dot4(total, y, x));
}
INLINE bool is_x_ready(const Call&) { return false; }
INLINE const float* ready_lanes(const Call&, int64_t) { return nullptr; }

struct Source {
    const int8_t* q;
    int64_t row;
    bool by_columns() const { return false; }
    const int8_t* at(int64_t n, int64_t k) const { return q + n * row + k; }
    __attribute__((always_inline)) Vector along(int64_t n, int64_t k, int64_t left) const {
        const IntVector bytes = load_bytes(q + n * row + k, left);
        return bit_cast<Vector>(BRGEMM ? bytes : as_factors(bytes));
    }
    Vector across(int64_t, int64_t, int64_t, int) const { return Vector{}; }
};
template <class F>
INLINE void with_source(const Call& call, int w, int64_t first, F f) {
    f(Source{static_cast<const int8_t*>(call.weight[w].data) + first * call.weight[w].row, call.weight[w].row});
}

INLINE const int32_t* outliers_of(const float* shared) { return reinterpret_cast<const int32_t*>(shared); }
INLINE uint8_t* marks_of(float* shared) { return reinterpret_cast<uint8_t*>(shared + round_up(1 + K, GRAIN)); }

// Before all rows, by every thread: which columns are outliers. y is made twice where the rows say it; it is small beside the products.
static void begin_call(const Call& call, float* shared, float* floats) {
    if constexpr (MIXED) {
        uint8_t *marks = marks_of(shared), *own = reinterpret_cast<uint8_t*>(floats + Y_ROW);
#pragma omp single
        mark_static(call, marks);
        if (call.columns == nullptr) {
            std::memset(own, 0, size_t(K));
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < call.rows; ++i) {
                make_row(call, i, floats);
                mark_row(call, floats, own);
            }
#pragma omp critical(tileweld_int8_marks)
            for (int64_t k = 0; k < K; ++k) marks[k] |= own[k];
#pragma omp barrier
        }
#pragma omp single
        list_marked(marks, reinterpret_cast<int32_t*>(shared));
    }
}

INLINE void make_lanes(const Call& call, int64_t i, float* to, float* shared, float* floats) {
    const float* y = row_of(call, i, floats);
    const Step step = quantise(y, MIXED ? marks_of(shared) : nullptr, reinterpret_cast<int8_t*>(to), 4 * LANES, known_magnitude(call, i));
    if constexpr (BRGEMM)  // to t + 128, also where all t are zero
        for (int64_t k = 0; k < LANES; k += VL) store_vector(to + k, bit_cast<Vector>(bit_cast<BitVector>(load_vector(to + k)) ^ 0x80808080u));
    std::memcpy(to + STEP_AT, &step, sizeof(step));
    if constexpr (MIXED) {
        const int32_t* outliers = outliers_of(shared);
        for (int32_t n = 0; n < outliers[0]; ++n) to[OUTLIERS_AT + n] = step.finite ? y[outliers[1 + n]] : 0.0f;
    }
}

// outer[n][column of the strip]: the n-th outlier of each of its weights
static void begin_strip(const Call& call, int g, int64_t first, int64_t width, int64_t slot, const float* shared, float* outer) {
    if constexpr (MIXED) {
        const Group& group = GROUPS[g];
        const int32_t* outliers = outliers_of(shared);
        const int64_t row = slot * group.slots;
        for (int s = 0; s < group.slots; ++s) {
            const Weight& weight = call.weight[ORDER[group.first + s]];
            for (int64_t c = 0; c < slot; ++c) {
                const int8_t* q = static_cast<const int8_t*>(weight.data) + (first + c) * weight.row;
                for (int32_t n = 0; n < outliers[0]; ++n) outer[n * row + s * slot + c] = c < width ? float(q[outliers[1 + n]]) : 0.0f;
            }
        }
    }
}

// V vectors of a row's sums, at `sums`, to accumulators
template <int V>
INLINE void settle_columns(const Step& step, const float* outlier, int32_t count, const float* outer, int64_t row, const Scales& scales, int64_t first, int64_t width, float* sums) {
    Vector others[V] = {};
    for (int32_t n = 0; n < count; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) others[v] += load_vector(outer + n * row + v * VL) * outlier[n];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        const BitVector excess = BRGEMM ? bit_cast<BitVector>(load_vector(outer + EXCESS_AT * row + v * VL)) : BitVector{} + uint32_t(step.excess);
        const BitVector total = bit_cast<BitVector>(load_vector(sums + v * VL)) - excess;
        store_vector(sums + v * VL, (__builtin_convertvector(bit_cast<IntVector>(total), Vector) * step.step + others[v]) * scales_of(scales, first + v * VL, width - v * VL));
    }
}
static void settle(const Call& call, int g, const float* lanes, float* sums, int64_t slot, int64_t i, int64_t first, int64_t width, const float* shared, const float* outer, float* floats) {
    const Group& group = GROUPS[g];
    Step step;
    std::memcpy(&step, lanes + STEP_AT, sizeof(step));
    if (!step.finite) make_row(call, i, floats);
    for (int s = 0; s < group.slots; ++s, sums += slot) {
        const int w = ORDER[group.first + s];
        if (!step.finite) {
            float_columns(call.weight[w], call.scale[w], K, first, width, floats, 0, 1, sums, slot);
            continue;
        }
        const int32_t count = MIXED ? outliers_of(shared)[0] : 0;
        int64_t c = 0;
        for (; c + 4 * VL <= width; c += 4 * VL) settle_columns<4>(step, lanes + OUTLIERS_AT, count, outer + s * slot + c, slot * group.slots, call.scale[w], first + c, width - c, sums + c);
        for (; c < width; c += VL) settle_columns<1>(step, lanes + OUTLIERS_AT, count, outer + s * slot + c, slot * group.slots, call.scale[w], first + c, width - c, sums + c);
    }
}
