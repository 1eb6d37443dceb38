// Rows of an RMS norm: one pass for the sum of squares, one that writes; the second finds the row in the L1 cache.
// The includer defines X, Weight, Out, RANK, HAS_WEIGHT, ROUND_BEFORE, ENTRY.

constexpr int64_t PARALLEL_FROM = 32768;  // elements; below, waking the threads (5 to 10 us) takes longer than the work

// To x's dtype and back: the first of Llama's two roundings.
INLINE float rounded(float x) {
    X narrow;
    store_element(&narrow, x);
    return element(narrow);
}
INLINE Vector rounded(Vector x) {
    if constexpr (std::is_same_v<X, float>) return x;
    if constexpr (std::is_same_v<X, BFloat16>) return x == x ? bit_cast<Vector>(rounded_bits(x) << 16) : x;  // in registers
    X narrow[VL];
    write_vector(narrow, x);
    return load_vector(narrow);
}

struct Norm {
    int64_t width, x_stride, weight_stride, out_stride;  // strides of the last dim
    const Weight* weight;
    float eps, offset;

    float inverse_root(float total) const { return 1.0f / std::sqrt(total / float(width) + eps); }

    void contiguous_row(Out* out, const X* x) const {
        Vector sums[4] = {};  // four, because an FMA takes four cycles
        int64_t d = 0;
        for (; d + 4 * VL <= width; d += 4 * VL)
            for (int k = 0; k < 4; ++k) {
                const Vector v = load_vector(x + d + k * VL);
                sums[k] += v * v;
            }
        for (; d + VL <= width; d += VL) {
            const Vector v = load_vector(x + d);
            sums[0] += v * v;
        }
        float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; d < width; ++d) total += element(x[d]) * element(x[d]);
        const float rstd = inverse_root(total);
        for (d = 0; d + VL <= width; d += VL) {
            Vector v = load_vector(x + d) * rstd;
            if constexpr (ROUND_BEFORE) v = rounded(v);
            if constexpr (HAS_WEIGHT) v *= load_vector(weight + d) + offset;
            write_vector(out + d, v);
        }
        write(out, x, rstd, d);
    }

    void strided_row(Out* out, const X* x) const {
        float sums[4] = {};
        for (int64_t d = 0; d < width; ++d) sums[d & 3] += element(x[d * x_stride]) * element(x[d * x_stride]);
        write(out, x, inverse_root((sums[0] + sums[1]) + (sums[2] + sums[3])), 0);
    }

    void write(Out* out, const X* x, float rstd, int64_t from) const {
        for (int64_t d = from; d < width; ++d) {
            float v = element(x[d * x_stride]) * rstd;
            if constexpr (ROUND_BEFORE) v = rounded(v);
            if constexpr (HAS_WEIGHT) v *= element(weight[d * weight_stride]) + offset;
            store_element(out + d * out_stride, v);
        }
    }
};

// ints: out's sizes and strides, x's, the weight's. floats: eps, offset.
extern "C" void ENTRY(void* const* data, const int64_t* ints, const double* floats) {
    const int64_t *sizes = ints, *out_strides = ints + RANK, *x_strides = ints + 3 * RANK;
    Norm norm{sizes[RANK - 1], x_strides[RANK - 1], 1, out_strides[RANK - 1], nullptr, float(floats[0]), float(floats[1])};
    if constexpr (HAS_WEIGHT) {
        norm.weight = static_cast<const Weight*>(data[2]);
        norm.weight_stride = ints[4 * RANK + 1];
    }
    Out* const out = static_cast<Out*>(data[0]);
    const X* const x = static_cast<const X*>(data[1]);
    int64_t rows = 1;
    for (int d = 0; d < RANK - 1; ++d) rows *= sizes[d];
    const bool contiguous = norm.x_stride == 1 && norm.out_stride == 1 && norm.weight_stride == 1;
#pragma omp parallel for schedule(static) if (rows > 1 && rows * norm.width >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; ++row) {
        int64_t rest = row, x_at = 0, out_at = 0;
        for (int d = RANK - 2; d >= 0; --d) {
            const int64_t index = rest % sizes[d];
            rest /= sizes[d];
            x_at += index * x_strides[d];
            out_at += index * out_strides[d];
        }
        contiguous ? norm.contiguous_row(out + out_at, x + x_at) : norm.strided_row(out + out_at, x + x_at);
    }
}
