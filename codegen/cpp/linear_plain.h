// What linear_many.h asks for beside the lanes, where weights are floats: they are packed as they are, and their sums are the accumulators.

// Rows of a weight, in lanes: along(n, k) holds VL lanes of row n from element k on, of which `left` are there; across(k) lane k of `count` rows.
template <class W>
struct Source {
    const W* w;
    int64_t row, column;
    bool by_columns() const { return BY_COLUMNS && (!(BY_ROWS || APART) || (row == 1 && column != 1)); }
    const W* at(int64_t n, int64_t k) const { return w + n * row + k * column; }
    Vector along(int64_t n, int64_t k, int64_t left) const { return lanes_along(w + n * row + k * column, column, left); }
    Vector across(int64_t n, int64_t k, int64_t left, int count) const { return lanes_across(w + k * column + n, column, left, count); }
};
// f of weight w's rows from `first` on
template <class F>
INLINE void with_source(const Call& call, int w, int64_t first, F f) {
    const Weight& weight = call.weight[w];
    with_elements(call, w, [&](auto* from) { f(Source<std::remove_cv_t<std::remove_pointer_t<decltype(from)>>>{from + first * weight.row, weight.row, weight.column}); });
}

constexpr int64_t SHARED = 0, OUTER = 0;  // floats of all threads together, and of each for every column of a strip
INLINE void begin_call(const Call&, float*, float*) {}
INLINE void begin_strip(const Call&, int, int64_t, int64_t, int64_t, const float*, float*) {}
INLINE void settle(const Call&, int, const float*, float*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, float*) {}
