// Threads that wait for work: starting them again for every product would take longer than many products do.
#include "threads.h"
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace {

// How long a thread looks for more work before it sleeps: about the time between two products of a layer.
constexpr auto PATIENCE = std::chrono::microseconds(50);

class Pool {
  public:
    // Runs `call(data)` on the caller's thread and on up to `others` more; those that wake too late do not take part.
    void run(void (*call)(void *), void *data, int others) {
        grow(others);
        call_ = call;
        data_ = data;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            tickets_.store(std::min(others, count_));
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        call(data);
        tickets_.exchange(0);
        while (running_.load()) __builtin_ia32_pause();
    }

    std::mutex &busy() { return busy_; }

  private:
    void grow(int others) {
        try {
            for (; count_ < others; count_++) std::thread([this] { wait_for_work(); }).detach();
        } catch (const std::system_error &) {
            // The system has no more threads; those that run do all the work.
        }
    }

    [[noreturn]] void wait_for_work() {
        for (uint64_t seen = 0;;) {
            const auto until = std::chrono::steady_clock::now() + PATIENCE;
            while (generation_.load() == seen && std::chrono::steady_clock::now() < until) __builtin_ia32_pause();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
            }
            seen = generation_.load();
            running_.fetch_add(1);  // before a ticket is taken: the caller must not leave in between
            for (int left = tickets_.load(); left > 0;)
                if (tickets_.compare_exchange_weak(left, left - 1)) {
                    call_(data_);
                    break;
                }
            running_.fetch_sub(1);
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> tickets_{0}, running_{0};
    void (*call_)(void *) = nullptr;
    void *data_ = nullptr;
    int count_ = 0;
};

// The pool of this process, never destroyed: its threads wait in it until the process ends. A child that was forked has
// none of them, and gets a pool of its own.
Pool *pool_of_process() {
    static std::atomic<Pool *> pool{nullptr};
    static std::atomic<pid_t> owner{0};
    static std::mutex making;
    if (owner.load() != getpid()) {
        std::unique_lock<std::mutex> lock(making, std::try_to_lock);
        if (!lock) return nullptr;
        if (owner.load() != getpid()) {
            pool.store(new Pool);
            owner.store(getpid());
        }
    }
    return pool.load();
}

}  // namespace

namespace keye {

void run_on_threads(void (*call)(void *), void *data, int threads) {
    Pool *pool = threads > 1 ? pool_of_process() : nullptr;
    if (pool) {
        // Several callers at once have threads of their own already: only one of them gets the others' help.
        std::unique_lock<std::mutex> lock(pool->busy(), std::try_to_lock);
        if (lock) {
            pool->run(call, data, threads - 1);
            return;
        }
    }
    call(data);
}

}  // namespace keye
