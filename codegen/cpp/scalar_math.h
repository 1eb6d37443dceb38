// The scalar language's functions without branches or calls, so that a loop over key positions vectorises.
// Largest errors in ulp against double, over a sample of all floats (tests/codegen/cpp/test_printer.py holds them): exp 1, exp2 1.3,
// log 1, tanh 1.5, sigmoid 2.6, erf 2.5, rsqrt 1.6, sin and cos 0.6. Infinities and NaN give what libm gives.

// ---- integers, with Python's rounding

template <class A, class B>
INLINE auto floor_divide(A x, B n) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    const T q = T(x) / T(n), r = T(x) % T(n);
    return q - T((r != 0) & ((r < 0) != (T(n) < 0)));
}
template <class A, class B>
INLINE auto floor_mod(A x, B n) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    const T r = T(x) % T(n);
    return r + ((r != 0) & ((r < 0) != (T(n) < 0)) ? T(n) : T(0));
}
// An index as torch reads it: negative ones count from the end. One past either end, which torch refuses, is kept inside.
template <bool inside = false, class A>
INLINE int64_t at(A index, int64_t size) {
    if (inside) return index;
    const int64_t wrapped = int64_t(index) + (index < 0 ? size : 0), cut = wrapped < 0 ? 0 : wrapped;
    return cut < size ? cut : size - 1;
}

template <class A, class B>
INLINE auto minimum(A x, B y) -> std::common_type_t<A, B> {  // NaN on either side gives NaN
    using T = std::common_type_t<A, B>;
    return (T(x) < T(y)) | (T(x) != T(x)) ? T(x) : T(y);
}
template <class A, class B>
INLINE auto maximum(A x, B y) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    return (T(x) > T(y)) | (T(x) != T(x)) ? T(x) : T(y);
}
template <class T>
INLINE T absolute(T x) { return x < 0 ? -x : x; }
INLINE float absolute(float x) { return __builtin_fabsf(x); }

// ---- floats

