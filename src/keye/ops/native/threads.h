// Sharing work out among a few threads, and what becomes of exceptions.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

namespace keye {

// Runs `call(data)` on the caller's thread and, as far as they are free, on `threads - 1` others at the same time.
void run_on_threads(void (*call)(void *), void *data, int threads);

// Runs `work(i)` for i below `count` on `threads` threads, the caller's among them. Returns 1 when memory ran out.
template <class Work> inline int run(int64_t count, int threads, Work work) {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto loop = [&] {
        try {
            for (int64_t i; !failed && (i = next.fetch_add(1)) < count;) work(i);
        } catch (const std::bad_alloc &) {
            failed = 1;
        }
    };
    threads = (int)std::min<int64_t>(std::max(threads, 1), count);
    run_on_threads([](void *data) { (*(decltype(loop) *)data)(); }, &loop, threads);
    return failed;
}

// What an entry point returns; no exception may leave the library.
template <class Call> inline int guarded(Call call) {
    try {
        return call();
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

}  // namespace keye
