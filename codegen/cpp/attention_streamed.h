// Few query rows, as in decoding: the time is that of reading keys and values once. They are read in place, a chunk at a time for
// all query heads that share them; where there are fewer KV heads than threads, the keys of a head are split among threads.

constexpr int CHUNK = 64;        // keys
constexpr int STREAM_ROWS = 32;  // query rows that share one reading, at most
constexpr int DP = int(round_up(D, VL));

// lane n of the result is the sum of x[n]'s lanes: a tree of log2(VL) levels instead of VL sums of their own
template <int step, size_t... lane>
INLINE Vector add_pair(Vector x, Vector y, std::index_sequence<lane...>) {
    return __builtin_shufflevector(x, y, (lane & step ? int(lane) + VL : int(lane))...) +
           __builtin_shufflevector(x, y, (lane & step ? int(lane ^ step) + VL : int(lane ^ step))...);
}
template <int step>
INLINE Vector sums_of(const Vector* x) {
    if constexpr (step == 0) return x[0];
    else return add_pair<step>(sums_of<step / 2>(x), sums_of<step / 2>(x + step), std::make_index_sequence<VL>());
}

// scores[n] = q . keys[n] for n < count, rounded up to VL; the rows behind the last one repeat it
INLINE void dot_keys(const float* q, const float* keys, int64_t stride, int count, float* scores) {
    for (int first = 0; first < count; first += VL) {
        Vector sums[VL];
#pragma GCC unroll 16
        for (int lane = 0; lane < VL; ++lane) {
            const float* key = keys + (first + lane < count ? first + lane : count - 1) * stride;
            sums[lane] = load_vector(q) * load_vector(key);
#pragma GCC unroll 16
            for (int d = VL; d < DP; d += VL) sums[lane] += load_vector(q + d) * load_vector(key + d);
        }
        store_vector(scores + first, sums_of<VL / 2>(sums));
    }
}

template <int N>
INLINE void add_values(const float* p, const float* values, int64_t stride, int count, float* sums) {
    Vector total[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) total[n] = load_vector(sums + n * VL);
    for (int key = 0; key < count; ++key)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[n] += p[key] * load_vector(values + key * stride + n * VL);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store_vector(sums + n * VL, total[n]);
}

// `count` rows in fp32, in place where they already are: returns where they lie, and their stride
template <int width, int padded>
INLINE const float* stage_rows(const Element* from, const int64_t* stride, int count, float* to, int64_t* row_stride) {
    if constexpr (std::is_same_v<Element, float> && width == padded)
        if (stride[3] == 1) {
            *row_stride = stride[2];
            return reinterpret_cast<const float*>(from);
        }
    *row_stride = padded;
    for (int n = 0; n < count; ++n)
        for (int d = 0; d < padded; d += VL) store_vector(to + n * padded + d, gather_vector(from + n * stride[2] + d * stride[3], stride[3], width - d));
    return to;
}

// The query heads [head, head + heads) of one batch entry and one KV head, all query positions.
struct Group {
    int64_t b, head;
    int heads;
};

// The keys [j_lo, j_hi) for all rows of a group: q [rows, DP]; sums [rows, DVP] and states are written.
static void stream_keys(const Call& call, const Group& group, int64_t j_lo, int64_t j_hi, bool exact, const float* q, float* scratch, float* sums, RowState* states) {
    const int rows = group.heads * int(call.Tq);
    const float masked = exact ? FILL : -std::numeric_limits<float>::infinity();
    float *staged = scratch, *scores = scratch + CHUNK * (DP > DVP ? DP : DVP);
    const Element* keys = call.k + group.b * call.k_stride[0] + group.head / (call.H / call.Hk) * call.k_stride[1];
    const Element* values = call.v + group.b * call.v_stride[0] + group.head / (call.H / call.Hv) * call.v_stride[1];
    for (int r = 0; r < rows; ++r) states[r] = start_row(-std::numeric_limits<float>::infinity());
    std::memset(sums, 0, sizeof(float) * size_t(rows) * DVP);
    const auto unseen = [&](int64_t from, int64_t to) {  // is the tile empty for every head?
        if (exact) return false;
        for (int64_t h = group.head; h < group.head + (MASK_USES_HEAD ? group.heads : 1); ++h)
            if (tile_may(call, group.b, h, 0, call.Tq - 1, from, to - 1) && (to - from > CHUNK || keys_may(call, group.b, h, from, to - 1))) return false;
        return true;
    };
    constexpr int64_t SPAN = 32 * CHUNK;
    for (int64_t span = j_lo; span < j_hi; span += SPAN) {
        const int64_t span_end = span + SPAN < j_hi ? span + SPAN : j_hi;
        if (unseen(span, span_end)) continue;
        for (int64_t j = span; j < span_end; j += CHUNK) {
            const int count = int(j + CHUNK < span_end ? CHUNK : span_end - j);
            if (unseen(j, j + count)) continue;
            int64_t stride;
            const float* rows_of_k = stage_rows<D, DP>(keys + j * call.k_stride[2], call.k_stride, count, staged, &stride);
            for (int r = 0; r < rows; ++r) dot_keys(q + r * DP, rows_of_k, stride, count, scores + r * CHUNK);
            const float* rows_of_v = stage_rows<DV, DVP>(values + j * call.v_stride[2], call.v_stride, count, staged, &stride);
            for (int r = 0; r < rows; ++r) {
                const int64_t h = group.head + r / call.Tq, i = r % call.Tq;
                float* row = scores + r * CHUNK;
                score_row(call, row, group.b, h, i, j, count, tile_must(call, group.b, h, i, i, j, j + count - 1), masked);
                const float shrink = update_row(states[r], row, count);
                if (shrink != 1.0f)
                    for (int d = 0; d < DVP; d += VL) store_vector(sums + r * DVP + d, load_vector(sums + r * DVP + d) * shrink);
                constexpr int WIDE = 8 * VL;
                int d = 0;
                for (; d + WIDE <= DVP; d += WIDE) add_values<8>(row, rows_of_v + d, stride, count, sums + r * DVP + d);
                if constexpr (DVP % WIDE > 0) add_values<DVP % WIDE / VL>(row, rows_of_v + d, stride, count, sums + r * DVP + d);
            }
        }
    }
}

