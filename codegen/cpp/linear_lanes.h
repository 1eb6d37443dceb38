// Lanes of many rows that hold floats: one each, or where all is bfloat16 and the processor multiplies it, two neighbours along K, of which an
// instruction adds both products in float32. y is then rounded to bfloat16 before the product, as eager's is.

#if defined(__AVX512BF16__)
constexpr bool HALVES = BFLOAT16;
#else
constexpr bool HALVES = false;
#endif
constexpr int64_t EACH = HALVES ? 2 : 1;  // elements of K in a lane
constexpr int64_t LANES = (K + EACH - 1) / EACH;   // of a row of y, of a column of a weight
constexpr int64_t LANES_ROW = HALVES ? round_up(LANES, GRAIN) + (round_up(LANES, GRAIN) % 256 == 0 ? GRAIN : 0) : Y_ROW;  // see Y_ROW
constexpr int64_t LANES_BUFFER = HALVES ? Y_ROW : 0;  // floats of a thread that make_lanes writes to

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

// y of row i in lanes, at `to`; `floats` holds Y_ROW.
INLINE void make_lanes(const Call& call, int64_t i, float* to, float*, float* floats) {
    if constexpr (HALVES) {
        std::memset(floats + K, 0, sizeof(float) * (Y_ROW - K));
        make_row(call, i, floats);
        for (int64_t k = 0; k < round_up(K, VL); k += VL) write_vector(reinterpret_cast<BFloat16*>(to) + k, load_vector(floats + k));
    } else {
        make_row(call, i, to);
    }
}
// May the products read x itself?
INLINE bool is_x_ready(const Call& call) {
    if constexpr (HALVES) return IDENTITY && K % 2 == 0 && has_unit(call) && call.x_row % 2 == 0 && call.x_row % 512 != 0;
    else return is_ready(call, false);
}
INLINE const float* ready_lanes(const Call& call, int64_t i) { return reinterpret_cast<const float*>(call.x + i * call.x_row); }
