// f of weight w's rows from `first` on
template <class F>
INLINE void with_source(const Call& call, int w, int64_t first, F f) {
    const Weight& weight = call.weight[w];
    with_elements(call, w, [&](auto* from) { f(Source<std::remove_cv_t<std::remove_pointer_t<decltype(from)>>>{from + first * weight.row, weight.row, weight.column}); });
}
