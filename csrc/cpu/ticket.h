// SPDX-License-Identifier: Apache-2.0
// How threads share the units of a piece of work without a plan: whoever is free takes the next one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace eigenprune {

// Hands out numbers below a limit, each once, and knows when all of them are done. With several stretches, each thread
// begins with one of its own and then helps with the others: it reads on where it has read, and asks no other thread's
// cache for a counter before its own stretch is done.
class Ticket {
 public:
  explicit Ticket(size_t limit, int64_t stretches = 1)
      : limit_(static_cast<int64_t>(limit)),
        stretches_(std::max<int64_t>(1, stretches)),
        next_(new Counter[static_cast<size_t>(stretches_)]) {
    for (int64_t i = 0; i < stretches_; ++i) next_[i].value.store(begin_of(i), std::memory_order_relaxed);
  }

  template <typename Work>
  void work_off(const Work& work, int64_t own_stretch = 0) {
    int64_t done = 0;
    for (int64_t i = 0; i < stretches_; ++i) {
      const int64_t stretch = (own_stretch + i) % stretches_, end = begin_of(stretch + 1);
      for (int64_t unit; (unit = next_[stretch].value.fetch_add(1, std::memory_order_relaxed)) < end; ++done) work(unit);
    }
    done_.fetch_add(done, std::memory_order_release);
  }

  // Only for what another thread has begun: whatever nobody had begun, this thread has done itself. So it ends even
  // where the threads of a pool are called one after the other.
  void wait() const {
    while (done_.load(std::memory_order_acquire) < limit_) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  struct alignas(64) Counter {  // a cache line of its own
    std::atomic<int64_t> value{0};
  };

  int64_t begin_of(int64_t stretch) const { return limit_ * stretch / stretches_; }

  const int64_t limit_, stretches_;
  const std::unique_ptr<Counter[]> next_;
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace eigenprune
