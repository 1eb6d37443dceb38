// How linear_many.h reads weights of int8 where y stays float: a strip is dequantised while it is packed.

struct Source {
    const int8_t* q;
    int64_t row;
    Scales scales;
    int64_t group;
    bool by_columns() const { return false; }
    const int8_t* at(int64_t n, int64_t k) const { return q + n * row + k; }
    __attribute__((always_inline)) Vector along(int64_t n, int64_t k, int64_t left) const {
        const Vector v = gather_vector(q + n * row + k, 1, int(smaller(VL, left)));
        const float* scale = scales.data + n * scales.row;
        if (group == K) return v * *scale;
        if (group % VL == 0) return v * scale[uint32_t(k) / uint32_t(group) * scales.column];
        float steps[VL] = {};
        for (int lane = 0; lane < VL && lane < left; ++lane) steps[lane] = scale[uint32_t(k + lane) / uint32_t(group) * scales.column];
        return v * load_vector(steps);
    }
    Vector across(int64_t, int64_t, int64_t, int) const { return Vector{}; }
};
template <class F>
INLINE void with_source(const Call& call, int w, int64_t first, F f) {
    const Weight& weight = call.weight[w];
    const Scales& scales = call.scale[w];
    f(Source{static_cast<const int8_t*>(weight.data) + first * weight.row, weight.row, {scales.data + first * scales.row, scales.row, scales.column}, GROUP[w]});
}
