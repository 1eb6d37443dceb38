// The translation unit that int8_brgemm.h's callers link with: brgemm of libtorch_cpu without its headers, and without exceptions, which must not leave a parallel region.

#include <cstdint>

namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const unsigned char* A, const signed char* B, int32_t* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}
#define HIDDEN __attribute__((visibility("hidden")))

// c [rows, columns] = or += a [rows, depth] . b [depth / 4][columns][4]; false, and nothing done, where brgemm refuses: oneDNN switched off, no VNNI
HIDDEN bool multiply_by_brgemm(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, const void* b, void* c, int64_t c_row, bool first) {
    try {
        at::native::cpublas::brgemm(rows, columns, depth, a_row, columns, c_row, !first, static_cast<const unsigned char*>(a), static_cast<const signed char*>(b), static_cast<int32_t*>(c), true);
        return true;
    } catch (...) {
        return false;
    }
}
// By every thread that has multiplied: tiles are the processor's state, which others configure in their own way
HIDDEN void release_brgemm() { at::native::cpublas::brgemm_release(true); }
