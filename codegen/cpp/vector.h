// Vectors of floats by GCC's and clang's vector extensions, 16-bit floats, and the exponential of the softmax.
// Two instructions are written out: immintrin.h would take a quarter of the time to compile a kernel, and <cmath> 0.13 s (builtins do what it has).
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#define INLINE static inline __attribute__((always_inline))

// A micro-kernel holds MR rows x NV vectors of sums in registers: 6 x 4 of AVX-512's 32, 6 x 2 of the 16 of AVX2 and SSE.
#if defined(__AVX512F__)
constexpr int VL = 16, MR = 6, NV = 4;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6, NV = 2;
#else
constexpr int VL = 4, MR = 6, NV = 2;
#endif

typedef float Vector __attribute__((vector_size(VL * 4)));
typedef float LooseVector __attribute__((vector_size(VL * 4), aligned(4), may_alias));  // at any address
typedef int32_t IntVector __attribute__((vector_size(VL * 4)));
typedef uint32_t BitVector __attribute__((vector_size(VL * 4)));
typedef uint16_t ShortVector __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef int8_t ByteVector __attribute__((vector_size(VL), aligned(1), may_alias));

struct Half { uint16_t bits; };      // IEEE binary16
struct BFloat16 { uint16_t bits; };  // the upper half of a float

template <class To, class From>
INLINE To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

constexpr int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- element(x): what the scalar language computes with, float or integer

