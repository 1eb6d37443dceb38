// The call and its groups: outputs that share weights, with those weights. The includer defines K, ORDERED, GROUP_COUNT and,
// from here on, the arrays of the variant.

constexpr int64_t larger_size(int64_t x, int64_t y) { return x > y ? x : y; }

constexpr int64_t PARALLEL_FROM = 65536;  // elements of the weights; below, waking the threads (5 us) takes longer than the work

struct Group {
    int first, slots;  // its weights are ORDER[first] to ORDER[first + slots - 1]
    int64_t width;     // columns of each
    int64_t block;     // pairs of columns lie within blocks of so many; 1 for none

    // Columns that an epilogue may run over by itself: whole blocks, in panels with the least padding; as many times those as `most` allows.
    constexpr int64_t strip(int64_t panel, int64_t most) const {
        int64_t best = block;
        for (int64_t n = 2; n * block <= 256; ++n)
            if (round_up(n * block, panel) * best < round_up(best, panel) * n * block) best = n * block;
        return best * larger_size(smaller(most, round_up(width, best)) / best, 1);
    }
    // Columns that a thread takes at a time where rows are few: 16 rows of a weight, 48 KiB at K = 768; whole blocks where three times that holds them.
    constexpr int64_t chunk() const {
        for (int64_t n = 16; n <= 48; n += 16)
            if (n % block == 0) return n;
        return 16;
    }
    constexpr int64_t piece() const { return round_up(256, block); }
    constexpr int64_t parts(int64_t columns) const { return (width + columns - 1) / columns; }
};
struct Weight {
    const void* data;
    int64_t row, column;  // strides
};
struct Out {
    X* data;
    int64_t row, column;
};
