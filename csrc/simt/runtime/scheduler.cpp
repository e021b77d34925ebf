// Runs a launch: blocks in random order, one after the other. Within a block, one thread runs at a time, until it
// waits.
//
// A warp is chosen at random among those with ready lanes. Its ready lanes run in order, beginning with a random one. A
// thread is not interrupted between two waits. Races between threads are found by the shadow of the memory
// (memory.cpp), in whatever order the threads run.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>

#include "simt/checks/counters.h"
#include "simt/checks/error.h"
#include "simt/checks/memory.h"
#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

std::mutex launch_mutex;
thread_local bool launching = false;  // whether this thread of the host runs the current launch
std::mt19937_64 generator(0);
std::string failure;  // message of the thread that ran last

Block the_block;
Launch the_launch;
Thread* running = nullptr;
uint32_t last_epoch = 0;

constexpr size_t kMaxThreads = 1024, kMaxGridYZ = 65535;
constexpr size_t kMaxSharedBytes = 227 * 1024;

LaneMask bit(uint32_t lane) { return LaneMask{1} << lane; }

void first_call() {
  arrived();
  the_launch.invoke(the_launch.call);
  Thread& self = *running;
  Warp& warp = the_block.warps[self.warp()];
  warp.ready &= ~bit(self.lane());
  for (const Copy& copy : self.copies) {
    fail(copy.place, "the thread ends while a copy to shared memory is unfinished");
  }
  leave(self.fiber, true);
}

void wait(Thread& self) {
  the_block.warps[self.warp()].ready &= ~bit(self.lane());
  leave(self.fiber, false);
}

// Called if no thread is ready and not all are at the barrier or have ended.
[[noreturn]] void report_deadlock() {
  for (const Thread& waiting : the_block.threads) {
    const Warp& warp = the_block.warps[waiting.warp()];
    if (!(warp.at_collective & bit(waiting.lane()))) continue;
    const LaneMask mask = warp.mask[waiting.lane()];
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      if (!(mask & bit(lane))) continue;
      const char* state = nullptr;
      if (warp.at_barrier & bit(lane)) {
        state = "waits at a barrier of the block";
      } else if (!(warp.at_collective & bit(lane))) {
        state = "has ended";
      } else if (warp.operation[lane] != warp.operation[waiting.lane()] || warp.mask[lane] != mask) {
        state = "waits at another operation, or with another mask";
      }
      if (state == nullptr) continue;
      running = &the_block.threads[waiting.linear];
      fail(waiting.place, "an operation of the warp waits for lane %u, which %s", lane, state);
    }
  }
  throw KernelError("no thread of the launch can continue");  // not reached: a lane is at a collective operation
}

// Whether two places are on different source lines. A compiler may have turned one call into several.
bool are_different_lines(const void* first, const void* other) {
  return first != other && describe_place(first) != describe_place(other);
}

// All lanes of an aligned instruction must be at the same place.
void check_aligned(const Thread& self, LaneMask mask) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (!(mask & bit(lane))) continue;
    const void* place = the_block.threads[self.linear - self.lane() + lane].place;
    if (are_different_lines(place, self.place)) {
      fail(self.place, "lane %u is at the same operation in another place, %s", lane, describe_place(place).c_str());
    }
  }
}

// All threads of a block must wait at the same barrier.
void check_barrier() {
  const Thread* first = nullptr;
  for (Thread& each : the_block.threads) {
    if (!(the_block.warps[each.warp()].at_barrier & bit(each.lane()))) continue;
    if (first == nullptr) first = &each;
    if (!are_different_lines(first->place, each.place)) continue;
    running = &each;
    fail(each.place, "thread %u waits at another barrier, %s", first->linear, describe_place(first->place).c_str());
  }
}

void begin_block(uint32_t linear) {
  const dim3 grid = the_launch.grid, size = the_launch.block;
  the_block.index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
  the_block.first_epoch = the_block.epoch = ++last_epoch;
  std::memset(the_block.shared, 0xff, the_block.shared_bytes);  // NaN in every format
  for (size_t i = 0; i < the_block.warps.size(); ++i) {
    const size_t lanes = std::min<size_t>(kLanes, the_block.threads.size() - i * kLanes);
    Warp& warp = the_block.warps[i];
    warp.exist = warp.ready = lanes == kLanes ? ~LaneMask{0} : bit(static_cast<uint32_t>(lanes)) - 1;
    warp.at_barrier = warp.at_collective = 0;
    warp.epoch = 0;
  }
  for (uint32_t i = 0; i < the_block.threads.size(); ++i) {
    Thread& each = the_block.threads[i];
    each.linear = i;
    each.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    each.groups = 0;
    each.copies.clear();
    each.fiber.stack = stack_of(i);
    prepare(each.fiber, first_call);
  }
}

