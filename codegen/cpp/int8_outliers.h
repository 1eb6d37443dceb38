// Outlier columns ("mixed"): those that the call names, or those where some row has a finite |y| >= threshold. They are multiplied as floats.

// marks[k]: 1 for an outlier; set from the call's own, zeros where it has none. Written up to a whole vector.
INLINE void mark_static(const Call& call, uint8_t* marks) {
    std::memset(marks, 0, size_t(round_up(K, VL)));
    if (call.columns != nullptr)
        for (int64_t k = 0; k < K; ++k) marks[k] = call.columns[k * call.columns_stride] != 0;
}
INLINE void mark_row(const Call& call, const float* y, uint8_t* marks) {
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) {
        const int32_t bits = bit_cast<int32_t>(y[k]) & 0x7fffffff;
        marks[k] |= uint8_t(bit_cast<float>(bits) >= call.threshold && bits < INFINITE);
    }
}
// list[0]: how many columns are marked, then which
INLINE void list_marked(const uint8_t* marks, int32_t* list) {
    int32_t count = 0;
    for (int64_t k = 0; k < K; ++k)
        if (marks[k]) list[++count] = int32_t(k);
    list[0] = count;
}
// The outliers' part of y . q; y is zero elsewhere. A gather of single bytes, or where there are many of them the whole row.
INLINE float outlier_dot(const int8_t* q, const int32_t* outliers, const float* y) {
    if (outliers[0] * 16 > K) {
        Vector total;
        dots<1>(q, y, 0, reinterpret_cast<Vector (*)[VL]>(&total));
        return sum_of(total);
    }
    float total = 0.0f;
    for (int32_t n = 1; n <= outliers[0]; ++n) total += y[outliers[n]] * float(q[outliers[n]]);
    return total;
}
