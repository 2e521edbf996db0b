// Scratch memory that grows and is kept: one set of buffers for each thread.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace keye {

// Uninitialised memory aligned to a cache line.
template <class T> class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(data_); }

    T *get(int64_t count) {
        if (count > size_) {
            std::free(data_);
            size_ = 0;
            int64_t bytes = (count * (int64_t)sizeof(T) + 127) / 64 * 64;
            data_ = (T *)std::aligned_alloc(64, (size_t)bytes);
            if (!data_) throw std::bad_alloc();
            size_ = count;
        }
        return data_;
    }

  private:
    T *data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace keye
