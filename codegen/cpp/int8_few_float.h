// What linear_few.h asks for where weights are int8 and y stays float: weights become floats in registers, at the speed of memory.

constexpr int FEW_TIMES = 4;  // chunks that a thread takes at a time: as many bytes as of floats
// to[i][c] = sums of the columns [first, first + columns) of the n-th weight in order, for all rows
INLINE void few_columns(const Call& call, int n, int64_t first, int64_t columns, const float* y, int64_t y_row, float* to, int64_t to_row) {
    const int w = ORDER[n];
    float_columns(call.weight[w], call.scale[w], GROUP[w], first, columns, y, y_row, call.rows, to, to_row);
}
