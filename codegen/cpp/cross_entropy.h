// Cross entropy of rows, forward and backward: a row goes by in blocks that stay in the L1 cache, read from memory once.
// The includer defines X, RANK (dims of the targets), CAPPED, FORWARD or BACKWARD as the entry's name.

constexpr int64_t PARALLEL_FROM = 16384;  // classes of all rows together; below, waking the threads (5 to 10 us) takes longer than the work
constexpr int64_t BLOCK = 1024;           // 4 KiB of floats: in L1 beside the input
constexpr float LOG2_E = 1.44269504f, INFINITE = std::numeric_limits<float>::infinity();

template <class Element>
struct RowOf {
    const Element* x;
    int64_t stride, classes;
    float cap;

    float value(int64_t j) const {
        const float z = element(x[j * stride]);
        return CAPPED ? cap * tanh_of(z / cap) : z;
    }

    // Classes [from, from + count) as floats, -inf up to a whole vector. Where the logits are such floats, they are not copied.
    const float* block(int64_t from, int64_t count, float* buffer) const {
        if constexpr (std::is_same_v<Element, float> && !CAPPED)
            if (stride == 1 && count % VL == 0) return x + from;
        int64_t d = 0;
        if (stride == 1)
            for (; d + VL <= count; d += VL) store_vector(buffer + d, load_vector(x + from + d));
        for (; d < count; ++d) buffer[d] = element(x[(from + d) * stride]);
        if constexpr (CAPPED)
            for (d = 0; d < count; ++d) buffer[d] = cap * tanh_of(buffer[d] / cap);
        for (d = count; d < round_up(count, VL); ++d) buffer[d] = -INFINITE;
        return buffer;
    }
};
using Row = RowOf<X>;

// The positions of a row in a tensor with the targets' leading dims.
INLINE int64_t offset_of(int64_t row, const int64_t* sizes, const int64_t* strides) {
    int64_t at = 0;
    for (int d = RANK - 1; d >= 0; --d) {
        at += row % sizes[d] * strides[d];
        row /= sizes[d];
    }
    return at;
}
INLINE int64_t count_of(const int64_t* sizes) {
    int64_t rows = 1;
    for (int d = 0; d < RANK; ++d) rows *= sizes[d];
    return rows;
}

#ifdef FORWARD
struct Statistics {
    float top, rest, mean;  // of z; log of the sum of exp(z - top); mean of z - top
};

INLINE Statistics statistics_of(const Row& row, bool with_mean) {
    alignas(64) float buffer[BLOCK];
    float top = -INFINITE;
    Vector totals[4] = {};
    double sum = 0;  // of z
    for (int64_t from = 0; from < row.classes; from += BLOCK) {
        const int64_t count = smaller(BLOCK, row.classes - from), padded = round_up(count, VL);
        const float* z = row.block(from, count, buffer);
        Vector tops = broadcast(-INFINITE);
        for (int64_t d = 0; d < padded; d += VL) tops = larger(load_vector(z + d), tops);  // leaves NaN out; the sum has it
        const float here = max_of(tops);
        if (here > top) {
            const Vector scale = exp2_of(broadcast((top - here) * LOG2_E));
            for (Vector& total : totals) total *= scale;
            top = here;
        }
        const float shift = top == -INFINITE ? 0.0f : top;  // -inf - -inf would be NaN, and there may be numbers to come
        int64_t d = 0;
        for (; d + 4 * VL <= padded; d += 4 * VL)
            for (int k = 0; k < 4; ++k) totals[k] += exp2_of((load_vector(z + d + k * VL) - shift) * LOG2_E);
        for (; d < padded; d += VL) totals[0] += exp2_of((load_vector(z + d) - shift) * LOG2_E);
        if (with_mean)
            for (d = 0; d < count; ++d) sum += z[d];
    }
    const float total = sum_of((totals[0] + totals[1]) + (totals[2] + totals[3]));
    return {top, __builtin_logf(total), float(sum / double(row.classes) - top)};
}

