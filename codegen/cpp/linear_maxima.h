// The largest magnitude of every row of an output, as the bits of a float: whoever reads that output as int8 then has its scale before its first element.
//
// A row's strips come from any thread in any order; magnitudes of floats are ordered as integers are (NaN above inf). Each thread has numbers of its own, which
// are joined at the end. They are of the results as they are stored, and taken a block of rows behind them: read back row by row, or reduced in the epilogue's
// loop, they took 0.5 of 17.5 ms (1024 rows, 768 to 2 x 2048), of a block less than 0.1.

template <int step = VL / 2>
INLINE int32_t largest_of(IntVector x) {
    if constexpr (step == 0) return x[0];
    else {
        const IntVector other = bit_cast<IntVector>(mirror_lanes<step>(bit_cast<Vector>(x), std::make_index_sequence<VL>()));
        return largest_of<step / 2>(x > other ? x : other);
    }
}

// Over a whole call: zeros at its start, the rows' numbers at its end.
class Maxima {
    Call& call;
    int32_t* own = nullptr;

public:
    explicit Maxima(Call& call) : call(call) {
        if (!call.with_maxima) return;
        call.own_threads = omp_get_max_threads(), call.own_row = round_up(call.rows, GRAIN);
        const size_t size = sizeof(int32_t) * size_t(call.own_threads * MAXIMA * call.own_row);
        if (size == 0) return;
        call.own = own = static_cast<int32_t*>(std::aligned_alloc(64, size));
        if (own == nullptr) throw std::bad_alloc();
        std::memset(own, 0, size);
    }
    ~Maxima() {
        if (own == nullptr) return;
        for (int n = 0; n < MAXIMA; ++n)
            for (int64_t i = 0; i < call.rows; ++i) {
                int32_t most = 0;
                for (int thread = 0; thread < call.own_threads; ++thread) {
                    const int32_t found = own[(thread * MAXIMA + n) * call.own_row + i];
                    most = found > most ? found : most;
                }
                call.maximum[n].data[i * call.maximum[n].stride] = most;
            }
        std::free(own);
    }
    Maxima(const Maxima&) = delete;
    Maxima& operator=(const Maxima&) = delete;
};
INLINE void raise_maximum(const Call& call, int number, const Out& out, int64_t i, int64_t first, int64_t width) {
    if (!call.with_maxima) return;
    const X* from = out.data + i * out.row + first * out.column;
    int32_t most = 0;
    int64_t j = 0;
    if (OUT_UNIT || out.column == 1) {
        IntVector largest[2] = {};
        const auto add = [&](int n, int64_t at) __attribute__((always_inline)) {
            const IntVector bits = bit_cast<IntVector>(load_vector(from + at)) & 0x7fffffff;
            largest[n] = bits > largest[n] ? bits : largest[n];
        };
        for (; j + 2 * VL <= width; j += 2 * VL) add(0, j), add(1, j + VL);
        for (; j + VL <= width; j += VL) add(0, j);
        most = largest_of(largest[0] > largest[1] ? largest[0] : largest[1]);
    }
    for (; j < width; ++j) {
        const int32_t bits = bit_cast<int32_t>(element(from[j * out.column])) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    int32_t* at = call.own + ((call.own_threads > 1 ? omp_get_thread_num() : 0) * MAXIMA + number) * call.own_row + i;
    *at = most > *at ? most : *at;
}
