// SPDX-License-Identifier: Apache-2.0
// The machine behind cuda_runtime.h: fibers, barriers, warps, tensor cores. Compiled without a sanitizer; it tells one
// that is linked what the fibers do. Under ThreadSanitizer two fibers are ordered by __syncthreads and by nothing else,
// so that a forgotten barrier is a data race.

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../../csrc/cuda/elements.cuh"

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Order order = Order::kAscending;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kWords = 6;  // the most that an instruction takes from a lane
constexpr unsigned kSwitchOrdersNothing = 1;  // __tsan_switch_to_fiber_no_sync

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u, %u; thread %u)\n", message, blockIdx.x, blockIdx.y,
               threadIdx.x);
  std::_Exit(3);
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* shadow = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  bool is_done = true;
};

struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t words[2][32][kWords];  // in turns: a lane may be one exchange ahead of another
  uint64_t calls[32];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block_barrier;
ucontext_t scheduler;
void* scheduler_shadow;
void* scheduler_tsan;
const void* scheduler_bottom;
size_t scheduler_size;
const std::function<void()>* kernel;
uint64_t progress;  // arrivals and ends: a round without any is a deadlock
std::mt19937 shuffler(1);

void leave(Fiber& fiber, bool for_good) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.shadow, scheduler_bottom, scheduler_size);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan, kSwitchOrdersNothing);
  swapcontext(&fiber.context, &scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fiber.shadow, nullptr, nullptr);
}

void enter(unsigned thread) {
  Fiber& fiber = fibers[thread];
  threadIdx.x = thread;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler_shadow, fiber.stack.get(), kStack);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, kSwitchOrdersNothing);
  swapcontext(&scheduler, &fiber.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_shadow, nullptr, nullptr);
}

void start() {
  Fiber& fiber = fibers[threadIdx.x];
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
  }
  if (__tsan_acquire) __tsan_acquire(&kernel);
  (*kernel)();
  if (__tsan_release) __tsan_release(&kernel);
  fiber.is_done = true;
  ++progress;
  leave(fiber, /*for_good=*/true);
}

void wait(Barrier& barrier, bool orders_memory) {
  const unsigned thread = threadIdx.x;
  const uint64_t generation = barrier.generation;
  ++progress;
  if (orders_memory && __tsan_release) __tsan_release(&barrier);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) leave(fibers[thread], /*for_good=*/false);
  if (orders_memory && __tsan_acquire) __tsan_acquire(&barrier);
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.is_done = false;
  makecontext(&fiber.context, &start, 0);
  if (__tsan_create_fiber && fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
}

void run_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) prepare(fibers[thread]);
  block_barrier = {threads, 0, 0};
  warps.assign(threads / 32, Warp{});
  for (Warp& warp : warps) warp.barrier.expected = 32;
  if (__tsan_release) __tsan_release(&kernel);

  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) turn[i] = order == Order::kDescending ? threads - 1 - i : i;
  unsigned running = threads;
  while (running > 0) {
    const uint64_t before = progress;
    if (order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), shuffler);
    for (const unsigned thread : turn) {
      if (fibers[thread].is_done) continue;
      enter(thread);
      if (fibers[thread].is_done) --running;
    }
    if (progress == before) fail("deadlock: some threads wait where others do not");
  }
  if (block_barrier.arrived != 0) fail("a thread waits for a block that has ended");
  if (__tsan_acquire) __tsan_acquire(&kernel);
}

}  // namespace

void run(dim3 grid, dim3 block, const std::function<void()>& body) {
  if (block.x == 0 || block.x > 1024 || block.x % 32 != 0) fail("not a block of whole warps");
  if (grid.x == 0 || grid.y == 0) fail("an empty grid is a launch error");
  gridDim = grid;
  blockDim = block;
  kernel = &body;
  if (__tsan_get_current_fiber) scheduler_tsan = __tsan_get_current_fiber();
  if (fibers.size() < block.x) fibers.resize(block.x);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = order == Order::kDescending ? blocks.size() - 1 - i : i;
  if (order == Order::kShuffled) std::shuffle(blocks.begin(), blocks.end(), shuffler);
  for (const uint64_t index : blocks) {
    blockIdx = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x));
    run_block(block.x);
  }
}

void wait_for_block() { wait(block_barrier, /*orders_memory=*/true); }

namespace {

// Every lane of a warp gives words, waits for the others, and gets what all 32 gave; valid until its next exchange.
// This orders no memory, as shuffles do not. (A loop, and not memcpy, which a sanitizer would see.)
const uint32_t (*exchange(const uint32_t (&words)[kWords]))[kWords] {
  const unsigned lane = threadIdx.x % 32;
  Warp& warp = warps[threadIdx.x / 32];
  auto& slots = warp.words[warp.calls[lane]++ % 2];
  for (int i = 0; i < kWords; ++i) slots[lane][i] = words[i];
  wait(warp.barrier, /*orders_memory=*/false);
  return slots;
}

}  // namespace
}  // namespace emulator

float __shfl_xor_sync(uint32_t, float value, int mask) {
  const unsigned lane = threadIdx.x % 32;
  return __uint_as_float(emulator::exchange({__float_as_uint(value)})[lane ^ static_cast<unsigned>(mask)][0]);
}

uint32_t __shfl_up_sync(uint32_t, uint32_t value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return emulator::exchange({value})[lane < distance ? lane : lane - distance][0];
}

namespace eigenprune {
namespace {

// One element of an operand: register `index` of a lane, low or high half.
template <typename Element>
float element(const uint32_t* registers, int index, int half) {
  return Element::widen(static_cast<typename Element::Bits>(registers[index] >> (16 * half)));
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": where element (row, k) of a and (k, column) of
// b are. Written from that table, not from the kernel.
template <typename Element>
void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto* lanes = emulator::exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int member = k % 8 / 2;
      const float left = element<Element>(lanes[row % 8 * 4 + member], (row < 8 ? 0 : 1) + (k < 8 ? 0 : 2), k % 2);
      const float right = element<Element>(lanes[column * 4 + member] + 4, k < 8 ? 0 : 1, k % 2);
      sum[i] += left * right;
    }
  }
}

}  // namespace

void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply<Float16>(sum, a, b); }
void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply<BFloat16>(sum, a, b); }

}  // namespace eigenprune