void run_block() {
  auto& warps = the_block.warps;
  const size_t count = warps.size();
  for (;;) {
    const size_t start = generator() % count;
    Warp* chosen = nullptr;
    size_t index = 0;
    for (size_t i = 0; i < count && chosen == nullptr; ++i) {
      index = (start + i) % count;
      if (warps[index].ready) chosen = &warps[index];
    }
    if (chosen == nullptr) {
      LaneMask at_barrier = 0;
      for (const Warp& warp : warps) {
        if (warp.at_collective) report_deadlock();
        at_barrier |= warp.at_barrier;
      }
      if (!at_barrier) return;  // all have ended
      check_barrier();
      the_block.epoch = ++last_epoch;
      count_barrier();
      for (Warp& warp : warps) {
        warp.ready = warp.at_barrier;
        warp.at_barrier = 0;
      }
      continue;
    }
    const auto first = static_cast<uint32_t>(generator() % kLanes);
    for (uint32_t i = 0; i < kLanes; ++i) {
      const uint32_t lane = (first + i) % kLanes;
      if (!(chosen->ready & bit(lane))) continue;
      running = &the_block.threads[index * kLanes + lane];
      enter(running->fiber);
      running = nullptr;
      if (!failure.empty()) throw KernelError(std::exchange(failure, {}));
    }
  }
}

}  // namespace

Block& block() { return the_block; }
Thread& thread() { return *running; }
const Launch& current_launch() { return the_launch; }
bool in_thread() { return launching && running != nullptr; }

void wait_for_block(const void* place) {
  Thread& self = *running;
  the_block.warps[self.warp()].at_barrier |= bit(self.lane());
  self.place = place;
  wait(self);
}

void run_collective(int operation, LaneMask mask, void* argument, void (*combine)(void**, LaneMask),
                    const void* place) {
  Thread& self = *running;
  Warp& warp = the_block.warps[self.warp()];
  const uint32_t lane = self.lane();
  if (!(mask & bit(lane))) fail(place, "lane %u is not in its own mask %#x", lane, mask);
  if (mask & ~warp.exist) fail(place, "the mask %#x has lanes that the warp has not", mask);
  warp.operation[lane] = operation;
  warp.mask[lane] = mask;
  warp.argument[lane] = argument;
  warp.at_collective |= bit(lane);
  self.place = place;
  bool last = (warp.at_collective & mask) == mask;
  for (uint32_t i = 0; last && i < kLanes; ++i) {
    last = !(mask & bit(i)) || (warp.operation[i] == operation && warp.mask[i] == mask);
  }
  if (last) {
    if (operation >= kAligned) check_aligned(self, mask);
    combine(warp.argument, mask);
    warp.at_collective &= ~mask;
    warp.ready |= mask;
  } else {
    wait(self);
  }
}

void fail(const void* place, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Thread* self = running;
  std::string message = text;
  if (self != nullptr) {
    const uint3 at = the_block.index, index = self->index;
    std::snprintf(text, sizeof text, "; block (%u, %u, %u), thread (%u, %u, %u) of ", at.x, at.y, at.z, index.x,
                  index.y, index.z);
    message += text + describe_kernel(the_launch.kernel);
    if (place != nullptr) message += ", in " + describe_place(place);
    if (in_fiber()) {
      failure = std::move(message);
      leave(self->fiber, true);
    }
    running = nullptr;
  }
  throw KernelError(message);
}

void run(Launch launch, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const dim3 grid = launch.grid, size = launch.block;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads) throw KernelError("a block must have 1 to 1024 threads");
  if (grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) throw KernelError("a grid can have at most 65535 blocks in y and z");
  if (shared_bytes > kMaxSharedBytes) throw KernelError("a block can have at most 227 KiB of shared memory");
  const std::unique_ptr<char[]> shared(new char[shared_bytes + 128]);
  the_block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.get()) + 127) & ~uintptr_t{127});
  the_block.shared_bytes = shared_bytes;
  the_block.threads.resize(threads);
  the_block.warps.resize((threads + kLanes - 1) / kLanes);
  the_launch = launch;
  the_launch.first_epoch = last_epoch + 1;
  reset_shared_shadow(shared_bytes);
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  count_launch(shared_bytes);
  launching = true;
  try {
    for (const uint32_t linear : order) {
      begin_block(linear);
      run_block();
      count_block();
    }
  } catch (...) {
    launching = false;
    running = nullptr;
    forget_accesses();
    throw;
  }
  launching = false;
}

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  generator.seed(seed);
}

}  // namespace softprompt::simt
