// Lanes of many rows that hold floats: one each, or where all is bfloat16 and the processor multiplies it, two neighbours along K, of which an
// instruction adds both products in float32. y is then rounded to bfloat16 before the product, as eager's is.

#if defined(__AVX512BF16__)
constexpr bool HALVES = BFLOAT16;
#else
constexpr bool HALVES = false;
#endif
constexpr int64_t EACH = HALVES ? 2 : 1;  // elements of K in a lane

// sum + x y (by value: sums whose address an asm takes would live in memory).
INLINE Vector add_product(Vector sum, Vector x, Vector y) {
#if defined(__AVX512BF16__)
    if constexpr (HALVES) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
        return sum;
    }
#endif
    return sum + x * y;
}

// Lanes of two bfloat16 each; as floats those have their bits above sixteen zeros.
INLINE Vector paired(Vector low, Vector high) { return bit_cast<Vector>(bit_cast<BitVector>(low) >> 16 | bit_cast<BitVector>(high)); }

// VL lanes of a weight along K: `left` elements are there, `column` apart.
template <class W>
INLINE Vector lanes_along(const W* w, int64_t column, int64_t left) {
    if constexpr (HALVES) {
        if ((!APART || column == 1) && left >= 2 * VL) {
            Vector lanes;
            std::memcpy(&lanes, w, sizeof(lanes));
            return lanes;
        }
        const int count = int(smaller(2 * VL, left));
        return paired(gather_part(w, 2 * column, (count + 1) / 2), gather_part(w + column, 2 * column, count / 2));
    } else {
        return (!APART || column == 1) && left >= VL ? load_vector(w) : gather_part(w, column, int(smaller(VL, left)));
    }
}
// A lane of each of `count` columns of a weight that lies by columns.
template <class W>
INLINE Vector lanes_across(const W* w, int64_t column, int64_t left, int count) {
    if constexpr (HALVES) {
        return paired(gather_vector(w, 1, count), left > 1 ? gather_vector(w + column, 1, count) : Vector{});
    } else {
        return gather_vector(w, 1, count);
    }
}
