// Products of int8: four neighbours along K in a lane of 32 bits, summed exactly in int32. A row of y becomes bytes t and a step s, y = s t.
//
// Three ways to the same sums. A kernel is compiled on the processor that it runs on, so the choice is the compiler's:
//   VNNI (AVX-512 or AVX)   vpdpbusd multiplies unsigned with signed bytes: the weights are taken as w + 128, one xor, and 128 sum(t) is subtracted at
//                           the end, of which there is one a row of y; column sums of the weights are never needed
//   AVX2                    |w| as unsigned with t under w's sign: vpmaddubsw adds two products in 16 bits, at most 2 * 128 * 127 = 32,512: exact
//   else                    the same sums of two in 16-bit arithmetic
// That holds for every w in -128 ... 127, and |t| <= 127. Sums wrap modulo 2^32 on the way and are right at the end, for K <= 133,144.

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define TILEWELD_VNNI
#endif

typedef int16_t Int16Vector __attribute__((vector_size(VL * 4)));

// Weights as dot4 takes them.
INLINE IntVector as_factors(IntVector w) {
#if defined(TILEWELD_VNNI)
    return w ^ int32_t(0x80808080);
#else
    return w;
#endif
}
// sum[lane] + the four products of w and t in it; w from as_factors.
INLINE IntVector dot4(IntVector sum, IntVector w, IntVector t) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(t));
    return sum;
#elif defined(TILEWELD_VNNI)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "xm"(t));
    return sum;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    IntVector magnitude, signed_t, pairs;
    asm("vpabsb %1, %0" : "=x"(magnitude) : "x"(w));
    asm("vpsignb %2, %1, %0" : "=x"(signed_t) : "x"(t), "x"(w));
    asm("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(magnitude), "x"(signed_t));
    asm("vpmaddwd %2, %1, %0" : "=x"(pairs) : "x"(pairs), "x"(IntVector{} + 0x00010001));
    return sum + pairs;
#else
    const Int16Vector words = bit_cast<Int16Vector>(w), others = bit_cast<Int16Vector>(t);
    const IntVector pairs = bit_cast<IntVector>(Int16Vector((words << 8 >> 8) * (others << 8 >> 8) + (words >> 8) * (others >> 8)));
    return sum + (pairs << 16 >> 16) + (pairs >> 16);
#endif
}
// The same where t is unsigned, t + 128, and w as it is (int8_brgemm.h).
INLINE IntVector dot4_raised(IntVector sum, IntVector t, IntVector w) {
#if defined(TILEWELD_VNNI)
    return dot4(sum, t, w);
#else
    for (int shift = 0; shift < 32; shift += 8) sum += (t >> shift & 0xff) * (w << (24 - shift) >> 24);
    return sum;
#endif
}
// What dot4 adds to a sum over k too much, from the sum of t.
constexpr int32_t excess(int32_t sum_of_t) {
#if defined(TILEWELD_VNNI)
    return int32_t(128 * uint32_t(sum_of_t));
#else
    return 0 * sum_of_t;
#endif
}

// The first `count` of 4 VL bytes, zeros behind them.
INLINE IntVector load_bytes(const int8_t* p, int64_t count = 4 * VL) {
    IntVector v{};
    if (count >= 4 * VL) std::memcpy(&v, p, sizeof(v));
    else if (count > 0) std::memcpy(&v, p, size_t(count));
    return v;
}

constexpr int64_t BYTES = round_up(K, 4 * VL);  // of a row of t, zeros behind its end
constexpr int64_t BYTE_ROW = BYTES / 4;         // the same as floats

// What a row of t means: y = step * t. `finite` is 0 for a row with inf or NaN: its t is 0, and its sums are made of y itself.
struct Step {
    float step;
    int32_t excess, finite;
};
constexpr int64_t STEP_SIZE = 4;  // floats that hold a Step

INLINE int32_t magnitude_bits(float x) { return bit_cast<int32_t>(x) & 0x7fffffff; }
constexpr int32_t INFINITE = 0x7f800000;

constexpr int64_t AHEAD_OF_BYTES = 2048;  // floats: where the maximum is known this is the first pass over y, and the hardware's prefetcher ends with every page (3% of a product)

// y as bytes at `to`, 4 LANES or more of which `padded` are written, without the columns that `outlier` marks (null for none).
// known: the largest magnitude, where whoever made y took it (linear_maxima.h); -1 where it is to be found, by another pass over y.
static Step quantise(const float* y, const uint8_t* outlier, int8_t* to, int64_t padded, int32_t known) {
    int64_t k = 0;
    int32_t most = known, top = known;
    if (known < 0) {
        IntVector largest{}, highest{};  // of the columns that become bytes, of all: magnitudes of floats are ordered as integers are, NaN above inf
        for (; k + VL <= K; k += VL) {
            const IntVector bits = bit_cast<IntVector>(load_vector(y + k)) & 0x7fffffff;
            highest = bits > highest ? bits : highest;
            if (outlier != nullptr) {
                const IntVector inner = load_integers(reinterpret_cast<const int8_t*>(outlier) + k) == 0 ? bits : IntVector{};
                largest = inner > largest ? inner : largest;
            }
        }
        most = top = 0;
        for (int lane = 0; lane < VL; ++lane) {
            most = largest[lane] > most ? largest[lane] : most;
            top = highest[lane] > top ? highest[lane] : top;
        }
        for (; k < K; ++k) {
            const int32_t bits = magnitude_bits(y[k]);
            top = bits > top ? bits : top;
            if (outlier != nullptr && !outlier[k] && bits > most) most = bits;
        }
        if (outlier == nullptr) most = top;
    }
    const float step = bit_cast<float>(most) / 127.0f;
    if (top >= INFINITE || !(step > 0.0f)) {
        std::memset(to, 0, size_t(padded));
        return {0.0f, 0, top < INFINITE};
    }
    constexpr float ROUND = 0x1.8p23f;  // adding it rounds to an integer, half to even, which is left in the low bits
    int32_t total = 0;
    IntVector totals{};
    for (k = 0; k + VL <= K; k += VL) {
        __builtin_prefetch(y + k + AHEAD_OF_BYTES);
        const Vector scaled = load_vector(y + k) / step;  // |.| <= 127 and a rounding
        IntVector t = bit_cast<IntVector>(scaled + ROUND) - bit_cast<int32_t>(ROUND);
        t = t > 127 ? IntVector{} + 127 : t < -127 ? IntVector{} - 127 : t;
        if (outlier != nullptr) t = load_integers(reinterpret_cast<const int8_t*>(outlier) + k) == 0 ? t : IntVector{};
        totals += t;
        *reinterpret_cast<ByteVector*>(to + k) = __builtin_convertvector(t, ByteVector);
    }
    for (int lane = 0; lane < VL; ++lane) total += totals[lane];
    for (; k < K; ++k) {
        const float scaled = y[k] / step;
        int32_t t = bit_cast<int32_t>(scaled + ROUND) - bit_cast<int32_t>(ROUND);
        t = outlier != nullptr && outlier[k] ? 0 : t > 127 ? 127 : t < -127 ? -127 : t;
        total += t;
        to[k] = int8_t(t);
    }
    std::memset(to + K, 0, size_t(padded - K));
    return {step, excess(total), 1};
}

// ---- scales: float32, for every row of a weight one, or one for each GROUP[w] columns

struct Scales {
    const float* data;
    int64_t row, column;
};
// Of the rows [first, first + count), where there is one a row
INLINE Vector scales_of(const Scales& scales, int64_t first, int64_t count) { return gather_vector(scales.data + first * scales.row, scales.row, int(smaller(VL, count))); }
