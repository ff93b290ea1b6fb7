// SPDX-License-Identifier: Apache-2.0
// How threads share the units of a piece of work without a plan: whoever is free takes the next one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace eigenprune {

// Hands out numbers below a limit, each once, and knows when all of them are done.
class Ticket {
 public:
  explicit Ticket(size_t limit) : limit_(static_cast<int64_t>(limit)) {}

  template <typename Work>
  void work_off(const Work& work) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < limit_;) {
      work(i);
      done_.fetch_add(1, std::memory_order_release);
    }
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
  const int64_t limit_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace eigenprune
