// The rows of y that linear_few.h asks for where they stay floats: made one by one or read in place.

constexpr int64_t few_size(int64_t rows) { return rows * Y_ROW; }
INLINE bool few_ready(const Call& call) { return is_ready(call, call.rows == 1); }
INLINE void make_few(const Call& call, float* to) {
    for (int64_t i = 0; i < call.rows; ++i) make_row(call, i, to + i * Y_ROW);
}
