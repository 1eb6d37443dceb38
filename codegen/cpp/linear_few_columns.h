// How linear_few.h multiplies with weights of floats.

constexpr int FEW_TIMES = 1;  // chunks that a thread takes at a time
// to[i][c] = sums of the columns [first, first + columns) of the n-th weight in order, for all rows
INLINE void few_columns(const Call& call, int n, int64_t first, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    const Weight& weight = call.weight[ORDER[n]];
    with_elements(call, ORDER[n], [&](auto* w) { dot_columns(w + first * weight.row, weight.row, weight.column, columns, y, y_row, call.rows, to, to_row); });
}
