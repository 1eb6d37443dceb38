// Products of many rows by brgemm of libtorch_cpu, oneDNN's micro-kernel: on processors with AMX it runs on tiles, for which this project has no micro-kernel. The panels of
// linear_panels.h are its B as they are, [K / 4][PANEL][4] with a stride of PANEL, so nothing is packed otherwise or ahead.
//
// Its A is unsigned and its B signed: the rows' bytes are raised to t + 128, weights stay as they are, and what a sum has too much is 128 times the sum of its
// weights' column: one number a column of the strip, taken while that is packed, modulo 2^32 as all sums.
//
// The last integer of a call says which makes the products. Where brgemm refuses (it asks for oneDNN, which can be switched off at any time, and for VNNI), the micro-kernels of this unit
// multiply the same bytes, and the next call asks again.

// int8_brgemm_part.h
__attribute__((visibility("hidden"))) bool multiply_by_brgemm(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, const void* b, void* c, int64_t c_row, bool first);
__attribute__((visibility("hidden"))) void release_brgemm();

// Few numbers for all calls, since brgemm makes a kernel for each, and keeps it in each thread. The last block's rows past the end are computed and not read.
// Of 32, 48, 64, 96 and 128 rows 64 were the fastest on VNNI; tiles have 16.
INLINE int64_t rows_of_block(const Call& call) { return !call.brgemm ? BLOCK_ROWS : call.rows <= 32 ? 32 : 64; }

struct Library {
    bool used, refused;
};
static thread_local Library library{};  // since this thread's part of the call began

// to = or += a block's rows of y . panel
INLINE bool is_multiplied(const Call& call, const float* y, int64_t y_row, const float* panel, int64_t depth, float* to, int64_t to_row, bool first) {
    if (!call.brgemm || library.refused) return false;
    library.refused = !multiply_by_brgemm(rows_of_block(call), PANEL, 4 * depth, y, 4 * y_row, panel, to, to_row, first);
    library.used |= !library.refused;
    return !library.refused;
}
// Of a panel that has been packed: what its columns' sums will have too much, in the row of `outer` behind the outliers'
INLINE void note_packed(float* outer, int64_t row, const float* panel, int64_t depth, bool first) {
    float* to = outer + EXCESS_AT * row;
    for (int c = 0; c < PANEL; c += VL) {
        IntVector total = first ? IntVector{} : bit_cast<IntVector>(load_vector(to + c));
        for (int64_t k = 0; k < depth; ++k) total = dot4_raised(total, IntVector{} + int32_t(0x80808080), bit_cast<IntVector>(load_vector(panel + k * PANEL + c)));
        store_vector(to + c, bit_cast<Vector>(total));
    }
}
// By every thread
INLINE void end_products(const Call&) {
    if (library.used) release_brgemm();
    library = {};
}
