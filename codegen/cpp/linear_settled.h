// What linear_many.h asks for where sums are the accumulators: nothing is done before rows and strips, or to sums.

constexpr int64_t STRIP = 0;  // columns of a strip, at most; 0: as few as can be
constexpr int64_t SHARED = 0, OUTER = 0;  // floats of all threads together, and of each for every column of a strip
INLINE void begin_call(const Call&, float*, float*) {}
INLINE void begin_strip(const Call&, int, int64_t, int64_t, int64_t, const float*, float*) {}
INLINE void settle(const Call&, int, const float*, float*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, float*) {}
