// Rows of y in the lanes of linear_lanes.h.

constexpr int64_t LANES = (K + EACH - 1) / EACH;   // of a row of y, of a column of a weight
constexpr int64_t LANES_ROW = HALVES ? round_up(LANES, GRAIN) + (round_up(LANES, GRAIN) % 256 == 0 ? GRAIN : 0) : Y_ROW;  // see Y_ROW
constexpr int64_t LANES_BUFFER = HALVES ? Y_ROW : 0;  // floats of a thread that make_lanes writes to

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
