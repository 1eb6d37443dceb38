// What linear_many.h asks for where its own micro-kernels make all products (int8_brgemm.h: where a library may).

INLINE int64_t rows_of_block(const Call&) { return BLOCK_ROWS; }  // whose sums go through the epilogue together
INLINE bool is_multiplied(const Call&, const float*, int64_t, const float*, int64_t, float*, int64_t, bool) { return false; }
INLINE void note_packed(float*, int64_t, const float*, int64_t, bool) {}
INLINE void end_products(const Call&) {}