// data: losses, statistics, status, logits, targets. ints: their sizes and strides, ignore_index. floats: softcap, smoothing.
extern "C" void FORWARD(void* const* data, const int64_t* ints, const double* floats) {
    const int64_t *sizes = ints, *logits_ints = ints + 2 * RANK + 2 * (RANK + 1) + 2, *targets_ints = logits_ints + 2 * (RANK + 1);
    const int64_t rows = count_of(sizes), classes = logits_ints[RANK], ignored = targets_ints[2 * RANK];
    const int64_t *x_strides = logits_ints + RANK + 1, *t_strides = targets_ints + RANK;
    const float smoothing = float(floats[1]);
    float *const losses = static_cast<float*>(data[0]), *const statistics = static_cast<float*>(data[1]);
    int32_t* const status = static_cast<int32_t*>(data[2]);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * classes >= PARALLEL_FROM)
    for (int64_t n = 0; n < rows; ++n) {
        const Row row{static_cast<const X*>(data[3]) + offset_of(n, sizes, x_strides), x_strides[RANK], classes, float(floats[0])};
        const int64_t target = static_cast<const int64_t*>(data[4])[offset_of(n, sizes, t_strides)];
        const Statistics s = statistics_of(row, smoothing != 0.0f);
        statistics[2 * n] = s.top;
        statistics[2 * n + 1] = s.rest;
        losses[n] = 0.0f;
        if (target == ignored) continue;
        if (target < 0 || target >= classes) {  // nothing is read there; the caller raises
#pragma omp atomic write
            *status = 1;
            losses[n] = std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        const float loss = s.rest - (1.0f - smoothing) * (row.value(target) - s.top);
        losses[n] = smoothing != 0.0f ? loss - smoothing * s.mean : loss;
    }
}
#endif

#ifdef BACKWARD
// data: dlogits, grad, logits, targets, statistics. ints: their sizes and strides, ignore_index. floats: softcap, smoothing.
extern "C" void BACKWARD(void* const* data, const int64_t* ints, const double* floats) {
    const int64_t *grad_ints = ints + 2 * (RANK + 1), *logits_ints = grad_ints + 2 * RANK, *targets_ints = logits_ints + 2 * (RANK + 1);
    const int64_t *sizes = grad_ints, *statistics_ints = targets_ints + 2 * RANK;
    const int64_t rows = count_of(sizes), classes = logits_ints[RANK], ignored = statistics_ints[2 * (RANK + 1)];
    const int64_t *x_strides = logits_ints + RANK + 1, *s_strides = statistics_ints + RANK + 1;
    const float cap = float(floats[0]), smoothing = float(floats[1]), everywhere = smoothing / float(classes);
#pragma omp parallel for schedule(static) if (rows > 1 && rows * classes >= PARALLEL_FROM)
    for (int64_t n = 0; n < rows; ++n) {
        const Row row{static_cast<const X*>(data[2]) + offset_of(n, sizes, x_strides), x_strides[RANK], classes, cap};
        X* const out = static_cast<X*>(data[0]) + n * classes;
        const int64_t target = static_cast<const int64_t*>(data[3])[offset_of(n, sizes, targets_ints + RANK)];
        if (target == ignored) {
            std::memset(static_cast<void*>(out), 0, size_t(classes) * sizeof(X));
            continue;
        }
        if (target < 0 || target >= classes) {
            for (int64_t j = 0; j < classes; ++j) store_element(out + j, std::numeric_limits<float>::quiet_NaN());
            continue;
        }
        const float* const statistics = static_cast<const float*>(data[4]) + offset_of(n, sizes, s_strides);
        const float top = statistics[0], rest = statistics[s_strides[RANK]], grad = static_cast<const float*>(data[1])[offset_of(n, sizes, grad_ints + RANK)];
        alignas(64) float buffer[BLOCK], gradients[BLOCK];
        for (int64_t from = 0; from < classes; from += BLOCK) {
            const int64_t count = smaller(BLOCK, classes - from);
            const float* z = row.block(from, count, buffer);
            for (int64_t d = 0; d < count; d += VL) {
                const Vector v = load_vector(z + d), ratio = v / cap;
                Vector dz = (exp2_of(((v - top) - rest) * LOG2_E) - everywhere) * grad;
                if constexpr (CAPPED) dz *= 1.0f - ratio * ratio;
                store_vector(gradients + d, dz);
            }
            if constexpr (std::is_same_v<X, float>) std::memcpy(out + from, gradients, size_t(count) * sizeof(float));
            else
                for (int64_t d = 0; d < count; ++d) store_element(out + from + d, gradients[d]);
        }
        const float z = row.value(target), slope = CAPPED ? 1.0f - (z / cap) * (z / cap) : 1.0f;
        store_element(out + target, (__builtin_expf((z - top) - rest) - everywhere - (1.0f - smoothing)) * grad * slope);
    }
}
#endif
