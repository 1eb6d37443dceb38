static bool prefers_streaming(const Call&) { return false; }
static void attend_streamed(const Call&) {}
