// Few query rows, as in decoding: the time is that of reading keys and values once. They are read in place, a chunk at a time for
// all query heads that share them; where there are fewer KV heads than threads, the keys of a head are split among threads.

// The query heads [head, head + heads) of one batch entry and one KV head, all query positions.
struct Group {
    int64_t b, head;
    int heads;
};

// Rows of keys that are a text of what is stored: [count, DP] of the head h of keys
INLINE void stage_taken_keys(const Call& call, const KeyElement* from, int64_t b, int64_t h, int64_t j, int count, float* staged, KeyRows& rows) {
    const int stored = int(j >= call.stored_keys ? 0 : smaller(count, call.stored_keys - j));
    rows.at[0] = staged, rows.stride[0] = DP;
    take_keys(call, from + j * call.k_stride[0][2], stored, staged, DP, b, h, j, count);
}
template <size_t... part>
INLINE void stage_keys(const KeyElement* const* keys, const int64_t* const* strides, int64_t j, int count, float* staged, KeyRows& rows, std::index_sequence<part...>) {
    ((rows.at[part] = stage_rows<PART_SIZE[part]>(keys[part] + j * strides[part][2], strides[part], count, staged + padded_start(part), DP, &rows.stride[part])), ...);
}

// The keys [j_lo, j_hi) for all rows of a group: q [rows, DP]; sums [rows, DVP] and states are written. q and sums have whole tiles of rows.
static void stream_keys(const Call& call, const Group& group, int64_t j_lo, int64_t j_hi, bool exact, const float* q, float* scratch, float* sums, RowState* states) {
    const int rows = group.heads * int(call.Tq), padded_rows = int(round_up(rows, TILE_ROWS_OF_KEYS));
    const float masked = exact ? FILL : -std::numeric_limits<float>::infinity();
    float *staged = scratch, *scores = scratch + CHUNK * (DP > DVP ? DP : DVP);
    const KeyElement* keys[PARTS];
    for (int part = 0; part < PARTS; ++part) keys[part] = call.k[part] + group.b * call.k_stride[part][0] + group.head / (call.H / call.Hk[part]) * call.k_stride[part][1];
    const ValueElement* values = call.v + group.b * call.v_stride[0] + group.head / (call.H / call.Hv) * call.v_stride[1];
    const bool values_are_keys = !KEY_TEXT && PART_SIZE[0] >= DV && std::is_same_v<KeyElement, ValueElement> && static_cast<const void*>(values) == keys[0] && call.v_stride[2] == call.k_stride[0][2] && call.v_stride[3] == call.k_stride[0][3];  // a latent is both
    const int64_t key_head = group.head / (call.H / call.Hk[0]);
    bool as_stored = rows <= WIDENED_ROWS && !std::is_same_v<KeyElement, float> && !values_are_keys;
    for (int part = 0; part < PARTS; ++part) as_stored = as_stored && PART_SIZE[part] % VL == 0 && call.k_stride[part][3] == 1;
    for (int r = 0; r < rows; ++r) states[r] = start_row(-std::numeric_limits<float>::infinity());
    std::memset(sums, 0, sizeof(float) * size_t(padded_rows) * DVP);
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
            const Ahead values_ahead = rows_ahead(values + j * call.v_stride[2], call.v_stride, DV, !values_are_keys);
            KeyRows rows_of_k;
            float added_scores[WIDENED_ROWS];
            if (as_stored && (!KEY_TEXT || (j + count <= call.stored_keys && fold_keys(call, q, rows, group.b, key_head, j, count, staged, added_scores)))) {
                RowsOf<KeyElement> stored;
                for (int part = 0; part < PARTS; ++part) stored.at[part] = keys[part] + j * call.k_stride[part][2], stored.stride[part] = call.k_stride[part][2];
                dot_keys(KEY_TEXT ? staged : q, stored, rows, count, scores, values_ahead);
                for (int r = 0; KEY_TEXT && r < rows; ++r)
                    if (added_scores[r] != 0.0f)
                        for (int n = 0; n < CHUNK; n += VL) store_vector(scores + r * CHUNK + n, load_vector(scores + r * CHUNK + n) + added_scores[r]);
            } else {
                if constexpr (KEY_TEXT) stage_taken_keys(call, keys[0], group.b, key_head, j, count, staged, rows_of_k);
                else stage_keys(keys, call.k_stride, j, count, staged, rows_of_k, std::make_index_sequence<PARTS>());
                dot_keys(q, rows_of_k, rows, count, scores, values_ahead);
            }
            int64_t stride = rows_of_k.stride[0];
            const bool widened = !values_are_keys && rows <= WIDENED_ROWS && DV % VL == 0 && call.v_stride[3] == 1;  // where they are used: a row of int8 is no slower to read than the one that staging would write
            const float* rows_of_v = values_are_keys ? rows_of_k.at[0] : widened ? nullptr : stage_rows<DV>(values + j * call.v_stride[2], call.v_stride, count, staged, DVP, &stride);
            for (int r = 0; r < rows; ++r) {
                const int64_t h = group.head + r / call.Tq, i = r % call.Tq;
                float* row = scores + r * CHUNK;
                score_row(call, row, group.b, h, i, j, count, tile_must(call, group.b, h, i, i, j, j + count - 1), masked);
                const float shrink = update_row(states[r], row, count);
                const float added = value_row(call, row, group.b, h, i, j, count);
                if (shrink != 1.0f || added != 0.0f)
                    for (int d = 0; d < DVP; d += VL) store_vector(sums + r * DVP + d, load_vector(sums + r * DVP + d) * shrink + added);
            }
            const Ahead next = rows_ahead(keys[0] + (j + CHUNK) * call.k_stride[0][2], call.k_stride[0], PART_SIZE[0], !values_are_keys && j + 2 * CHUNK <= j_hi);
            if (widened) add_values(scores, values + j * call.v_stride[2], call.v_stride[2], rows, count, sums, next);
            else add_values(scores, rows_of_v, stride, rows, count, sums, next);
        }
    }
}

