extern "C" void attention(void* const* data, const int64_t* ints, const double*) {
    const Call call = read_call(data, ints);
    if (call.B == 0 || call.H == 0 || call.Tq == 0) return;
    if (call.Tk == 0) {
        for (int64_t n = 0; n < call.B * call.H * call.Tq; ++n) {
            Element* row = call.out + n / call.Tq / call.H * call.out_stride[0] + n / call.Tq % call.H * call.out_stride[1] + n % call.Tq * call.out_stride[2];
            for (int d = 0; d < DV; ++d) store_element(row + d * call.out_stride[3], 0.0f);
            if constexpr (LSE) call.lse[n / call.Tq / call.H * call.lse_stride[0] + n / call.Tq % call.H * call.lse_stride[1] + n % call.Tq * call.lse_stride[2]] = -std::numeric_limits<float>::infinity();
        }
    } else if (WAYS == FEW_QUERIES || (WAYS == ANY_QUERIES && call.Tq <= MOST_STREAMED)) {
        if constexpr (WAYS != MANY_QUERIES) attend_streamed(call);
    } else {
        if constexpr (WAYS != FEW_QUERIES) attend_packed(call);
    }
}
