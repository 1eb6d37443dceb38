// How linear_many.h reads weights of floats: they are packed as they are.

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
