// What linear_few.h asks for where weights are floats: rows of y, made one by one or read in place.

constexpr int FEW_TIMES = 1;  // chunks that a thread takes at a time
constexpr int64_t few_size(int64_t rows) { return rows * Y_ROW; }
INLINE bool few_ready(const Call& call) { return is_ready(call, call.rows == 1); }
INLINE void make_few(const Call& call, float* to) {
    for (int64_t i = 0; i < call.rows; ++i) make_row(call, i, to + i * Y_ROW);
}
// to[i][c] = sums of the columns [first, first + columns) of the n-th weight in order, for all rows
INLINE void few_columns(const Call& call, int n, int64_t first, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    const Weight& weight = call.weight[ORDER[n]];
    with_elements(call, ORDER[n], [&](auto* w) { dot_columns(w + first * weight.row, weight.row, weight.column, columns, y, y_row, call.rows, to, to_row); });
}
