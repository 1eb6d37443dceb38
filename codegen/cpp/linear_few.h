// Few rows: every weight is read once, where it lies, at the speed of memory. Threads share chunks of columns of all weights.
//
// What is multiplied how, the includer has said: `few_size`, `few_ready`, `make_few`, `few_columns`.

// Do pairs lie further apart than a chunk? Then epilogues run when all sums are there, behind a barrier; else chunk by chunk.
constexpr bool is_paired() {
    bool paired = false;
    for (const Group& group : GROUPS) paired |= group.chunk() % group.block != 0;
    return paired;
}
constexpr bool PAIRED = is_paired();

static void few_rows(const Call& call) {
    const int threads = TOTAL * K >= PARALLEL_FROM ? omp_get_max_threads() : 1;
    const bool ready = few_ready(call);
    int64_t times = larger_size(1, smaller(FEW_TIMES, TOTAL / (64 * threads)));
    for (int n = 0; BY_COLUMNS && n < ORDERED; ++n)  // of a transposed weight, wide chunks: long stretches of each k, whose sums stay in the L1 cache
        if (call.weight[ORDER[n]].column != 1) times = larger_size(TOTAL >= 512 * threads ? 16 : 8, smaller(256, TOTAL / (threads > 1 ? 3 * threads : 1) / 16));
    const int64_t rows = call.rows, y_size = ready ? 0 : round_up(few_size(rows), GRAIN), scratch_size = (MOST_SLOTS + 1) * round_up(larger_size(16, times) * 48 + LONGEST_BLOCK + VL, GRAIN);
    Workspace workspace(rows * TOTAL + threads * (y_size + scratch_size) + 64);
    float *sums = workspace.take(rows * TOTAL), *scratch = workspace.data;
    int64_t chunks = 0, pieces = 0;
    for (const Group& group : GROUPS) {
        chunks += group.parts(times * group.chunk());
        pieces += group.parts(group.piece());
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* own = scratch + omp_get_thread_num() * (y_size + scratch_size);
        const float* y = ready ? reinterpret_cast<const float*>(call.x) : own;
        const int64_t y_row = ready ? call.x_row : Y_ROW;
        if (!ready)  // by every thread for itself: a few rows are made faster than a barrier is passed
            make_few(call, own);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            int64_t at = chunk;
            int g = 0;
            for (; at >= GROUPS[g].parts(times * GROUPS[g].chunk()); ++g) at -= GROUPS[g].parts(times * GROUPS[g].chunk());
            const Group& group = GROUPS[g];
            const int64_t first = at * times * group.chunk(), columns = smaller(times * group.chunk(), group.width - first);
            for (int n = group.first; n < group.first + group.slots; ++n) few_columns(call, n, first, columns, y, y_row, sums + OFFSET[n] + first, TOTAL);
            if (!PAIRED)
                for (int64_t i = 0; i < rows; ++i) finish(call, g, sums + i * TOTAL + OFFSET[group.first] + first, round_up(group.width, GRAIN), i, first, columns, own + y_size);
        }
        if (PAIRED) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < pieces * rows; ++n) {
                int64_t at = n / rows;
                int g = 0;
                for (; at >= GROUPS[g].parts(GROUPS[g].piece()); ++g) at -= GROUPS[g].parts(GROUPS[g].piece());
                const Group& group = GROUPS[g];
                const int64_t first = at * group.piece(), width = smaller(group.piece(), group.width - first);
                finish(call, g, sums + n % rows * TOTAL + OFFSET[group.first] + first, round_up(group.width, GRAIN), n % rows, first, width, own + y_size);
            }
        }
    }
    int g = 0;  // of whole rows, which are short: chunk by chunk, behind results that were just written, one row of 768 -> 2 x 2048 took 2% longer
    for (const Group& group : GROUPS) {
        for (int64_t i = 0; i < rows; ++i) raise_maxima(call, g, i, 0, group.width);
        ++g;
    }
}
