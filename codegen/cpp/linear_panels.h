// What linear_many.h multiplies by: panels of packed columns, and the micro-kernels that run over them (linear_kernels.h). Nothing of them knows a
// variant, so that units of float weights link with one copy, which is compiled once.
//
// The includer defines LINKAGE: static, or hidden where they are linked.

constexpr int PANEL = 2 * VL;                  // columns of a micro-kernel
constexpr int BLOCK_ROWS = VL == 16 ? 12 : 6;  // rows of a micro-kernel: 24 sums of AVX-512's 32 registers, 12 of 16

// to[r][j] (+)= sum over k of y[r][k] panel[k][j], for R rows and V vectors of columns. One for all callers: of a clone for `first` or a stride that is known
// GCC 12 keeps sums on the stack, at half the speed.
#if defined(__clang__)
#define ONE_FOR_ALL __attribute__((noinline))
#else
#define ONE_FOR_ALL __attribute__((noinline, noclone))
#endif
template <int R, int V>
LINKAGE ONE_FOR_ALL void multiply(const float* y, int64_t y_row, const float* panel, int64_t depth, float* to, int64_t to_row, bool first);

// Rows of a weight to the columns of a panel [depth][PANEL], zeros past the last: rows [n, n + columns), elements from `start` on, of `size` that there are
template <class Source>
LINKAGE __attribute__((noinline)) void pack(const Source source, int64_t n, int64_t columns, int64_t start, int64_t size, int64_t depth, float* __restrict to);