INLINE float element(float x) { return x; }
INLINE float element(double x) { return float(x); }
INLINE float element(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
INLINE float element(Half x) {  // integer operations only, so that it vectorises without F16C
    const float magnitude = bit_cast<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t bits = bit_cast<uint32_t>(magnitude) | (magnitude >= 65536.0f ? 0x7f800000u : 0u);  // inf, NaN
    return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}
INLINE int64_t element(int64_t x) { return x; }
INLINE int32_t element(int32_t x) { return x; }
INLINE int32_t element(int16_t x) { return x; }
INLINE int32_t element(int8_t x) { return x; }
INLINE int32_t element(uint8_t x) { return x; }

// ---- floats to the output's dtype, rounded to nearest even

INLINE void store_element(float* p, float x) { *p = x; }
INLINE void store_element(BFloat16* p, float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void store_element(Half* p, float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) half = 0x7e00;          // NaN
    else if (magnitude >= 0x477ff000) half = 0x7c00;    // from 65520 on: inf
    else if (magnitude >= 0x38800000) half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    else half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;  // subnormal: 0.5 has an ulp of 2^-24
    p->bits = uint16_t(sign | half);
}

// ---- vectors

INLINE Vector broadcast(float x) { return x - Vector{}; }
INLINE Vector load_vector(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
INLINE Vector load_vector(const BFloat16* p) {
#if defined(__AVX2__)
    BitVector x;  // GCC 12 widens AVX-512's in two halves
    asm("vpmovzxwd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const ShortVector*>(p)));
    return bit_cast<Vector>(x << 16);
#else
    return bit_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const ShortVector*>(p), BitVector) << 16);
#endif
}
INLINE Vector load_vector(const Half* p) {
    Vector x;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
    asm("vcvtph2ps %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const ShortVector*>(p)));
    return x;
#else
    for (int lane = 0; lane < VL; ++lane) x[lane] = element(p[lane]);
    return x;
#endif
}
INLINE IntVector load_integers(const int8_t* p) {
#if defined(__AVX2__)
    IntVector x;  // GCC 12 takes the bytes apart one by one
    asm("vpmovsxbd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const ByteVector*>(p)));
    return x;
#else
    return __builtin_convertvector(*reinterpret_cast<const ByteVector*>(p), IntVector);
#endif
}
INLINE Vector load_vector(const int8_t* p) { return __builtin_convertvector(load_integers(p), Vector); }
INLINE void store_vector(float* p, Vector x) { *reinterpret_cast<LooseVector*>(p) = x; }

// The upper halves of floats, rounded to nearest even; not for NaN.
INLINE BitVector rounded_bits(Vector x) {
    const BitVector bits = bit_cast<BitVector>(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE void write_vector(float* p, Vector x) { store_vector(p, x); }
INLINE void write_vector(BFloat16* p, Vector x) {
    *reinterpret_cast<ShortVector*>(p) = __builtin_convertvector(x == x ? rounded_bits(x) : BitVector{} + 0x7fc0, ShortVector);
}
INLINE void write_vector(Half* p, Vector x) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
    asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<ShortVector*>(p)) : "v"(x));  // 0: to nearest even
#else
    for (int lane = 0; lane < VL; ++lane) store_element(p + lane, x[lane]);
#endif
}

// The first `count` of VL elements `stride` apart, zeros behind them.
template <class Element>
static __attribute__((noinline)) Vector gather_part(const Element* p, int64_t stride, int count) {
    float lanes[VL] = {};
    for (int lane = 0; lane < VL && lane < count; ++lane) lanes[lane] = element(p[lane * stride]);
    return load_vector(lanes);
}
template <class Element>
INLINE Vector gather_vector(const Element* p, int64_t stride, int count) {
    return stride == 1 && count >= VL ? load_vector(p) : gather_part(p, stride, count);
}

// VL rows of VL floats to columns: blocks of `step` change places, from the largest to single lanes.
template <int step, size_t... lane>
INLINE void swap_blocks(Vector& x, Vector& y, std::index_sequence<lane...>) {
    const Vector upper = __builtin_shufflevector(x, y, (lane & step ? int(lane ^ step) + VL : int(lane))...);
    y = __builtin_shufflevector(x, y, (lane & step ? int(lane) + VL : int(lane ^ step))...);
    x = upper;
}
template <int step = VL / 2>
INLINE void transpose(Vector* rows) {
    if constexpr (step > 0) {
#pragma GCC unroll 16
        for (int n = 0; n < VL; ++n)
            if (!(n & step)) swap_blocks<step>(rows[n], rows[n + step], std::make_index_sequence<VL>());
        transpose<step / 2>(rows);
    }
}

INLINE Vector larger(Vector x, Vector y) { return x > y ? x : y; }  // y where x is NaN

template <int step, size_t... lane>
INLINE Vector mirror_lanes(Vector x, std::index_sequence<lane...>) { return __builtin_shufflevector(x, x, int(lane ^ step)...); }
template <int step = VL / 2>
INLINE float sum_of(Vector x) {
    if constexpr (step == 0) return x[0];
    else return sum_of<step / 2>(x + mirror_lanes<step>(x, std::make_index_sequence<VL>()));
}
template <int step = VL / 2>
INLINE float max_of(Vector x) {
    if constexpr (step == 0) return x[0];
    else return max_of<step / 2>(larger(x, mirror_lanes<step>(x, std::make_index_sequence<VL>())));
}

// 2^x, within 2 ulp (3 just below 1). NaN stays NaN; below 2^-126 the result is 0. For x <= 127, as after the subtraction of a maximum.
INLINE Vector exp2_of(Vector x) {
    constexpr float ROUND = 0x1.8p23f;  // adding it rounds to an integer, which is left in the low bits
    const Vector t = x < -160.0f ? broadcast(-160.0f) : x;
    const Vector shifted = t + ROUND, f = t - (shifted - ROUND);
    // minimax over [-1/2, 1/2], relative error 7.5e-8
    Vector p = f * 1.32764725e-3f + 9.67554096e-3f;
    p = p * f + 5.55071309e-2f;
    p = p * f + 2.40221202e-1f;
    p = p * f + 6.93146944e-1f;
    p = p * f + 1.00000012f;
#if defined(__AVX512F__)
    Vector y;
    asm("vscalefps %2, %1, %0" : "=v"(y) : "v"(p), "v"(shifted - ROUND));  // p * 2^n, with NaN and underflow done right
    return y;
#else
    const Vector scaled = bit_cast<Vector>(bit_cast<BitVector>(p) + (bit_cast<BitVector>(shifted) << 23));
    return t >= -126.0f ? scaled : (t < -126.0f ? Vector{} : t);
#endif
}

// ---- memory

constexpr int64_t KEPT_FLOATS = int64_t(8) << 20;  // 32 MiB: fresh pages cost 0.3 ms a MiB to touch, as long as packing them takes

// A call's floats, from a cache line's start. A calling thread keeps them for its next call, up to KEPT_FLOATS.
class Workspace {
    struct Kept {
        float* data = nullptr;
        int64_t size = 0;
        ~Kept() { std::free(data); }
    };
    Kept& kept;

public:
    float* data;
    explicit Workspace(int64_t count) : kept(of_thread()) {
        if (count > kept.size) {
            std::free(kept.data);
            kept.size = 0;
            kept.data = static_cast<float*>(std::aligned_alloc(64, size_t(round_up(count, 16)) * sizeof(float)));
            if (kept.data == nullptr) throw std::bad_alloc();
            kept.size = count;
        }
        data = kept.data;
    }
    ~Workspace() {
        if (kept.size <= KEPT_FLOATS) return;
        std::free(kept.data);
        kept.data = nullptr;
        kept.size = 0;
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    float* take(int64_t count) {  // in multiples of a cache line, up to what was asked for
        float* taken = data;
        data += round_up(count, 16);
        return taken;
    }

private:
    static Kept& of_thread() {
        static thread_local Kept kept;
        return kept;
    }
};
