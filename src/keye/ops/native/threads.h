// Sharing work out among a few threads, and what becomes of exceptions.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace keye {

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
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; i++) others.emplace_back(loop);
    } catch (const std::system_error &) {
        // The system has no more threads; those that run do all the work.
    }
    loop();
    for (auto &other : others) other.join();
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
