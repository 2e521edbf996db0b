// Where time goes: seconds of each phase, summed over threads. Read by benchmarks.
#pragma once
#include <atomic>
#include <chrono>

namespace keye {

struct Phases {
    std::atomic<int64_t> score{0}, select{0}, attend{0}, dense{0};  // nanoseconds
};
inline Phases phases;

class Clock {
  public:
    Clock() : since_(std::chrono::steady_clock::now()) {}
    // Adds the time since construction or the last call.
    void add(std::atomic<int64_t> Phases::*phase) {
        auto now = std::chrono::steady_clock::now();
        auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count();
        (phases.*phase).fetch_add(spent, std::memory_order_relaxed);
        since_ = now;
    }

  private:
    std::chrono::steady_clock::time_point since_;
};

}  // namespace keye