// One softmax from the parts that threads made of a row, and the sink. Writes the row; false where masked keys still have to be added.
static bool combine_row(const Call& call, int64_t b, int64_t h, int64_t i, int splits, const float* sums, const RowState* states, int64_t split_rows, bool exact) {
    RowState whole = start_row(sink_of(call, b, h, i));
    const float sink = whole.top;
    for (int n = 0; n < splits; ++n) whole.top = states[n * split_rows].top > whole.top ? states[n * split_rows].top : whole.top;
    if (!exact && needs_fill(whole)) return false;
    const float shift = whole.top == -std::numeric_limits<float>::infinity() ? 0.0f : whole.top;
    whole.total *= sink == whole.top ? 1.0f : ratio(sink, shift);
    float merged[DVP] = {};
    for (int n = 0; n < splits; ++n) {
        const RowState& part = states[n * split_rows];
        const float share = part.top == whole.top ? 1.0f : ratio(part.top, shift);
        whole.total += part.total * share;
        for (int d = 0; d < DVP; ++d) merged[d] += sums[n * split_rows * DVP + d] * share;
    }
    write_row(call, b, h, i, merged, whole);
    return true;
}

// Query heads that share a reading: as many as have the same key head and value head, and at most STREAM_ROWS rows.
INLINE int64_t shared_heads(const Call& call) {
    int64_t shared = call.H / call.Hk, rest = call.H / call.Hv;
    while (rest != 0) {  // the greatest common divisor
        const int64_t next = shared % rest;
        shared = rest, rest = next;
    }
    int64_t heads = shared;
    while (heads > 1 && (heads * call.Tq > STREAM_ROWS || shared % heads != 0)) --heads;
    return heads;
}

static void attend_streamed(const Call& call) {
    const int heads = int(shared_heads(call)), rows = heads * int(call.Tq), threads = omp_get_max_threads();
    const int64_t per_batch = call.H / heads, groups = call.B * per_batch, longest = (call.Tk + 4 * CHUNK - 1) / (4 * CHUNK);
    // Enough parts for all threads, each of at least four chunks.
    const int splits = int(groups >= 4 * threads ? 1 : smaller(longest, (4 * threads + groups - 1) / groups));
    const int64_t part_keys = round_up((call.Tk + splits - 1) / splits, CHUNK);
    const int64_t total_rows = groups * splits * rows, scratch_size = STREAM_ROWS * (DP + CHUNK) + CHUNK * (DP > DVP ? DP : DVP);
    Workspace workspace(total_rows * (DVP + 2) + 2 * groups + threads * scratch_size + 64);
    float *sums = workspace.take(total_rows * DVP), *scratch = workspace.take(threads * scratch_size);
    RowState* states = reinterpret_cast<RowState*>(workspace.take(total_rows * 2));
    int32_t* parts_done = reinterpret_cast<int32_t*>(workspace.take(groups));  // of each group
    int32_t* again = reinterpret_cast<int32_t*>(workspace.take(groups));       // groups with rows that masked keys reach
    std::memset(again, 0, sizeof(int32_t) * size_t(groups));
    bool any_again = false;
    for (int pass = 0; pass < (FINITE_FILL ? 2 : 1) && (pass == 0 || any_again); ++pass) {
        const bool exact = pass == 1;
        std::memset(parts_done, 0, sizeof(int32_t) * size_t(groups));
#pragma omp parallel num_threads(threads) reduction(|| : any_again) if (is_worth_threads(call))
        {
            float* q = scratch + omp_get_thread_num() * scratch_size;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t part = 0; part < groups * splits; ++part) {
                const int64_t n = part / splits;
                const Group group{n / per_batch, n % per_batch * heads, heads};
                if (exact && !again[n]) continue;
                for (int r = 0; r < rows; ++r) {
                    const Element* from = call.q + group.b * call.q_stride[0] + (group.head + r / call.Tq) * call.q_stride[1] + r % call.Tq * call.q_stride[2];
                    for (int d = 0; d < DP; ++d) q[r * DP + d] = d < D ? element(from[d * call.q_stride[3]]) * SCALE : 0.0f;
                }
                const int64_t j_lo = smaller(part % splits * part_keys, call.Tk), j_hi = smaller(j_lo + part_keys, call.Tk);
                stream_keys(call, group, j_lo, j_hi, exact, q, q + STREAM_ROWS * DP, sums + part * rows * DVP, states + part * rows);
                // Whoever finishes a group's last part puts the parts together: no thread waits for another.
                if (__atomic_add_fetch(&parts_done[n], 1, __ATOMIC_ACQ_REL) < splits) continue;
                for (int r = 0; r < rows; ++r) {
                    const int64_t at = n * splits * rows + r;
                    again[n] |= !combine_row(call, group.b, group.head + r / call.Tq, r % call.Tq, splits, sums + at * DVP, states + at, rows, exact);
                }
                any_again = any_again || again[n] != 0;
            }
        }
    }
}