INLINE float floor_of(float x) { return __builtin_floorf(x); }
INLINE float ceil_of(float x) { return __builtin_ceilf(x); }
INLINE float relu_of(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
INLINE float rsqrt_of(float x) { return 1.0f / __builtin_sqrtf(x); }

template <int n>
INLINE float integer_power(float x) {
    if constexpr (n == 1) return x;
    else return (n % 2 ? x : 1.0f) * integer_power<n / 2>(x * x);
}

// 2^n for integers n in [-252, 254], in two factors so that subnormal results round once and late.
INLINE float scale_by_power(float x, int32_t n) {
    const int32_t half = n >> 1;
    return x * bit_cast<float>((half + 127) << 23) * bit_cast<float>((n - half + 127) << 23);
}
INLINE float exp_of(float x) {
    const float t = x > 89.0f ? 89.0f : (x < -104.5f ? -104.5f : x);  // NaN stays
    constexpr float ROUND = 0x1.8p23f;
    const float shifted = t * 1.44269504f + ROUND, n = shifted - ROUND;
    const float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = r * 1.38144358e-3f + 8.36879667e-3f;
    p = p * r + 4.16683964e-2f;
    p = p * r + 1.66665196e-1f;
    p = p * r + 4.99999940e-1f;
    p = p * r * r + r + 1.0f;
    const float y = scale_by_power(p, bit_cast<int32_t>(shifted) - 0x4b400000);
    return t != t ? t : (x > 88.8f ? std::numeric_limits<float>::infinity() : y);
}
INLINE float exp2_of(float x) {
    const float t = x > 129.0f ? 129.0f : (x < -151.0f ? -151.0f : x);
    constexpr float ROUND = 0x1.8p23f;
    const float shifted = t + ROUND, f = t - (shifted - ROUND);
    float p = f * 1.53533852e-4f + 1.33988727e-3f;
    p = p * f + 9.61843692e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    const float y = scale_by_power(p, bit_cast<int32_t>(shifted) - 0x4b400000);
    return t != t ? t : (x >= 128.0f ? std::numeric_limits<float>::infinity() : y);
}
INLINE float log_of(float x) {
    const bool tiny = x < 0x1p-126f;
    const float scaled = tiny ? x * 0x1p24f : x;
    const int32_t bits = bit_cast<int32_t>(scaled);
    const int32_t e = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
    const float m = bit_cast<float>(bits - (e << 23)) - 1.0f, n = float(e) - (tiny ? 24.0f : 0.0f);
    float p = m * 6.91609308e-2f - 1.17889427e-1f;
    p = p * m + 1.18721411e-1f;
    p = p * m - 1.23844579e-1f;
    p = p * m + 1.42188013e-1f;
    p = p * m - 1.66692480e-1f;
    p = p * m + 2.00022176e-1f;
    p = p * m - 2.49999866e-1f;
    p = p * m + 3.33333105e-1f;
    const float square = m * m;
    float y = p * m * square - n * 2.12194440e-4f - 0.5f * square;
    y = (m + y) + n * 0.693359375f;
    y = x == 0.0f ? -std::numeric_limits<float>::infinity() : y;
    y = x < 0.0f ? std::numeric_limits<float>::quiet_NaN() : y;
    return x < std::numeric_limits<float>::infinity() ? y : x;  // +inf and NaN give themselves
}
INLINE float tanh_of(float x) {
    const float a = absolute(x), s = x * x;
    float p = -5.72163798e-3f;  // odd series below 0.625
    p = p * s + 2.0655226e-2f;
    p = p * s - 5.37451468e-2f;
    p = p * s + 1.33315146e-1f;
    p = p * s - 3.33332837e-1f;
    const float small = p * s * x + x;
    const float large = __builtin_copysignf(1.0f - 2.0f / (exp_of(2.0f * a) + 1.0f), x);
    return a < 0.625f ? small : large;
}
INLINE float sigmoid_of(float x) {
    const float z = exp_of(-absolute(x)), d = 1.0f / (1.0f + z);
    return x < 0.0f ? z * d : d;
}
// In double: the argument is reduced exactly enough up to 2^30, and the series needs no care.
INLINE float sine_of_quarter(double x, int32_t quarter_turns) {
    const double n = __builtin_floor(x * 0.63661977236758134308 + 0.5);
    const double r = (x - n * 1.5707963267341256142) - n * 6.0771005065061922e-11, s = r * r;
    const int32_t quadrant = int32_t(int64_t(n) & 3) + quarter_turns;
    const double sine = r + r * s * (-0.16666666663838375 + s * (0.008333331867593045 + s * (-0.00019840082717532495 + s * 2.7249390067884837e-06)));
    const double cosine = 1.0 - 0.5 * s + s * s * (0.04166666666430642 + s * (-0.0013888887665881714 + s * (2.4800596939548136e-05 - s * 2.730050297090353e-07)));
    const double y = quadrant & 1 ? cosine : sine;
    return float(quadrant & 2 ? -y : y);
}
INLINE float sin_of(float x) { return sine_of_quarter(x, 0); }
INLINE float cos_of(float x) { return sine_of_quarter(x, 1); }
INLINE float erf_of(float x) {
    const float a = absolute(x), s = x * x, t = a > 4.0f ? 4.0f : a;  // erf(4) is 1 in fp32
    float p = s * 8.40992361e-5f - 8.15262843e-4f;
    p = p * s + 5.20196045e-3f;
    p = p * s - 2.68597994e-2f;
    p = p * s + 1.12837031e-1f;
    p = p * s - 3.76126349e-1f;
    p = p * s + 1.12837923f;
    float q = 1.16556816e-6f * t - 3.78972982e-5f;  // log(1 - erf), from 0.92 on
    q = q * t + 5.37129643e-4f;
    q = q * t - 4.51881671e-3f;
    q = q * t + 2.58345883e-2f;
    q = q * t - 1.09195769e-1f;
    q = q * t - 6.32633030e-1f;
    q = q * t - 1.12982523f;
    q = q * t + 2.32323859e-4f;
    return a < 0.92f ? p * x : __builtin_copysignf(1.0f - exp_of(q), x);
}