// The queries of a group, scaled, in rows whose parts are padded to whole vectors.
INLINE void load_rows(const Call& call, const Group& group, int rows, int padded_rows, float* q) {
    std::memset(q, 0, sizeof(float) * size_t(padded_rows) * DP);
    for (int r = 0; r < rows; ++r) {
        const Element* from = call.q + group.b * call.q_stride[0] + (group.head + r / call.Tq) * call.q_stride[1] + r % call.Tq * call.q_stride[2];
        for (int part = 0, d = 0; part < PARTS; ++part)
            for (int n = 0; n < PART_SIZE[part]; ++n, ++d) q[r * DP + padded_start(part) + n] = element(from[d * call.q_stride[3]]) * SCALE;
    }
}

// One softmax from the parts that threads made of a row, and the sink. Writes the row; false where masked keys still have to be added.
static bool combine_row(const Call& call, int64_t b, int64_t h, int64_t i, int splits, const float* sums, int64_t split_sums, const RowState* states, int64_t split_rows, bool exact) {
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
        for (int d = 0; d < DVP; ++d) merged[d] += sums[n * split_sums + d] * share;
    }
    write_row(call, b, h, i, merged, whole);
    return true;
}

// Query heads that share a reading: as many as have the same key head and value head, and at most STREAM_ROWS rows.
INLINE int64_t shared_heads(const Call& call) {
    const int64_t shared = common_divisor(shared_key_heads(call), call.H / call.Hv);
    int64_t heads = shared;
    while (heads > 1 && (heads * call.Tq > STREAM_ROWS || shared % heads != 0)) --heads;
    return heads;
}

static void attend_streamed(const Call& call) {
    const int heads = int(shared_heads(call)), rows = heads * int(call.Tq), padded_rows = int(round_up(rows, TILE_ROWS_OF_KEYS)), threads = omp_get_max_threads();
    const int64_t per_batch = call.H / heads, groups = call.B * per_batch, longest = (call.Tk + 4 * CHUNK - 1) / (4 * CHUNK);
    // Enough parts for all threads, each of at least four chunks.
    const int splits = int(groups >= 4 * threads ? 1 : smaller(longest, (4 * threads + groups - 1) / groups));
    const int64_t part_keys = round_up((call.Tk + splits - 1) / splits, CHUNK);
    const int64_t total_rows = groups * splits * rows, scratch_size = STREAM_ROWS * (DP + CHUNK) + CHUNK * (DP > DVP ? DP : DVP);
    Workspace workspace(groups * splits * padded_rows * DVP + total_rows * 2 + 2 * groups + threads * scratch_size + 64);
    float *sums = workspace.take(groups * splits * padded_rows * DVP), *scratch = workspace.take(threads * scratch_size);
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
                load_rows(call, group, rows, padded_rows, q);
                const int64_t j_lo = smaller(part % splits * part_keys, call.Tk), j_hi = smaller(j_lo + part_keys, call.Tk);
                stream_keys(call, group, j_lo, j_hi, exact, q, q + STREAM_ROWS * DP, sums + part * padded_rows * DVP, states + part * rows);
                // Whoever finishes a group's last part puts the parts together: no thread waits for another.
                if (__atomic_add_fetch(&parts_done[n], 1, __ATOMIC_ACQ_REL) < splits) continue;
                for (int r = 0; r < rows; ++r) {
                    const float* first = sums + (n * splits * padded_rows + r) * DVP;
                    again[n] |= !combine_row(call, group.b, group.head + r / call.Tq, r % call.Tq, splits, first, padded_rows * DVP, states + n * splits * rows + r, rows, exact);
                }
                any_again = any_again || again[n] != 0;
            }
        }
    }
}
